"""Checkpoints as folders on a disk: found, checked, removed. A folder without a manifest that is right is none.

Reading and writing what is in them is checkpoint_state.py's; a launcher that has no torch could use this file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from sdtune.methods.resuming import MANIFEST, Manifest, name_of, step_of

_LEFT_OVER = re.compile(r"\.step-\d+\.(partial|old)-\d+")


class Disk:
    """What a checkpoint is written with. Every call may raise OSError, and whatever was published before stays."""

    def make(self, folder: Path) -> None:
        """A new, empty folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def write(self, file: Path, content: Iterable[bytes | memoryview]) -> tuple[int, str]:
        """Write a file, and wait until the disk has it; its size and its SHA-256."""
        size, digest = 0, hashlib.sha256()
        with file.open("xb") as stream:
            for piece in content:
                size += stream.write(piece)
                digest.update(piece)
            stream.flush()
            os.fsync(stream.fileno())
        return size, digest.hexdigest()

    def copy(self, source: Path, target: Path) -> None:
        """One whole file, from beginning to end, as a mounted bucket wants it."""
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """A folder, at once."""
        source.rename(target)
        parent = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)

    def remove(self, folder: Path) -> None:
        """A folder with all that is in it; without its manifest first, so that half of it is no checkpoint."""
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


DISK = Disk()


def steps_in(folder: Path) -> list[int]:
    """The steps of what looks like a checkpoint in ``folder``, the newest first."""
    if not folder.is_dir():
        return []
    steps = [step_of(entry.name) for entry in folder.iterdir() if entry.is_dir()]
    return sorted((step for step in steps if step is not None), reverse=True)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; None if there is none that is right. RecipeError: of another version."""
    try:
        manifest = Manifest.of((folder / MANIFEST).read_bytes())
    except OSError:
        return None
    return manifest if manifest and name_of(manifest.step) == folder.name else None


def damage(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with the files of a checkpoint, ending the sentence "The checkpoint ..."; None if nothing is."""
    for name, (size, digest) in manifest.files.items():
        file = folder / name
        try:
            found = file.stat().st_size
            if found != size:
                return f"is damaged: {name} has {found:,} bytes and had {size:,}"
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                    return f"is damaged: the content of {name} is not what was written"
        except FileNotFoundError:
            return f"is not whole: {name} is missing"
        except OSError as error:
            return f"cannot be read: {name}: {error.strerror or error}"
    return None


def remove_others(folder: Path, keep: Iterable[int], disk: Disk = DISK) -> None:
    """Take away all checkpoints in ``folder`` but these, and what is left of such as were never finished."""
    kept = {name_of(step) for step in keep}
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name in kept or not entry.is_dir():
            continue
        if step_of(entry.name) is not None or _LEFT_OVER.fullmatch(entry.name):
            disk.remove(entry)
    if not kept and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
