"""How a run looks while it goes, and what it left behind."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from sdtune import events
from sdtune.cli import job_view
from sdtune.commands.running import Said
from sdtune.commands.words import MEANING, count, duration
from sdtune.jobs.backend import LogLine, StateChange, Submitted
from sdtune.methods.places import BUCKETS

FIRST_REPLICA = "workerpool0-0"
SEVERITY = {"info": "dim", "warning": "yellow", "error": "red"}
OUTCOMES = {"copied": "[green]copied[/]", "equal": "[dim]there  [/]", "failed": "[bold red]failed[/]"}
SECONDS_BETWEEN_LINES = 10.0
MOST_PICTURES = 5


def follow(out: RichConsole, stream: Iterable[Said]) -> None:
    """Show the run; a bar on a terminal, a line now and then elsewhere."""
    view = _Bars(out) if out.is_terminal else _Lines(out)
    artifacts: list[events.Artifact] = []
    finished: events.Finished | events.Executed | None = None
    with view:
        for item in stream:
            match item:
                case LogLine(text=text, severity=severity, replica=replica):
                    told_by = "" if replica in ("", FIRST_REPLICA) else f"{replica}: "
                    out.print(Text(told_by + text, style=SEVERITY[severity]))
                case StateChange(text=text, seconds=seconds):
                    out.print(f"[dim]{duration(seconds):>10}[/]  {escape(text)}")
                case Submitted():
                    job_view.submitted(out, item)
                case events.Note(text=text, level=level):
                    out.print(f"[yellow]warning:[/] {escape(text)}" if level == "warning" else escape(text))
                case events.Measure(name=name, step=step, value=value):
                    out.print(f"  {escape(name.replace('_', ' '))} after step {step}: {value:.4f}")
                case events.Artifact():
                    artifacts.append(item)
                case events.Copy(path=path, outcome=outcome, why=why):
                    said = OUTCOMES.get(outcome, escape(outcome))
                    out.print(f"  {said}  {escape(path)}" + (f"  {escape(why)}" if why else ""))
                case events.Finished() | events.Executed():
                    finished = item
                case _:
                    view.show(item)
    if finished:
        _result(out, finished, artifacts)


def _result(out: RichConsole, finished: events.Finished | events.Executed, artifacts: list[events.Artifact]) -> None:
    if isinstance(finished, events.Finished):
        how = f"loss {finished.loss:.4f} at the end"
    else:
        how = f"{count(finished.cells, 'cell')} run"
        artifacts = _few_pictures(artifacts)
    out.print(f"[bold green]Done[/] in {duration(finished.seconds)}, {how}.")
    width = max((len(artifact.path) for artifact in artifacts), default=0)
    for artifact in artifacts:
        meaning = MEANING.get(artifact.kind, escape(artifact.kind))
        out.print(f"  {escape(artifact.path):<{width}}  [dim]{meaning}[/]")
    recipe = next((artifact.path for artifact in artifacts if artifact.kind == "recipe"), "")
    if recipe.startswith(BUCKETS):
        folder = escape(shlex.quote(recipe.rpartition("/")[0]))
        out.print(f"Bring it here:    gcloud storage cp -r {folder} .")
        out.print(
            f"Onto a share:     sdtune sync-nfs --from {folder} --nfs SERVER:/PATH=/mnt/nfs/NAME --network NETWORK"
        )


def _few_pictures(artifacts: list[events.Artifact]) -> list[events.Artifact]:
    """Where cells drew many pictures, their folder in place of them."""
    pictures = [artifact for artifact in artifacts if artifact.kind == "picture"]
    if len(pictures) <= MOST_PICTURES:
        return artifacts
    folder = events.Artifact(f"{len(pictures)} pictures that cells drew", pictures[0].path.rpartition("/")[0] + "/")
    return [folder, *(artifact for artifact in artifacts if artifact.kind != "picture")]


class _Figures(ProgressColumn):
    """What the running phase has to say in numbers."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("figures", ""), style="cyan", no_wrap=True, overflow="ellipsis")


class _Bars:
    """One bar per phase; a phase that has ended stays as a full bar."""

    def __init__(self, out: RichConsole) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Figures(table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=out,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *error: object) -> None:
        if error == (None, None, None):
            self._end_phase()
        self._progress.stop()

    def show(self, event: events.Event) -> None:
        match event:
            case events.Phase():
                self._end_phase()
                self._task = self._progress.add_task(escape(event.text), total=None)
            case events.Progress() if self._task is not None:
                self._progress.update(self._task, completed=event.done, total=event.total)
            case events.Step() if self._task is not None:
                self._progress.update(self._task, completed=event.step, total=event.steps, figures=_figures(event))

    def _end_phase(self) -> None:
        if self._task is not None:
            total = self._progress.tasks[self._task].total or 1
            self._progress.update(self._task, completed=total, total=total)


class _Lines:
    """A line at the start of each phase, and one every ten seconds of training."""

    def __init__(self, out: RichConsole) -> None:
        self._out = out
        self._next = 0.0

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, event: events.Event) -> None:
        match event:
            case events.Phase():
                self._out.print(escape(event.text))
            case events.Step() if time.monotonic() >= self._next or event.step == event.steps:
                self._out.print(f"  step {_figures(event)}")
                self._next = time.monotonic() + SECONDS_BETWEEN_LINES


def _figures(event: events.Step) -> str:
    figures = f"{event.step}/{event.steps}  loss {event.loss:.4f}  {event.images_per_second:.1f} images/s"
    return figures if event.step == event.steps else f"{figures}  {duration(event.seconds_left)} left"
