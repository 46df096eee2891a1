"""JobSpec: one run, planned but not yet placed anywhere."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdtune.jobs.machines import Machine
from sdtune.methods.base import Method
from sdtune.methods.notebooks import SUFFIX, as_argument

RUN_ID = re.compile(r"[0-9a-f]{16}")


def new_run_id() -> str:
    """A name that no other submission has, so that it can be found again whatever became of the answer."""
    return uuid.uuid4().hex[:16]


@dataclass(frozen=True)
class JobSpec:
    """What every backend starts. ``args`` is cargo: no backend reads or changes it.

    task: ``train``, ``sync-nfs`` or ``notebook``. method: empty where a task has none. machine: None on this machine.
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
    method: Method,
    dataset: str,
    output: str,
    machine: Machine | None = None,
    nfs: Sequence[str] = (),
    *,
    overwrite: bool = False,
) -> JobSpec:
    """The run of ``method`` on ``dataset``; all places as the training process will see them.

    overwrite: begin anew whatever the output holds. A job that is started again by its place has the same arguments
    and must go on all the same, so they say which time of asking this is.
    """
    shares = [f"--nfs={place}" for place in nfs]
    anew = [f"--overwrite={new_run_id()}"] if overwrite else []
    return JobSpec(
        name=output.rstrip("/").rpartition("/")[2],
        task="train",
        method=method.name,
        container=method.container,
        output=output,
        args=("train", method.name, f"--dataset={dataset}", f"--output={output}", *shares, *anew, *method.to_args()),
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


def plan_notebook(
    notebook: str,
    output: str,
    parameters: Mapping[str, Any],
    *,
    container: str = "diffusers",
    kernel: str | None = None,
    cell_timeout: int | None = None,
    machine: Machine | None = None,
) -> JobSpec:
    """The run of a notebook with ``parameters``; both places as the runner will see them. cell_timeout: seconds."""
    optional = [f"--kernel={kernel}"] if kernel else []
    optional += [f"--cell-timeout={cell_timeout}"] if cell_timeout is not None else []
    given = [f"--parameters={as_argument(parameters)}"] if parameters else []
    return JobSpec(
        name=notebook.rpartition("/")[2].removesuffix(SUFFIX),
        task="notebook",
        method="",
        container=container,
        output=output,
        args=("notebook", f"--notebook={notebook}", f"--output={output}", *optional, *given),
        machine=machine,
    )
