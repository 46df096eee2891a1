"""How a search looks: a table of its trials, which is live on a terminal, lines elsewhere; JSON for programs."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sdtune.cli.json_lines import json_line
from sdtune.cli.terminal import Screen
from sdtune.commands.hpo import StudyPlan
from sdtune.commands.words import count, duration
from sdtune.errors import JobError
from sdtune.jobs.backend import Submitted
from sdtune.jobs.search_space import Value
from sdtune.jobs.study import Study, StudyRecord, Trial

STYLE = {
    "active": "cyan",
    "stopping": "yellow",
    "infeasible": "red",
    "running": "cyan",
    "succeeded": "green",
    "failed": "bold red",
    "cancelled": "yellow",
}
CHOSEN = {"default": "by what was learned from those before", "random": "at random", "grid": "one after another"}
JUDGED = {"last": "the last of each trial", "best": "the best of each trial, which may be luck"}
STOPPED = {"none": "never", "median": "once worse than the median", "decay-curve": "once its curve promises little"}
AROUND = 4
"""Lines of a terminal that a table leaves free: its head, and where the cursor is."""
FIELDS = (
    "metric", "goal", "max_trials", "parallel_trials", "max_failed_trials", "algorithm", "early_stopping",
    "measurement", "seed_per_trial",
)  # fmt: skip
"""Of a search, as programs are told it."""


class View(ABC):
    """What commands show of studies."""

    @abstractmethod
    def plan(self, plan: StudyPlan) -> None:
        """What will be searched."""

    @abstractmethod
    def rendered(self, rendered: dict[str, Any], text: str) -> None:
        """What would be started, for ``--dry-run``."""

    @abstractmethod
    def submitted(self, study: Submitted) -> None:
        """A study was made: what it is called, and how to come back to it."""

    @abstractmethod
    def follow(self, records: Iterable[StudyRecord]) -> StudyRecord:
        """Show it as it goes; how it ended."""

    @abstractmethod
    def study(self, record: StudyRecord) -> None:
        """All of a study, trials in their order."""

    @abstractmethod
    def trials(self, record: StudyRecord) -> None:
        """Its trials, the best first."""

    @abstractmethod
    def best(self, record: StudyRecord, trial: Trial) -> None:
        """Its best trial."""

    @abstractmethod
    def left(self, study: Submitted | None) -> None:
        """The user has left a study that goes on by itself; None: one that was stopped."""


def open_view(as_json: bool) -> View:
    """The view of the form that the user asked for."""
    return JsonView() if as_json else HumanView()


def named(record: StudyRecord) -> str:
    """The words after a command that name the study again."""
    return f"{record.number} --region {record.region}" if record.region else shlex.quote(record.output)


class JsonView(View):
    """One JSON object per line, each with its kind under ``event``."""

    def plan(self, plan: StudyPlan) -> None:
        json_line("study_plan", **_search_as_json(plan.study), notes=plan.notes)

    def rendered(self, rendered: dict[str, Any], text: str) -> None:
        json_line("dry_run", **rendered)

    def submitted(self, study: Submitted) -> None:
        json_line("submitted", **asdict(study))

    def follow(self, records: Iterable[StudyRecord]) -> StudyRecord:
        last: StudyRecord | None = None
        for record in records:
            if last is None or record.state != last.state:
                json_line("state", state=record.state)
            for trial in _changed(record, last):
                json_line("trial", **_trial_as_json(record, trial))
            last = record
        self.study(_known(last))
        return _known(last)

    def study(self, record: StudyRecord) -> None:
        json_line(
            "study", study=record.study_id, number=record.number, name=record.name, state=record.state,
            method=record.method, output=record.output, region=record.region, error=record.error, url=record.url,
            created=_iso(record.created), started=_iso(record.started), ended=_iso(record.ended),
            **_search_as_json(record), trials=[_trial_as_json(record, trial) for trial in record.trials],
            best=record.best.id if record.best else None,
        )  # fmt: skip

    def trials(self, record: StudyRecord) -> None:
        for trial in _best_first(record):
            json_line("trial", **_trial_as_json(record, trial))

    def best(self, record: StudyRecord, trial: Trial) -> None:
        json_line("best", **_trial_as_json(record, trial))

    def left(self, study: Submitted | None) -> None:
        if study:
            json_line("left", **asdict(study))
        else:
            json_line("stopped")


class HumanView(View):
    """Text; colour and a table that moves only on a terminal."""

    def __init__(self) -> None:
        self.out = Screen()

    def plan(self, plan: StudyPlan) -> None:
        study = plan.study
        failures = f", until {study.max_failed_trials} have failed" if study.max_failed_trials else ""
        rows = [
            ("trials", f"{study.max_trials}, {study.parallel_trials} at a time{failures}"),
            ("chosen", CHOSEN[study.algorithm]),
            ("judged by", f"{study.metric}, lower is better; {JUDGED[study.measurement]}"),
            ("ended early", STOPPED[study.early_stopping]),
            *((one.name, one.words) for one in study.space),
        ]
        self.out.print(f"[bold]Search[/] for better settings of {study.method}")
        width = max(len(name) for name, _ in rows) + 2
        for name, value in rows:
            self.out.print(f"  {name:<{width}}{escape(value)}")
        for note in plan.notes:
            self.out.print(f"[yellow]warning:[/] {escape(note)}")

    def rendered(self, rendered: dict[str, Any], text: str) -> None:
        self.out.print("\nNothing was started. This would run:")
        self.out.print(text, markup=False)

    def submitted(self, study: Submitted) -> None:
        self.out.print(f"[bold]Submitted[/] study {study.number} in {study.region}; Ctrl-C leaves it running.")
        self._how_to_return(study)

    def follow(self, records: Iterable[StudyRecord]) -> StudyRecord:
        last: StudyRecord | None = None

        def table() -> RenderableType:
            return _table(last, _most_telling(last, self.out.height - AROUND)) if last else ""

        # A line that the terminal wraps would count as one when the table is drawn over.
        screen = Screen(**_like(self.out), soft_wrap=False, width=self.out.width)
        # Drawn anew also while nothing changes: trials get older.
        moving = Live(get_renderable=table, console=screen, refresh_per_second=1, transient=True)
        with moving if self.out.is_terminal else nullcontext() as live:
            for record in records:
                if live is None:
                    self._lines(record, last)
                last = record
                if live is not None:
                    live.refresh()
        self.study(_known(last))
        return _known(last)

    def study(self, record: StudyRecord) -> None:
        self._whole(_table(record, record.trials))
        for trial in record.trials:
            if trial.reason:
                self.out.print(f"[red]trial {trial.id}:[/] {escape(trial.reason.strip().splitlines()[0])}")
            if trial.reason and record.region and trial.job_id:
                number = trial.job_id.rpartition("/")[2]
                self.out.print(f"  all that it said: sdtune jobs logs {number} --region {record.region}")
        if record.best:
            self.best(record, record.best)

    def trials(self, record: StudyRecord) -> None:
        self._whole(_table(record, _best_first(record)))

    def best(self, record: StudyRecord, trial: Trial) -> None:
        so_far = "" if record.has_ended else " so far"
        measured = f"{record.value_of(trial):.5g}"
        self.out.print(f"[bold green]Best{so_far}[/]: trial {trial.id}, {record.metric} {measured}")
        for name, value in trial.parameters.items():
            self.out.print(f"  {name:<24}{escape(_shown(value))}")
        self.out.print(f"Its result:   {escape(record.folder_of(trial))}")
        self.out.print(f"Its recipe:   sdtune hpo apply {escape(named(record))} -o best.yaml")

    def left(self, study: Submitted | None) -> None:
        if study:
            self.out.print(f"[yellow]Study {study.number} goes on[/] without this terminal.")
            self._how_to_return(study)
        else:
            self.out.print("[yellow]Stopped.[/] What was found is kept; the same command goes on from there.")

    def _whole(self, table: RenderableType) -> None:
        """A table that stays: nothing is left out of it, and what is too long is left to the terminal."""
        Screen(**_like(self.out), width=1000).print(table)

    def _how_to_return(self, study: Submitted) -> None:
        region = f" --region {study.region}"
        for name, value in (
            ("follow", f"sdtune hpo status -f {study.number}{region}"),
            ("cancel", f"sdtune hpo cancel {study.number}{region}"),
            ("browser", study.url),
        ):
            self.out.print(f"  {name:<10}{escape(value)}")

    def _lines(self, record: StudyRecord, last: StudyRecord | None) -> None:
        if last is None or record.state != last.state:
            self.out.print(Text(f"study {record.state}", style=STYLE.get(record.state, "")))
        for trial in _changed(record, last):
            settings = ", ".join(f"{name} {_shown(value)}" for name, value in trial.parameters.items())
            found = _metric(record, trial)
            measured = f"  {record.metric} {found[0]} at step {found[1]}" if found else ""
            self.out.print(f"trial {trial.id:<3} {trial.state:<11}{escape(settings)}{measured}")


def _table(record: StudyRecord, trials: Iterable[Trial]) -> Group:
    """A line on the study, a row for each trial; the best is marked."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("trial", "state", *(one.name for one in record.space), record.metric, "step", "ran"):
        right = column in (record.metric, "step", "ran")
        # On a narrow terminal each keeps something, and the metric all of it; the last are the first to go.
        least = 8 if column == record.metric else min(len(column), 5)
        shown.add_column(column, no_wrap=True, min_width=least, justify="right" if right else "left")
    best = record.best
    for trial in trials:
        is_best = best is not None and trial.id == best.id
        value, step = _metric(record, trial) or ("", "")
        shown.add_row(
            f"★ {trial.id}" if is_best else f"  {trial.id}", Text(trial.state, style=STYLE.get(trial.state, "")),
            *(_shown(trial.parameters.get(one.name, "-")) for one in record.space),
            # What does not count, or not yet, is dim.
            Text(value, style="" if trial.final else "dim"), step, _ran(trial),
            style="bold" if is_best else "",
        )  # fmt: skip
    ended = sum(trial.ended is not None for trial in record.trials)
    number = f" ({record.number})" if record.number != record.name else ""
    head = Text.assemble(
        (record.name, "bold"), f"{number}  ", (record.state, STYLE.get(record.state, "")),
        f": {ended} of {count(record.max_trials, 'trial')} ended, {record.parallel_trials} at a time",
    )  # fmt: skip
    return Group(head, shown)


def _most_telling(record: StudyRecord, rows: int) -> list[Trial]:
    """So many of the trials, in their order: those that run, then the best."""
    running = [trial for trial in record.trials if trial.ended is None]
    ended = [trial for trial in _best_first(record) if trial.ended is not None]
    kept = {trial.id for trial in [*running, *ended][: max(1, rows)]}
    return [trial for trial in record.trials if trial.id in kept]


def _metric(record: StudyRecord, trial: Trial) -> tuple[str, str] | None:
    """What is known of the metric by now, and the step, as text."""
    measured = trial.latest
    if measured is None or record.metric not in measured.metrics:
        return None
    return f"{measured.metrics[record.metric]:.5g}", str(measured.step)


def _ran(trial: Trial) -> str:
    if trial.started is None:
        return ""
    return duration(((trial.ended or datetime.now(UTC)) - trial.started).total_seconds())


def _changed(record: StudyRecord, last: StudyRecord | None) -> list[Trial]:
    """The trials that are not as they were."""
    before = {trial.id: trial for trial in last.trials} if last else {}
    return [trial for trial in record.trials if before.get(trial.id) != trial]


def _best_first(record: StudyRecord) -> list[Trial]:
    ranked = record.ranked
    return [*ranked, *(trial for trial in record.trials if trial not in ranked)]


def _known(record: StudyRecord | None) -> StudyRecord:
    if record is None:
        raise JobError("nothing was told of the study; try again.")
    return record


def _shown(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _search_as_json(study: Study | StudyRecord) -> dict[str, Any]:
    return {"space": [asdict(one) for one in study.space], **{name: getattr(study, name) for name in FIELDS}}


def _trial_as_json(record: StudyRecord, trial: Trial) -> dict[str, Any]:
    measured = trial.latest
    return {
        "id": trial.id,
        "state": trial.state,
        "parameters": dict(trial.parameters),
        "value": record.value_of(trial),
        "step": measured.step if measured else None,
        "measurements": [{"step": one.step, **one.metrics} for one in trial.measurements],
        "reason": trial.reason,
        "output": record.folder_of(trial),
        "job": trial.job_id,
        "started": _iso(trial.started),
        "ended": _iso(trial.ended),
    }


def _iso(time: datetime | None) -> str | None:
    return time.isoformat() if time else None


def _like(out: Screen) -> dict[str, Any]:
    """The options of another screen at the same terminal, which is for tables: their figures have colours."""
    return {"file": out.file, "force_terminal": out.is_terminal, "highlight": True}
