"""How jobs look: one that was just submitted, one in full, all of them in a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.table import Table

from sdtune.commands.words import age, duration
from sdtune.jobs.archive import JobRecord
from sdtune.jobs.backend import Submitted

STYLE = {
    "succeeded": "green",
    "failed": "bold red",
    "expired": "red",
    "cancelled": "dim",
    "cancelling": "dim",
    "running": "cyan",
    "pending": "yellow",
    "queued": "yellow",
}


def submitted(out: RichConsole, job: Submitted) -> None:
    """A job was made: what it is called, and how to come back to it."""
    out.print(f"[bold]Submitted[/] job {job.number} in {job.region}; Ctrl-C leaves it running.")
    how_to_return(out, job)


def how_to_return(out: RichConsole, job: Submitted) -> None:
    """The commands for a job that goes on by itself."""
    region = f" --region {job.region}"
    for name, value in (
        ("follow", f"sdtune jobs logs -f {job.number}{region}"),
        ("cancel", f"sdtune jobs cancel {job.number}{region}"),
        ("browser", job.url),
    ):
        out.print(f"  {name:<10}{escape(value)}")


def table(out: RichConsole, records: Iterable[JobRecord]) -> None:
    """A row for each job, newest first."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("job", "name", "method", "state", "age", "GPU", "region"):
        shown.add_column(column, no_wrap=True)
    shown.add_column("output", overflow="fold")
    for record in records:
        shown.add_row(
            record.number, escape(record.name), record.method or record.task, coloured(record.state),
            age(record.created), record.accelerators, record.region, escape(record.output),
        )  # fmt: skip
    if shown.row_count:
        out.print(shown)
    else:
        out.print("There are no jobs of sdtune here yet.")


def show(out: RichConsole, record: JobRecord) -> None:
    """One job, a line for each fact."""
    out.print(f"[bold]{escape(record.name)}[/]  {coloured(record.state)}")
    lasted = (record.ended or datetime.now(UTC)) - record.started if record.started else None
    facts = (
        ("job", record.job_id),
        ("method", record.method or record.task),
        ("machine", f"{record.machine_type}, {record.accelerators}" if record.gpu else record.machine_type),
        ("created", f"{_local(record.created)} ({age(record.created)} ago)"),
        ("ran", duration(lasted.total_seconds()) if lasted else "not yet" if not record.has_ended else "never"),
        ("output", record.output),
        ("browser", record.url),
    )
    for name, value in facts:
        if value:
            out.print(f"  {name:<10}{escape(value)}")


def coloured(state: str) -> str:
    """The state, as markup."""
    return f"[{STYLE[state]}]{state}[/]" if state in STYLE else state


def as_json(record: JobRecord) -> dict[str, Any]:
    """The same for programs: times as ISO 8601."""
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(record).items()}


def _local(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M}"
