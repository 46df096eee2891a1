"""A planned run in rows of a name and a value: what will happen, where, and for how long at most."""

from __future__ import annotations

from sdtune.commands.notebook import NotebookPlan
from sdtune.commands.sync_nfs import CopyPlan
from sdtune.commands.train import TrainingPlan
from sdtune.commands.words import count
from sdtune.jobs.durations import show_duration
from sdtune.jobs.machines import Machine
from sdtune.jobs.placement import Placement
from sdtune.methods.buckets import bucket_table

Rows = list[tuple[str, str]]
"""A row without a value is not shown."""


def training_rows(plan: TrainingPlan) -> Rows:
    """What is trained on what, and the machine that is rented for it."""
    method, shapes = plan.method, plan.shapes
    pictures = method.train_batch_size * method.gradient_accumulation_steps
    rows = [
        ("base model", method.base_model + (f" at {method.revision}" if method.revision else "")),
        ("dataset", _dataset(plan)),
        ("shapes", bucket_table(shapes) if len(set(shapes)) > 1 else ""),
        ("training", f"{count(method.max_train_steps, 'step')} of {count(pictures, 'picture')}, seed {method.seed}"),
        ("output", plan.job.output),
        ("goes on", f"from step {plan.earlier.step:,}, where it was stopped" if plan.earlier.step else ""),
    ]
    if plan.placement and plan.job.machine:
        rows += machine_rows(plan.job.machine, plan.placement)
    return rows


def copy_rows(plan: CopyPlan) -> Rows:
    """The same for a copy to shares."""
    assert plan.job.machine
    return [
        ("from", plan.source),
        ("to", ", ".join(f"{share}/{plan.method or '<its method>'}/" for share in plan.shares)),
        *machine_rows(plan.job.machine, plan.placement),
    ]


def notebook_rows(plan: NotebookPlan) -> Rows:
    """The same for a notebook: its parameters as Python will have them."""
    rows = [
        ("notebook", plan.notebook),
        *(("parameter", f"{name} = {_shortened(repr(value))}") for name, value in plan.parameters.items()),
        ("output", plan.result),
    ]
    if plan.placement and plan.job.machine:
        rows += machine_rows(plan.job.machine, plan.placement)
    return rows


def _shortened(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def machine_rows(machine: Machine, placement: Placement) -> Rows:
    """What is rented, and for how long at most."""
    gpus = ""
    if machine.accelerator_type:
        name = machine.gpu.name if machine.gpu else machine.accelerator_type
        gpus = f" with {machine.accelerator_count} x {name}"
    of_each = f"{count(placement.replicas, 'machine')}, each " if placement.replicas > 1 else ""
    strategy = "" if placement.effective_strategy == "on-demand" else f", {placement.effective_strategy}"
    return [
        ("machine", f"{of_each}{machine.machine_type}{gpus}{strategy}"),
        ("time", f"the job is ended after {show_duration(placement.timeout)} at most (--timeout)"),
        ("shares", ", ".join(f"{mount.server}:{mount.path} at {mount.place}" for mount in placement.mounts)),
    ]


def _dataset(plan: TrainingPlan) -> str:
    if plan.ledger is None:
        return f"{plan.dataset}, not looked at: --dry-run makes no call"
    size = f" at {plan.resolution} px" if plan.resolution else ""
    return f"{count(len(plan.ledger.examples), 'picture')}{size} from {plan.ledger.root}"
