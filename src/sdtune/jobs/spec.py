"""JobSpec: one run, planned but not yet placed anywhere."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from sdtune.jobs.machines import Machine
from sdtune.methods.base import Method


def new_run_id() -> str:
    """A name that no other submission has, so that it can be found again whatever became of the answer."""
    return uuid.uuid4().hex[:16]


@dataclass(frozen=True)
class JobSpec:
    """What every backend starts. ``args`` is cargo: no backend reads or changes it.

    task: ``train`` or ``sync-nfs``. method: empty where a task has none. machine: None on this machine.
    """

    name: str
    task: str
    method: str
    container: str
    output: str
    args: tuple[str, ...]
    machine: Machine | None = None
    run_id: str = field(default_factory=new_run_id)


def plan_training(
    method: Method, dataset: str, output: str, machine: Machine | None = None, nfs: Sequence[str] = ()
) -> JobSpec:
    """The run of ``method`` on ``dataset``; all places as the training process will see them."""
    shares = [f"--nfs={place}" for place in nfs]
    return JobSpec(
        name=output.rstrip("/").rpartition("/")[2],
        task="train",
        method=method.name,
        container=method.container,
        output=output,
        args=("train", method.name, f"--dataset={dataset}", f"--output={output}", *shares, *method.to_args()),
        machine=machine,
    )


def plan_copy(source: str, method: str | None, nfs: Sequence[str], machine: Machine | None = None) -> JobSpec:
    """The copy of the models at ``source`` to NFS shares."""
    named = [f"--method={method}"] if method else []
    return JobSpec(
        name=f"sync-nfs-{source.rstrip('/').rpartition('/')[2]}",
        task="sync-nfs",
        method=method or "",
        container="diffusers",
        output=source,
        args=("sync-nfs", f"--from={source}", *named, *(f"--nfs={place}" for place in nfs)),
        machine=machine,
    )
