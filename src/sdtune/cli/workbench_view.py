"""How instances of Workbench look: one that is asked for, one that becomes ready, all of them in a table."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from sdtune import events
from sdtune.cli.json_lines import json_line
from sdtune.cli.terminal import Screen
from sdtune.commands.words import age, duration
from sdtune.commands.workbench import Told
from sdtune.jobs.backend import StateChange
from sdtune.jobs.durations import show_duration
from sdtune.jobs.workbench import Begun, InstanceRecord, InstanceSpec, Listing, Outcome, Workbenches

STYLE = {"active": "green", "provisioning": "yellow", "initializing": "yellow", "starting": "yellow", "stopped": "dim",
         "stopping": "dim", "suspended": "dim"}  # fmt: skip


def plan(spec: InstanceSpec, place: str, *, as_json: bool) -> None:
    """What will be made, and where."""
    machine, settings = spec.machine, spec.settings
    gpus = f" with {machine.accelerator_count} x {machine.gpu.name if machine.gpu else machine.accelerator_type}"
    shown = f"{machine.machine_type}{gpus if machine.accelerator_type else ', no GPU'}"
    if as_json:
        json_line("plan", place=place, instance=spec.name, machine=shown, image=spec.image, zones=spec.zones)
        return
    out = _out()
    out.print(f"[bold]{spec.name}[/] on Workbench, {escape(place)}")
    _rows(
        out,
        (
            ("machine", shown),
            ("image", spec.image),
            ("zone", ", then ".join(spec.zones)),
            ("disks", f"{settings.boot_disk_gb} GB for the system, {settings.data_disk_gb} GB for /home/jupyter"),
            ("idle", _idle(settings.idle_shutdown)),
        ),
    )


def rendered(workbenches: Workbenches, spec: InstanceSpec, *, as_json: bool) -> None:
    """What would be sent, for ``--dry-run``, and nothing else."""
    first, *others = spec.zones
    request = workbenches.render(spec, first)
    if as_json:
        json_line("dry_run", **request, zones=spec.zones)
        return
    then = f"# Then, where that has no such machine: {', '.join(others)}\n" if others else ""
    sys.stdout.write(f"{workbenches.as_text(request)}\n{then}")


def follow(told: Iterable[Told], *, as_json: bool) -> None:
    """Show what happens to an instance; on a terminal a clock runs below it."""
    if as_json:
        for item in told:
            json_line(**_fields(item))
        return
    out = _out()
    clock = _Clock(out)
    with clock if out.is_terminal else nullcontext():
        for item in told:
            match item:
                case Begun(doing=doing, name=name, zone=zone):
                    left = "; Ctrl-C leaves it running" if doing in ("Creating", "Starting") else ""
                    out.print(f"[bold]{doing}[/] {name} in {zone}{left}.")
                    clock.show(doing.lower())
                case StateChange(state=state, text=text, seconds=seconds):
                    out.print(f"[dim]{duration(seconds):>10}[/]  {escape(text)}")
                    clock.show(state)
                case events.Note(text=text):
                    out.print(f"[yellow]warning:[/] {escape(text)}")
                case Outcome():
                    clock.forget()
                    _outcome(out, item)


class _Clock:
    """What is waited for, and for how long."""

    def __init__(self, out: RichConsole) -> None:
        columns = TextColumn("         "), SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        self._progress = Progress(*columns, console=out, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, text: str) -> None:
        """Wait for another thing; the clock goes on."""
        if self._task is None:
            self._task = self._progress.add_task(text, total=None)
        self._progress.update(self._task, description=text)

    def forget(self) -> None:
        """Nothing is waited for any more."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


def _outcome(out: RichConsole, done: Outcome) -> None:
    record = done.record
    out.print(f"[bold green]{done.name}[/] in {done.zone} {done.text}.")
    if record is None or record.state in ("deleted", "stopping"):
        return
    if record.state == "active":
        url = record.url or "no address yet; sdtune workbench list shows it"
        _rows(out, (("open", url), ("idle", _idle(record.idle_shutdown)), *_commands(record, "stop", "delete")))
    elif record.state in ("stopped", "suspended"):
        _rows(out, _commands(record, "start", "delete"))
    else:
        _rows(out, (("wait", f"sdtune workbench start {record.name}"), *_commands(record, "delete")))


def _commands(record: InstanceRecord, *verbs: str) -> tuple[tuple[str, str], ...]:
    return tuple((verb, f"sdtune workbench {verb} {record.name}") for verb in verbs)


def listing(found: Listing, *, every: bool, as_json: bool) -> None:
    """A row for each instance, newest first. every: also those that sdtune has not made."""
    records = [record for record in found.records if every or record.version]
    others = len(found.records) - len(records)
    if as_json:
        for record in records:
            json_line("instance", **_plain(record))
        if found.unreachable:
            json_line("note", level="warning", text=_unreachable(found))
        return
    out = _out()
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "state", "age", "machine", "GPU", "idle", "zone"):
        shown.add_column(column, no_wrap=True)
    shown.add_column("image", overflow="fold")
    for record in records:
        state = f"[{STYLE[record.state]}]{record.state}[/]" if record.state in STYLE else record.state
        shown.add_row(
            record.name, state + (" [red]unhealthy[/]" if record.unhealthy else ""), age(record.created),
            record.machine_type, f"{record.gpus} x {_short(record.gpu)}" if record.gpu else "-",
            show_duration(record.idle_shutdown) if record.idle_shutdown else "off", record.zone,
            _image(record.image),
        )  # fmt: skip
    if shown.row_count:
        out.print(shown)
        if urls := [record for record in records if record.url]:
            width = max(len(record.name) for record in urls)
            out.print("\n".join(f"{record.name:<{width}}  {escape(record.url)}" for record in urls))
    else:
        out.print("There are no instances of sdtune here; sdtune workbench create NAME makes one.")
    if others:
        what = "instance was" if others == 1 else "instances were"
        out.print(f"[dim]{others} more {what} not made by sdtune; --all shows {'it' if others == 1 else 'them'}.[/]")
    if found.unreachable:
        out.print(f"[yellow]warning:[/] {_unreachable(found)}")


def facts(record: InstanceRecord) -> None:
    """One instance, before it is deleted."""
    out = _out()
    out.print(f"[bold]{record.name}[/] in {record.zone}, {record.state}, {age(record.created)} old")
    gpu = f", {record.gpus} x {_short(record.gpu)}" if record.gpu else ""
    _rows(out, (("machine", f"{record.machine_type}{gpu}"), ("image", record.image)))


def nothing_to_delete(name: str, workbenches: Workbenches, *, as_json: bool) -> None:
    """There is none of this name."""
    text = f"There is no instance {name} of sdtune in {workbenches.place}; nothing was deleted."
    if as_json:
        json_line("outcome", text="is not there", name=name, zone="", record=None)
    else:
        _out().print(text)


def left(name: str, *, going_on: bool, as_json: bool) -> None:
    """The user has left."""
    if as_json:
        json_line("left" if going_on else "stopped", instance=name)
        return
    out = _out()
    if not going_on:
        out.print("[yellow]Stopped.[/] No instance was made.")
        return
    out.print("[yellow]It goes on[/] without this terminal, and an instance is paid for while it runs.")
    _rows(out, (("wait", f"sdtune workbench start {name}"), ("see", "sdtune workbench list"),
                ("delete", f"sdtune workbench delete {name}")))  # fmt: skip


def _unreachable(found: Listing) -> str:
    return f"no answer from {', '.join(found.unreachable)}; there may be more instances."


def _idle(seconds: int | None) -> str:
    if seconds is None:
        return "never stopped by itself (--idle-shutdown off)"
    return f"stopped when nothing has run in it for {show_duration(seconds)}"


def _image(address: str) -> str:
    """``.../sdtune-kohya-workbench:0.1.0`` as ``kohya:0.1.0``; another's without its repository."""
    return re.sub(r"^sdtune-(\w+)-workbench:", r"\1:", address.rpartition("/")[2]) or "-"


def _short(gpu: str) -> str:
    """``NVIDIA_TESLA_T4`` as ``t4``."""
    return gpu.removeprefix("NVIDIA_").removeprefix("TESLA_").lower().replace("_", "-")


def _out() -> RichConsole:
    return Screen()


def _rows(out: RichConsole, rows: Iterable[tuple[str, str]]) -> None:
    for name, value in rows:
        out.print(f"  {name:<10}{escape(value)}")


EVENTS = {Begun: "begun", StateChange: "state", Outcome: "outcome"}


def _fields(item: Told) -> dict[str, Any]:
    kind = EVENTS.get(type(item))
    return {"event": kind, **_plain(item)} if kind else events.to_dict(item)  # type: ignore[arg-type]


def _plain(item: Any) -> dict[str, Any]:
    """As JSON has it: times as ISO 8601, and what can be seen of a full name."""
    found = asdict(item)
    for part in (found, found.get("record") or {}):
        if isinstance(part.get("created"), datetime):
            part["created"] = part["created"].isoformat()
        if name := part.get("instance_id"):
            part |= {"name": name.rpartition("/")[2], "zone": name.split("/")[3]}
    return found
