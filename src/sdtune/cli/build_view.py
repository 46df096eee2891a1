"""How a build looks while it goes, and the images that are there."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from sdtune import events
from sdtune.cli.json_lines import json_line
from sdtune.cli.terminal import Screen
from sdtune.commands.build import BuildPlan, BuildStarted, ImageFound, Told
from sdtune.commands.words import age, duration
from sdtune.jobs.backend import StateChange, Submitted
from sdtune.jobs.builder import BuildEnd, Builder, ImageRecord, StepChange, StepLine

MARKS = {"done": "[green]✓[/]", "failed": "[bold red]✗[/]", "cancelled": "[dim]-[/]"}


def follow(stream: Iterable[Told], *, as_json: bool, region: str) -> None:
    """Show builds as they go; on a terminal the steps stay below the log, with their times."""
    if as_json:
        for item in stream:
            json_line(**_fields(item))
        return
    out = _out()
    steps = _Steps(out)
    with steps if out.is_terminal else nullcontext():
        for item in stream:
            match item:
                case BuildStarted():
                    out.print(
                        f"[bold]Building[/] {item.image}:{item.tag} in {region}, build {item.build.number}; "
                        "Ctrl-C leaves it running."
                    )
                    _how_to_return(out, item.build)
                case StateChange(text=text, seconds=seconds):
                    out.print(f"[dim]{duration(seconds):>10}[/]  {escape(text)}")
                case StepChange():
                    steps.change(item)
                case StepLine(step=step, text=text):
                    out.print(Text(f"{step}: {text}" if step else text, style="dim"))
                case ImageFound(image=image, moved=moved):
                    out.print(f"[bold green]There already:[/] {image.name}:{image.tags[0]}; --force builds it anew.")
                    _image(out, image.uri.partition("@")[0], image.digest, image.tags)
                    if moved:
                        out.print(f"  [dim]{' and '.join(moved)} named another image, and this one now[/]")
                case BuildEnd() if item.succeeded:
                    steps.forget()
                    out.print(f"[bold green]Built[/] {item.image} in {duration(item.seconds)}.")
                    address = item.uris[0].rpartition(":")[0] if item.uris else item.image
                    _image(out, address, item.digest, [uri.rpartition(":")[2] for uri in item.uris])
                    for base in item.bases:
                        out.print(f"  {'base':<10}{escape(base)}")
                case BuildEnd():
                    steps.forget()
                    out.print(f"[bold red]{item.image}[/]: {item.state} after {duration(item.seconds)}.")
                case events.Note(text=text):
                    out.print(f"[yellow]warning:[/] {escape(text)}")
                case events.Phase(text=text):
                    out.print(escape(text))


def plans(builder: Builder, planned: Iterable[BuildPlan], *, as_json: bool) -> None:
    """What would be sent, for ``--dry-run``: a file for gcloud, or several, parted as YAML parts documents."""
    for number, plan in enumerate(planned):
        if as_json:
            json_line("dry_run", image=plan.spec.name, tag=plan.spec.tag, build=plan.rendered)
            continue
        # Nothing but the file: it can be sent on as it is.
        sys.stdout.write(("---\n" if number else "") + builder.as_text(plan.rendered) + "\n")


def images(records: Iterable[ImageRecord], *, as_json: bool) -> None:
    """A row for each image, newest first."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("image", "sdtune", "digest", "size", "age", "tags"):
        shown.add_column(
            column, no_wrap=column != "tags", overflow="fold", justify="right" if column == "size" else "left"
        )
    for record in records:
        if as_json:
            json_line("image", **_plain(record))
            continue
        shown.add_row(
            record.name, record.version or "-", record.digest[:19], f"{record.size / 1e9:.2f} GB",
            age(record.uploaded), ", ".join(record.tags),
        )  # fmt: skip
    if as_json:
        return
    out = _out()
    if shown.row_count:
        out.print(shown)
    else:
        out.print("There are no images of sdtune here yet; sdtune build --all makes them.")


def left(started: Iterable[Submitted], *, as_json: bool) -> None:
    """The user has left: builds that go on, or none that was started."""
    started = list(started)
    if not started and not as_json:
        _out().print("[yellow]Stopped.[/] No build was started.")
    for build in started:
        if as_json:
            json_line("left", build=build.number, region=build.region)
            continue
        out = _out()
        out.print(f"[yellow]Build {build.number} goes on[/] without this terminal.")
        _how_to_return(out, build)


class _Steps:
    """A row for each step that has begun, with its time, while there is a terminal; a line for each elsewhere."""

    def __init__(self, out: RichConsole) -> None:
        self._out = out
        self._rows: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text=""), TextColumn("{task.description}"), _Time(), console=out, transient=True
        )

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def change(self, step: StepChange) -> None:
        if step.state == "working":
            if self._out.is_terminal:
                self._rows[step.step] = self._progress.add_task(escape(step.step), total=None)
            else:
                self._out.print(f"Step {step.step}")
            return
        if step.step in self._rows:
            self._progress.remove_task(self._rows.pop(step.step))
        mark = MARKS.get(step.state, "")
        self._out.print(f"{mark} [bold]{escape(step.step)}[/] {step.state} after {duration(step.seconds)}")

    def forget(self) -> None:
        """The next build has steps of its own."""
        for row in self._rows.values():
            self._progress.remove_task(row)
        self._rows.clear()


class _Time(ProgressColumn):
    """How long a step has been at work."""

    def render(self, task: Task) -> Text:
        return Text(duration(task.elapsed or 0.0), style="cyan")


def _out() -> RichConsole:
    return Screen()


def _how_to_return(out: RichConsole, build: Submitted) -> None:
    region = f" --region {build.region}"
    for name, value in (
        ("follow", f"sdtune build --follow {build.number}{region}"),
        ("cancel", f"sdtune build --cancel {build.number}{region}"),
        ("browser", build.url),
    ):
        out.print(f"  {name:<10}{escape(value)}")


def _image(out: RichConsole, address: str, digest: str, tags: Iterable[str]) -> None:
    for name, value in (("image", address), ("digest", digest), ("tags", ", ".join(tags))):
        out.print(f"  {name:<10}{escape(value)}")


EVENTS = {
    BuildStarted: "build_started",
    ImageFound: "image_found",
    StateChange: "state",
    StepChange: "step",
    StepLine: "build_log",
    BuildEnd: "build_end",
}


def _fields(item: Told) -> dict[str, Any]:
    kind = EVENTS.get(type(item))
    return {"event": kind, **_plain(item)} if kind else events.to_dict(item)  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """As JSON has it: times as ISO 8601."""
    found = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    if isinstance(found, dict):
        return {name: _plain(part) for name, part in found.items()}
    return found.isoformat() if isinstance(found, datetime) else found
