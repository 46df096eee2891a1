"""The files of a result, listed in the mark of their folder: the next run there takes away what it does not replace."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sdtune import __version__
from sdtune.methods.base import MARK
from sdtune.methods.resuming import facts_in_mark
from sdtune.training.components.files import publish
from sdtune.training.components.model_card import CARD_FILE
from sdtune.training.outbox import CURVES

LOGS = "logs"
SAMPLES = "samples"
LEFT = ("tensorboard",)
"""Kinds of artifacts that a run takes away at its start."""


def write_mark(output: Path, files: Iterable[str], facts: Mapping[str, Any] | None = None) -> None:
    """Mark ``output`` as ours; files: those of the result in it, relative to it. facts: of the run that has finished.

    The first line is for people, and behind it the facts are, as JSON.
    """
    about = " " + json.dumps(facts) if facts else ""
    lines = [f"The output of a run of sdtune {__version__}.{about}", *sorted(files)]
    with publish(output / MARK) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def files_in_mark(output: Path) -> list[str]:
    """The files of the result that lies in ``output``, as far as its mark knows."""
    try:
        names = (output / MARK).read_text(encoding="utf-8").splitlines()[1:]
        return [name for name in names if name and "\0" not in name]
    except (OSError, UnicodeDecodeError):
        return []


def facts_of(output: Path) -> dict[str, Any]:
    """What the mark of ``output`` says of the run that has finished there; nothing if none has."""
    try:
        return facts_in_mark((output / MARK).read_bytes())
    except OSError:
        return {}


def files_of(output: Path, artifacts: Mapping[str, Sequence[str]]) -> list[str]:
    """Every file of a result; artifacts: names in ``output`` by their kind, ``.`` for a whole diffusers model."""
    found: list[str] = []
    for kind, names in artifacts.items():
        for name in names if kind not in LEFT else ():
            places = _parts(output) if name == "." else [output / name]
            for place in places:
                inside = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
                found += [path.relative_to(output).as_posix() for path in inside]
    return found


def all_files(output: Path) -> set[Path]:
    """What lies in ``output``, at any depth.

    The folder of a checkpoint may be gone when it is to be looked into: one is being written. Path.rglob would fail.
    """
    return {Path(folder, name) for folder, _, names in os.walk(output) for name in names}


def remove_result(output: Path) -> None:
    """Take away the result that the mark of ``output`` lists, and nothing else."""
    for name in files_in_mark(output):
        file = output / name
        if file.resolve().is_relative_to(output.resolve()):
            file.unlink(missing_ok=True)
            if file.parent != output and file.parent.is_dir() and not any(file.parent.iterdir()):
                file.parent.rmdir()
    write_mark(output, ())


def _parts(output: Path) -> list[Path]:
    """A diffusers model: its index, and the folders of its parts."""
    index = json.loads((output / "model_index.json").read_text(encoding="utf-8"))
    return [output / "model_index.json", *(output / name for name in index if (output / name).is_dir())]


def was_drawn(name: str) -> bool:
    """A curve, a sample or the card, by its name in a bucket."""
    top, _, rest = name.partition("/")
    return name == CARD_FILE or (
        fnmatch(rest, CURVES) and "/" not in rest if top == LOGS else top == SAMPLES and fnmatch(rest, "step-*/*")
    )


def remove_what_was_drawn(output: Path) -> None:
    """The curves, samples and card of an earlier run, and nothing else that may lie there."""
    (output / CARD_FILE).unlink(missing_ok=True)
    for curve in (output / LOGS).glob(CURVES):
        curve.unlink()
    for drawn in (output / SAMPLES).glob("step-*"):
        shutil.rmtree(drawn)
