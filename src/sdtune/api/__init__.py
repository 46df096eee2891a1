"""The use cases of the command line as functions, for notebooks and scripts; ``import sdtune`` has them, too.

    run = sdtune.train("dreambooth-lora", dataset="photos", output="out/cat", instance_prompt="a photo of sks cat")
    run.samples, run.lora_path

Names and options are those of the commands, with underscores; the same checks come first, and all mistakes are told in
one error. In a notebook a cell shows how it goes, with the loss curve and the samples; elsewhere lines are printed.

A cell waits for the end unless it is told ``wait=False``; interrupting it stops a run of this machine and leaves a job
in the cloud alone, as Ctrl-C does. A run of this machine ends with the Python that started it.
"""

from sdtune.api import jobs
from sdtune.api.building import Build, build, images
from sdtune.api.copying import sync_nfs
from sdtune.api.going import InterruptedWait
from sdtune.api.runs import Result, Run
from sdtune.api.samples import Picture, Sample, Samples, compare
from sdtune.api.searching import Search, find_search, hpo
from sdtune.api.training import train

__all__ = [
    "Build",
    "InterruptedWait",
    "Picture",
    "Result",
    "Run",
    "Sample",
    "Samples",
    "Search",
    "build",
    "compare",
    "find_search",
    "hpo",
    "images",
    "jobs",
    "sync_nfs",
    "train",
]
