"""Console: the one sink for what the user sees, as text for people or as JSON lines for programs."""

from __future__ import annotations

import json
import shlex
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sdtune import events
from sdtune.cli import ledger_view, run_view
from sdtune.cli.words import count
from sdtune.commands.convert import Conversion, LoraSummary
from sdtune.commands.train import TrainingPlan
from sdtune.errors import SdtuneError
from sdtune.jobs.backend import LogLine
from sdtune.methods.buckets import bucket_table
from sdtune.methods.ledger import Ledger

ProgressCall = Callable[[int, int], None]


class Console(ABC):
    """What commands show. Standard output carries all of it but errors, which people read on standard error."""

    @abstractmethod
    def plan(self, plan: TrainingPlan, place: str) -> None:
        """What will happen."""

    @abstractmethod
    def rendered(self, rendered: dict[str, Any]) -> None:
        """What a backend would start, for ``--dry-run``."""

    @abstractmethod
    def ledger(self, ledger: Ledger, every_file: bool = False) -> None:
        """What the check of a dataset found; ``every_file`` names also those that are in order."""

    @abstractmethod
    def checking(self) -> AbstractContextManager[ProgressCall]:
        """Progress of a dataset check; call what it yields with (images done, images in all)."""

    @abstractmethod
    def follow(self, stream: Iterable[events.Event | LogLine]) -> None:
        """Show a run as it goes, then where its result is."""

    @abstractmethod
    def conversion(self, conversion: Conversion) -> None:
        """What was read of a LoRA, and where it was written."""

    @abstractmethod
    def stopped(self) -> None:
        """The run was stopped by the user."""

    @abstractmethod
    def error(self, error: SdtuneError) -> None:
        """Why the command ends without its result."""


def open_console(json: bool = False) -> Console:
    """The console of the form that the user asked for."""
    return JsonConsole() if json else HumanConsole()


class JsonConsole(Console):
    """One JSON object per line, each with its kind under ``event``."""

    def _line(self, event: str, **fields: Any) -> None:
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()

    def plan(self, plan: TrainingPlan, place: str) -> None:
        shapes = {f"{width}x{height}": count for (width, height), count in Counter(plan.shapes).items()}
        self._line(
            "plan", place=place, job=plan.job.name, output=plan.job.output, shapes=shapes,
            settings=plan.method.settings(),
        )  # fmt: skip
        if plan.base_model.note:
            self._line(**events.to_dict(events.Note(plan.base_model.note, "warning")))

    def rendered(self, rendered: dict[str, Any]) -> None:
        self._line("dry_run", **rendered)

    def ledger(self, ledger: Ledger, every_file: bool = False) -> None:
        fields = ledger.to_json()
        if not every_file:
            del fields["rows"], fields["examples"]
        self._line("dataset", **fields)

    @contextmanager
    def checking(self) -> Iterator[ProgressCall]:
        yield lambda done, total: self._line("progress", name="check", done=done, total=total)

    def follow(self, stream: Iterable[events.Event | LogLine]) -> None:
        for item in stream:
            if isinstance(item, LogLine):
                self._line("log", text=item.text)
            else:
                self._line(**events.to_dict(item))

    def conversion(self, conversion: Conversion) -> None:
        self._line("conversion", **asdict(conversion))

    def stopped(self) -> None:
        self._line("stopped")

    def error(self, error: SdtuneError) -> None:
        self._line("error", kind=error.kind, text=str(error), exit_code=error.exit_code)


class HumanConsole(Console):
    """Text; colour and moving bars only on a terminal."""

    def __init__(self) -> None:
        self.out = RichConsole(highlight=False, soft_wrap=True)

    def plan(self, plan: TrainingPlan, place: str) -> None:
        method = plan.method
        pictures = method.train_batch_size * method.gradient_accumulation_steps
        size = f" at {plan.resolution} px" if plan.resolution else ""
        shapes = plan.shapes
        self.out.print(f"[bold]{method.name}[/bold] on {place}")
        shown = count(len(plan.ledger.examples), "picture")
        for name, value in (
            ("base model", method.base_model + (f" at {method.revision}" if method.revision else "")),
            ("dataset", f"{shown}{size} from {plan.ledger.root}"),
            ("shapes", bucket_table(shapes) if len(set(shapes)) > 1 else ""),
            (
                "training",
                f"{count(method.max_train_steps, 'step')} of {count(pictures, 'picture')}, seed {method.seed}",
            ),
            ("output", plan.job.output),
        ):
            if value:
                self.out.print(f"  {name:<12}{escape(str(value))}")
        if plan.base_model.note:
            self.out.print(f"[yellow]warning:[/] {escape(plan.base_model.note)}")

    def rendered(self, rendered: dict[str, Any]) -> None:
        self.out.print("\nNothing was started. This would run:")
        environment = [f"{name}={value}" for name, value in rendered["environment"].items()]
        self.out.print("  " + escape(" ".join(shlex.quote(word) for word in [*environment, *rendered["command"]])))

    def ledger(self, ledger: Ledger, every_file: bool = False) -> None:
        ledger_view.show(self.out, ledger, every_file)

    @contextmanager
    def checking(self) -> Iterator[ProgressCall]:
        columns = TextColumn("Checking pictures"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, console=self.out, transient=True, disable=not self.out.is_terminal) as progress:
            task = progress.add_task("check", total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def follow(self, stream: Iterable[events.Event | LogLine]) -> None:
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

    def stopped(self) -> None:
        self.out.print("[yellow]Stopped.[/] The run was ended and left no result.")

    def error(self, error: SdtuneError) -> None:
        RichConsole(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
