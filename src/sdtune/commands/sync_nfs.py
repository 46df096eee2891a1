"""Sync-nfs: copy trained models from a bucket to Filestore shares, by a small job without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdtune.commands.checks import Mistakes
from sdtune.errors import RecipeError
from sdtune.jobs.backend import Backend
from sdtune.jobs.machines import cpu_machine
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import JobSpec, plan_copy
from sdtune.methods.base import MARK, RECIPE_FILE
from sdtune.methods.catalog import find_method
from sdtune.methods.places import in_bucket

NOT_FOR_COPIES = (
    "gpu", "gpus", "machine_type", "replicas", "strategy", "spot", "max_wait", "restart_on_preemption", "save_nfs",
    "tensorboard", "bucket", "hf_token_secret", "wandb_key_secret",
)  # fmt: skip
"""Settings of a placement that are for training alone; a project's file may have them all the same."""


@dataclass(frozen=True)
class CopyPlan:
    """A copy that can be started. shares: where the job sees them."""

    source: str
    method: str | None
    shares: tuple[str, ...]
    job: JobSpec
    placement: Placement
    rendered: dict[str, Any]


def plan_sync_nfs(
    source: str | None,
    method: str | None,
    backend: Backend,
    placement: Placement,
    *,
    machine_type: str | None = None,
    mistakes: Mistakes | None = None,
) -> CopyPlan:
    """The plan of a copy. Writes nothing; raises one error that tells every mistake.

    machine_type: one without a GPU; what the placement says of machines is for training.
    """
    mistakes = mistakes or Mistakes()
    name: str | None = None
    with mistakes:
        machine = cpu_machine(machine_type)
    with mistakes:
        if not placement.mounts:
            raise RecipeError("nfs: missing; give --nfs SERVER:/PATH=/mnt/nfs/NAME, the share to copy to.")
    with mistakes:
        name = find_method(method).name if method else None
    with mistakes:
        address = _models_at(source, name, backend)
    mistakes.raise_if_any()
    shares = tuple(mount.place for mount in placement.mounts)
    job = plan_copy(address, name, shares, machine)
    return CopyPlan(address, name, shares, job, placement, backend.render(job))


def for_copies(placement: Placement) -> Placement:
    """``placement`` without what is for training alone."""
    return placement.model_copy(update={name: Placement.model_fields[name].default for name in NOT_FOR_COPIES})


def _models_at(source: str | None, method: str | None, backend: Backend) -> str:
    """The address of a result; RecipeError: there is none, as far as can be seen."""
    if not source:
        raise RecipeError("from: missing; give --from gs://bucket/path, the --output of a training.")
    address = in_bucket(source)
    if address is None:
        raise RecipeError(f"from: found {source!r}, which a job cannot reach; wanted gs://bucket/path.")
    names = backend.list_names(address)
    models = [name for name in names if name.endswith(".safetensors") or name == "model_index.json"]
    if names and not models:
        unfinished = " (a run that has not ended)" if MARK in names and RECIPE_FILE not in names else ""
        raise RecipeError(f"from: {source} holds no model{unfinished}; wanted .safetensors files or model_index.json.")
    if names and method is None and RECIPE_FILE not in names:
        raise RecipeError(f"method: {source} has no {RECIPE_FILE} that names it; give --method.")
    return address
