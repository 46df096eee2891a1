"""What a run says while it goes: one JSON object per line on standard output.

The trainer emits, the launcher reads back; Vertex AI carries such a line as plain text inside a log
entry, so the same reader serves a local process and a job in the cloud. Everything that is not an
event (a library's warning, a traceback) stays an ordinary line of log.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Phase:
    """The run has begun a part of its work: ``fetch``, ``load``, ``cache``, ``sample``, ``compile``, ``train``,
    ``save``, ``upload``, ``copy`` or ``cells``."""

    event: ClassVar[str] = "phase"
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a phase has come: ``done`` of ``total`` pictures, sampling steps, megabytes or cells."""

    event: ClassVar[str] = "progress"
    name: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Step:
    """Where training is. ``loss`` is the mean since the last such event; seconds are estimates of what is left."""

    event: ClassVar[str] = "step"
    step: int
    steps: int
    loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure that can be compared between steps and runs, such as ``held_out_loss`` after ``step`` steps."""

    event: ClassVar[str] = "measure"
    name: str
    step: int
    value: float


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing. ``level``: ``info`` or ``warning``."""

    event: ClassVar[str] = "note"
    text: str
    level: str = "info"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of the result. ``kind``: ``lora``, ``kohya_lora``, ``contact_sheet``, ``recipe``, ``tensorboard`` ..."""

    event: ClassVar[str] = "artifact"
    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The run could go on from here: after ``step`` steps, from what is at ``path``."""

    event: ClassVar[str] = "checkpoint"
    step: int
    path: str


@dataclass(frozen=True, slots=True)
class Copy:
    """A row in the ledger of copies. ``outcome``: ``copied``, ``equal`` (``path`` was there already) or ``failed``."""

    event: ClassVar[str] = "copy"
    source: str
    path: str
    outcome: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The run ends without its result. ``kind`` is the error's, so that its exit code is kept."""

    event: ClassVar[str] = "failed"
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The run ends with its result. ``change``: largest absolute entry of the LoRA's weight deltas."""

    event: ClassVar[str] = "finished"
    seconds: float
    steps: int
    loss: float
    change: float


@dataclass(frozen=True, slots=True)
class Executed:
    """A notebook was run, so many of its cells, and the notebook with its outputs is where the run should leave it."""

    event: ClassVar[str] = "executed"
    seconds: float
    cells: int


Event = Phase | Progress | Step | Measure | Note | Artifact | Checkpoint | Copy | Failed | Finished | Executed
KINDS: dict[str, type[Event]] = {
    kind.event: kind
    for kind in (Phase, Progress, Step, Measure, Note, Artifact, Checkpoint, Copy, Failed, Finished, Executed)
}


LARGEST = 2**53
"""No figure of a run is as large, and no reader of JSON mistakes one below."""


def to_dict(event: Event) -> dict[str, Any]:
    """The event as the JSON object that travels."""
    return {"event": event.event, **asdict(event)}


def to_line(event: Event) -> str:
    """One line of ASCII JSON: a terminal's encoding cannot break it."""
    return json.dumps(to_dict(event))


def emit(event: Event) -> None:
    """Say it on standard output, at once."""
    sys.stdout.write(to_line(event) + "\n")
    sys.stdout.flush()


def parse(line: str) -> Event | None:
    """The event in ``line``, or None for ordinary output, even if that happens to be JSON."""
    # Before it may stand what a library wrote without ending its line.
    start = line.find('{"event"')
    if start < 0:
        return None
    try:
        fields = json.loads(line[start:])
        event = KINDS[fields.pop("event")](**fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return event if all(_fits(getattr(event, one.name), str(one.type)) for one in dataclasses.fields(event)) else None


def _fits(value: object, kind: str) -> bool:
    """Whether a field is what its class says. Others print JSON too, and nobody may be misled by it."""
    if kind == "str":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if kind == "int" else int | float):
        return False
    return abs(value) < LARGEST  # not infinite, and a number at all
