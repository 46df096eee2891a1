"""How a planned run looks: what will happen, where, and for how long at most."""

from __future__ import annotations

from rich.console import Console as RichConsole
from rich.markup import escape

from sdtune.commands.notebook import NotebookPlan
from sdtune.commands.plans import Rows, copy_rows, notebook_rows, training_rows
from sdtune.commands.sync_nfs import CopyPlan
from sdtune.commands.train import TrainingPlan


def show(out: RichConsole, plan: TrainingPlan, place: str) -> None:
    """Print the plan, and what should be known of it."""
    out.print(f"[bold]{plan.method.name}[/bold] on {escape(place)}")
    _print_rows(out, training_rows(plan))
    for note in plan.notes:
        out.print(f"[yellow]warning:[/] {escape(note)}")


def show_copy(out: RichConsole, plan: CopyPlan, place: str) -> None:
    """The same for a copy to shares."""
    out.print(f"[bold]sync-nfs[/bold] on {escape(place)}")
    _print_rows(out, copy_rows(plan))


def show_notebook(out: RichConsole, plan: NotebookPlan, place: str) -> None:
    """The same for a notebook."""
    out.print(f"[bold]notebook[/bold] on {escape(place)}")
    _print_rows(out, notebook_rows(plan))
    for note in plan.notes:
        out.print(f"[yellow]warning:[/] {escape(note)}")


def _print_rows(out: RichConsole, rows: Rows) -> None:
    for name, value in rows:
        if value:
            out.print(f"  {name:<12}{escape(value)}")
