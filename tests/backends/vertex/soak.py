"""Jobs, searches and builds sent while requests fare badly at random; then it is counted what there is of each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

from sdtune.backends.registry import open_backend, open_builder, open_studies
from sdtune.commands.running import JobRun
from sdtune.errors import SdtuneError
from sdtune.jobs.images import BuildSettings, plan_image
from sdtune.jobs.machines import cpu_machine
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import JobSpec, new_run_id
from tests.backends.vertex.study_examples import study
from tests.servers.cloud import Cloud
from tests.servers.faults import KINDS, Chance
from tests.servers.tokens import TokenServer

PLACEMENT = Placement(project="my-project", bucket="gs://bkt")
FASTER = 50.0
"""How much shorter all waits are."""


@dataclass
class Outcome:
    """What became of all that was sent. wrong: each case in which there was not just what was told."""

    sent: int = 0
    succeeded: int = 0
    failed: int = 0
    in_doubt: int = 0
    wrong: list[str] = field(default_factory=list)
    befell: Counter[str] = field(default_factory=Counter)
    requests: int = 0


def sent_job(run_id: str) -> str:
    """``sdtune train --detach``, less its checks: the number of the job."""
    output = f"gs://bkt/{run_id}"
    args = ("train", "dreambooth-lora", f"--output={output}")
    job = JobSpec(run_id, "train", "dreambooth-lora", "diffusers", output, args, cpu_machine(), run_id)
    running = JobRun(job, (), open_backend("vertex", PLACEMENT), detach=True)
    list(running)
    assert running.submitted
    return running.submitted.number


def sent_study(run_id: str) -> str:
    one = study(run_id)
    return open_studies("vertex", PLACEMENT).submit(replace(one, job=replace(one.job, run_id=run_id))).number


def sent_build(run_id: str) -> str:
    builder = open_builder(PLACEMENT)
    rendered = builder.render(plan_image("diffusers", "train", PLACEMENT), BuildSettings())
    with patch("sdtune.backends.vertex.builds.new_run_id", lambda: run_id):
        return builder.start(rendered).number


SENT: tuple[Callable[[str], str], ...] = (sent_job, sent_study, sent_build)


def there(cloud: Cloud[Any], run_id: str) -> list[str]:
    """What carries this name and has not been cancelled."""
    labelled = [*cloud.vertex.jobs.copy().values(), *cloud.vertex.studies.made.copy().values()]
    found = [
        one.id
        for one in labelled
        if one.message.labels.get("sdtune-run") == run_id and "CANCEL" not in one.state and not is_trial(cloud, one)
    ]
    builds = cloud.build.builds.copy().values()
    return found + [one.id for one in builds if f"run-{run_id}" in one.tags and one.status.name != "CANCELLED"]


def is_trial(cloud: Cloud[Any], one: Any) -> bool:
    """Whether a job is one of a study's own."""
    return any(one is job for study in cloud.vertex.studies.made.copy().values() for job in study.jobs.values())


@contextmanager
def hurried() -> Iterator[None]:
    """All waits of this process are shorter, those of the servers too."""
    sleep = time.sleep
    with patch("time.sleep", lambda seconds: sleep(seconds / FASTER)):
        yield


def soak(
    cloud: Cloud[Any], faults: int, *, seed: int = 0, rate: float = 0.5, kinds: tuple[str, ...] = KINDS
) -> Outcome:
    """Send one after the other until so many faults have befallen requests."""
    outcome = Outcome()
    cloud.storage.buckets["bkt"] = {}
    with TokenServer() as tokens, hurried():
        credentials = tokens.credentials()
        chance = Chance(seed, rate, kinds, seconds=0.005, most=faults)
        for server in (cloud.vertex, cloud.build):
            tokens.guard(server)
            server.chance = chance
        with patch("sdtune.backends.vertex.google.credentials_for", lambda service: credentials):
            while chance.befell.total() < faults:
                _send(cloud, outcome)
        outcome.befell = chance.befell
    outcome.requests = len(cloud.vertex.requests) + len(cloud.build.requests)
    return outcome


def _send(cloud: Cloud[Any], outcome: Outcome) -> None:
    run_id, send = new_run_id(), SENT[outcome.sent % len(SENT)]
    outcome.sent += 1
    try:
        number, told = send(run_id), ""
    except SdtuneError as error:
        number, told = "", str(error)
    time.sleep(0.05 * FASTER)  # what is late has come
    found = there(cloud, run_id)
    if number:
        outcome.succeeded += 1
        if found != [number]:
            outcome.wrong.append(f"{send.__name__} told of {number}, and there is {found}")
    elif "may have been made all the same" in told and run_id in told:
        outcome.in_doubt += 1
    else:
        outcome.failed += 1
        if found:
            outcome.wrong.append(f"{send.__name__} told of a failure ({told}), and there is {found}")
    for one in (*cloud.vertex.studies.made.values(), *cloud.vertex.jobs.values()):
        one.close()
    cloud.vertex.studies.made.clear()
    cloud.vertex.jobs.clear()
    with cloud.build.lock:
        cloud.build.builds.clear()
