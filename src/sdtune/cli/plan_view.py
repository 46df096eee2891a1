"""How a planned run looks: what will happen, where, and for how long at most."""

from __future__ import annotations

from rich.console import Console as RichConsole
from rich.markup import escape

from sdtune.cli.words import count
from sdtune.commands.sync_nfs import CopyPlan
from sdtune.commands.train import TrainingPlan
from sdtune.jobs.durations import show_duration
from sdtune.jobs.machines import Machine
from sdtune.jobs.placement import Placement
from sdtune.methods.buckets import bucket_table


def show(out: RichConsole, plan: TrainingPlan, place: str) -> None:
    """Print the plan, and what should be known of it."""
    method, shapes = plan.method, plan.shapes
    pictures = method.train_batch_size * method.gradient_accumulation_steps
    out.print(f"[bold]{method.name}[/bold] on {escape(place)}")
    rows = [
        ("base model", method.base_model + (f" at {method.revision}" if method.revision else "")),
        ("dataset", _dataset(plan)),
        ("shapes", bucket_table(shapes) if len(set(shapes)) > 1 else ""),
        ("training", f"{count(method.max_train_steps, 'step')} of {count(pictures, 'picture')}, seed {method.seed}"),
        ("output", plan.job.output),
    ]
    if plan.placement and plan.job.machine:
        rows += machine_rows(plan.job.machine, plan.placement)
    _print_rows(out, rows)
    for note in plan.notes:
        out.print(f"[yellow]warning:[/] {escape(note)}")


def show_copy(out: RichConsole, plan: CopyPlan, place: str) -> None:
    """The same for a copy to shares."""
    out.print(f"[bold]sync-nfs[/bold] on {escape(place)}")
    assert plan.job.machine
    _print_rows(
        out,
        [
            ("from", plan.source),
            ("to", ", ".join(f"{share}/{plan.method or '<its method>'}/" for share in plan.shares)),
            *machine_rows(plan.job.machine, plan.placement),
        ],
    )


def _print_rows(out: RichConsole, rows: list[tuple[str, str]]) -> None:
    for name, value in rows:
        if value:
            out.print(f"  {name:<12}{escape(value)}")


def machine_rows(machine: Machine, placement: Placement) -> list[tuple[str, str]]:
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
