"""``python -m sdtune.training train METHOD --dataset=... --output=... --recipe=...``: the entry point of containers.

Tells events on standard output (``sdtune.events``) and ends with 0 only if the result exists.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdtune import events
from sdtune.errors import INTERRUPTED, RecipeError, SdtuneError, TrainingError
from sdtune.methods.catalog import find_method
from sdtune.methods.fields import CommonFields
from sdtune.training.launch import is_first, is_one_of_several, number_of_gpus, run_in_processes

if TYPE_CHECKING:
    from sdtune.training.hub import HubRepository


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdtune.training", allow_abbrev=False)
    parser.add_argument("task", choices=["train"])
    parser.add_argument("method")
    parser.add_argument("--dataset", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--processes", type=int, help="processes that train together; not given: one for each GPU")
    job, settings = parser.parse_known_args(argv)
    try:
        method = find_method(job.method).from_args(settings)
        # Before torch is imported: what is missing here is told at once.
        hub = open_accounts(method, job.output) if is_first() else None
        if job.processes is not None and job.processes < 1:
            raise RecipeError(f"processes: found {job.processes}, wanted at least 1, or nothing for one for each GPU.")
        processes = job.processes or number_of_gpus()
        # kohya's trainer starts them itself, in another Python.
        if processes > 1 and method.container == "diffusers" and not is_one_of_several():
            return run_in_processes(processes, sys.argv[1:] if argv is None else argv)
        run_training(method, job.dataset, job.output, hub, processes)
    except SdtuneError as error:
        return fail(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001
        # Not one of ours, so the traceback is what a report needs; the launcher shows the last line on its own.
        traceback.print_exc()
        unexpected = TrainingError(f"unexpected {type(error).__name__}: {error}. The traceback is in the log above.")
        return fail(out_of_memory(error) or unexpected)
    return 0


def open_accounts(method: CommonFields, output: Path) -> HubRepository | None:
    """Prove that what is asked for outside of the output will be let in; the repository to upload to, if any."""
    from sdtune.training.hub import open_repository
    from sdtune.training.trackers import check_trackers

    check_trackers(method)
    return open_repository(method, output.name)


def run_training(
    method: CommonFields, dataset: Path, output: Path, hub: HubRepository | None = None, processes: int = 1
) -> None:
    """Train by the method's own trainer; torch is imported here, after the arguments proved right."""
    # Read when these libraries are imported: their hints on every start would drown the run's own words.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # diffusers imports it where it is installed, and it warns of kernels that no trainer here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # What will change in them is for those who write such code.
    warnings.filterwarnings("ignore", category=FutureWarning)
    from sdtune.training.run import Run

    trainer = importlib.import_module(f"sdtune.training.trainers.{method.trainer}")
    with Run.open(method, dataset, output, hub, processes) as run:
        trainer.train(method, run)


def out_of_memory(error: Exception) -> TrainingError | None:
    """The error in the user's terms if the GPU's memory ran out, else None."""
    import torch

    if not isinstance(error, torch.cuda.OutOfMemoryError):
        return None
    return TrainingError(
        "the GPU ran out of memory. What helps, most first: --train-batch-size 1 with "
        "--gradient-accumulation-steps, --gradient-checkpointing, --mixed-precision bf16 (or fp16), "
        f"a smaller --resolution, a GPU with more memory. CUDA said: {str(error).splitlines()[0]}"
    )


def fail(error: SdtuneError) -> int:
    """Tell the error and return its exit code."""
    events.emit(events.Failed(kind=error.kind, text=str(error)))
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
