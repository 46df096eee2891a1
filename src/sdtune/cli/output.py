"""Console: the one sink for what the user sees, as text for people or as JSON lines for programs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sdtune import events
from sdtune.cli import job_view, ledger_view, plan_view, run_view
from sdtune.cli.json_lines import json_line
from sdtune.cli.terminal import Screen
from sdtune.commands.convert import Conversion, LoraSummary
from sdtune.commands.notebook import NotebookPlan
from sdtune.commands.running import Said
from sdtune.commands.sync_nfs import CopyPlan
from sdtune.commands.train import TrainingPlan
from sdtune.commands.words import count
from sdtune.errors import SdtuneError
from sdtune.jobs.archive import JobRecord
from sdtune.jobs.backend import Backend, LogLine, StateChange, Submitted
from sdtune.methods.ledger import Ledger

ProgressCall = Callable[[int, int], None]


class Console(ABC):
    """What commands show. Standard output carries all of it but errors, which people read on standard error."""

    @abstractmethod
    def plan(self, plan: TrainingPlan, place: str) -> None:
        """What will happen."""

    @abstractmethod
    def copy_plan(self, plan: CopyPlan, place: str) -> None:
        """What will be copied."""

    @abstractmethod
    def notebook_plan(self, plan: NotebookPlan, place: str) -> None:
        """Which notebook will be run, with which parameters."""

    @abstractmethod
    def rendered(self, rendered: dict[str, Any], backend: Backend) -> None:
        """What a backend would start, for ``--dry-run``."""

    @abstractmethod
    def ledger(self, ledger: Ledger, every_file: bool = False) -> None:
        """What the check of a dataset found; ``every_file`` names also those that are in order."""

    @abstractmethod
    def checking(self) -> AbstractContextManager[ProgressCall]:
        """Progress of a dataset check; call what it yields with (images done, images in all)."""

    @abstractmethod
    def follow(self, stream: Iterable[Said]) -> None:
        """Show a run as it goes, then where its result is."""

    @abstractmethod
    def jobs(self, records: Iterable[JobRecord]) -> None:
        """A list of jobs."""

    @abstractmethod
    def job(self, record: JobRecord, details: dict[str, Any]) -> None:
        """One job. details: all that its place knows."""

    @abstractmethod
    def say(self, text: str, **fields: Any) -> None:
        """A sentence that a command ends with; fields: the same for programs."""

    @abstractmethod
    def conversion(self, conversion: Conversion) -> None:
        """What was read of a LoRA, and where it was written."""

    @abstractmethod
    def left(self, submitted: Submitted | None, doubt: str = "") -> None:
        """The user has left: a job that goes on by itself, or the run has been stopped.

        doubt: how to find out whether a job has been made, where it was just being submitted.
        """

    @abstractmethod
    def read_again(self, submitted: Submitted) -> None:
        """A job has ended badly: where all that it said can be read."""

    @abstractmethod
    def error(self, error: SdtuneError) -> None:
        """Why the command ends without its result."""


def open_console(json: bool = False) -> Console:
    """The console of the form that the user asked for."""
    return JsonConsole() if json else HumanConsole()


class JsonConsole(Console):
    """One JSON object per line, each with its kind under ``event``."""

    def plan(self, plan: TrainingPlan, place: str) -> None:
        shapes = {f"{width}x{height}": count for (width, height), count in Counter(plan.shapes).items()}
        json_line(
            "plan", place=place, job=plan.job.name, output=plan.job.output, shapes=shapes,
            settings=plan.method.settings(),
        )  # fmt: skip
        for note in plan.notes:
            json_line(**events.to_dict(events.Note(note, "warning")))

    def copy_plan(self, plan: CopyPlan, place: str) -> None:
        json_line("plan", place=place, job=plan.job.name, source=plan.source, method=plan.method, shares=plan.shares)

    def notebook_plan(self, plan: NotebookPlan, place: str) -> None:
        json_line(
            "plan", place=place, job=plan.job.name, notebook=plan.notebook, output=plan.job.output, result=plan.result,
            parameters=dict(plan.parameters),
        )  # fmt: skip
        for note in plan.notes:
            json_line(**events.to_dict(events.Note(note, "warning")))

    def rendered(self, rendered: dict[str, Any], backend: Backend) -> None:
        json_line("dry_run", **rendered)

    def ledger(self, ledger: Ledger, every_file: bool = False) -> None:
        fields = ledger.to_json()
        if not every_file:
            del fields["rows"], fields["examples"]
        json_line("dataset", **fields)

    @contextmanager
    def checking(self) -> Iterator[ProgressCall]:
        yield lambda done, total: json_line("progress", name="check", done=done, total=total)

    def follow(self, stream: Iterable[Said]) -> None:
        for item in stream:
            match item:
                case LogLine():
                    time = item.time.isoformat() if item.time else None
                    known = {"time": time, "replica": item.replica or None}
                    more = {name: value for name, value in known.items() if value}
                    json_line("log", text=item.text, severity=item.severity, **more)
                case StateChange():
                    json_line("state", **asdict(item))
                case Submitted():
                    json_line("submitted", **asdict(item))
                case _:
                    json_line(**events.to_dict(item))

    def jobs(self, records: Iterable[JobRecord]) -> None:
        for record in records:
            json_line("job", **job_view.as_json(record))

    def job(self, record: JobRecord, details: dict[str, Any]) -> None:
        json_line("job", **job_view.as_json(record), details=details)

    def say(self, text: str, **fields: Any) -> None:
        json_line("said", text=text, **fields)

    def conversion(self, conversion: Conversion) -> None:
        json_line("conversion", **asdict(conversion))

    def left(self, submitted: Submitted | None, doubt: str = "") -> None:
        if submitted:
            json_line("left", **asdict(submitted))
        elif doubt:
            json_line("left_in_doubt", text=doubt)
        else:
            json_line("stopped")

    def read_again(self, submitted: Submitted) -> None:
        """Programs know it from the event ``submitted``."""

    def error(self, error: SdtuneError) -> None:
        json_line("error", kind=error.kind, text=str(error), exit_code=error.exit_code)


class HumanConsole(Console):
    """Text; colour and moving bars only on a terminal."""

    def __init__(self) -> None:
        self.out = Screen()

    def plan(self, plan: TrainingPlan, place: str) -> None:
        plan_view.show(self.out, plan, place)

    def copy_plan(self, plan: CopyPlan, place: str) -> None:
        plan_view.show_copy(self.out, plan, place)

    def notebook_plan(self, plan: NotebookPlan, place: str) -> None:
        plan_view.show_notebook(self.out, plan, place)

    def rendered(self, rendered: dict[str, Any], backend: Backend) -> None:
        self.out.print("\nNothing was started. This would run:")
        self.out.print(backend.as_text(rendered), markup=False)

    def ledger(self, ledger: Ledger, every_file: bool = False) -> None:
        ledger_view.show(self.out, ledger, every_file)

    @contextmanager
    def checking(self) -> Iterator[ProgressCall]:
        columns = TextColumn("Checking pictures"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, console=self.out, transient=True, disable=not self.out.is_terminal) as progress:
            task = progress.add_task("check", total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def follow(self, stream: Iterable[Said]) -> None:
        run_view.follow(self.out, stream)

    def conversion(self, conversion: Conversion) -> None:
        def said(side: LoraSummary) -> str:
            facts = [side.form, *([conversion.family] if conversion.family else []), *side.dtypes]
            return f"{escape(side.path)} ({', '.join(facts)})"

        self.out.print(f"[bold]Read[/] {said(conversion.source)}")
        for part in conversion.parts:
            rank, alpha = (", ".join(f"{value:g}" for value in values) for values in (part.ranks, part.alphas))
            dora = ", DoRA" if part.dora else ""
            self.out.print(f"  {part.name:<15}{count(part.modules, 'module')}, rank {rank}, alpha {alpha}{dora}")
        self.out.print(f"[bold]Wrote[/] {said(conversion.target)}")
        for note in conversion.notes:
            self.out.print(f"[yellow]note:[/] {note}")

    def jobs(self, records: Iterable[JobRecord]) -> None:
        job_view.table(self.out, records)

    def job(self, record: JobRecord, details: dict[str, Any]) -> None:
        job_view.show(self.out, record)

    def say(self, text: str, **fields: Any) -> None:
        self.out.print(escape(text))

    def left(self, submitted: Submitted | None, doubt: str = "") -> None:
        if submitted:
            self.out.print(f"[yellow]Job {submitted.number} goes on[/] without this terminal.")
            job_view.how_to_return(self.out, submitted)
        elif doubt:
            self.out.print(f"[yellow]Stopped[/] as it was being submitted, and it may have been: {escape(doubt)}")
        else:
            self.out.print("[yellow]Stopped.[/] The same command goes on from the newest checkpoint.")

    def read_again(self, submitted: Submitted) -> None:
        self.out.print(f"All that the job said: sdtune jobs logs {submitted.number} --region {submitted.region}")

    def error(self, error: SdtuneError) -> None:
        Screen(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}")
