"""The files of a result, listed in the mark of their folder: the next run there takes away what it does not replace."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sdtune import __version__
from sdtune.methods.base import MARK
from sdtune.training.components.files import publish

LEFT = ("tensorboard",)
"""Kinds of artifacts that a run takes away at its start."""


def write_mark(output: Path, files: Iterable[str]) -> None:
    """Mark ``output`` as ours; files: those of the result in it, relative to it."""
    lines = [f"The output of a run of sdtune {__version__}.", *sorted(files)]
    with publish(output / MARK) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def files_in_mark(output: Path) -> list[str]:
    """The files of the result that lies in ``output``, as far as its mark knows."""
    try:
        return (output / MARK).read_text(encoding="utf-8").splitlines()[1:]
    except (OSError, UnicodeDecodeError):
        return []


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
