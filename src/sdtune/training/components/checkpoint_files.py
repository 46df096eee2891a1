"""Checkpoints as folders on a disk: found, checked, removed. A folder without a manifest that is right is none.

Reading and writing what is in them is checkpoint_state.py's; a launcher that has no torch could use this file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from sdtune.methods import places
from sdtune.methods.resuming import MANIFEST, Manifest, name_of, step_of

AT_ONCE = min(16, 2 * (os.cpu_count() or 1))
"""Files at once while all wait for them. A core hashes 0.4 to 2 GB/s; twice as many, because most wait for the disk."""
BLOCK = 4 * 2**20
"""Bytes that are hashed in one call: long enough that threads are not kept waiting for the interpreter's lock."""

_LEFT_OVER = re.compile(r"\.step-\d+\.(partial|old)-\d+")
Item = TypeVar("Item")
Found = TypeVar("Found")


class StoppedError(Exception):
    """Ends the threads that write a checkpoint which is wanted no more."""


class Disk:
    """What a checkpoint is written with, by several threads at once. Every call may raise OSError, and whatever was
    published before stays.

    durable: what was written is there after the power failed, which waits for the disk.
    """

    durable = True

    def make(self, folder: Path) -> None:
        """A new, empty folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def write(self, file: Path, content: Iterable[bytes | memoryview]) -> tuple[int, str]:
        """Write a file, and wait until the disk has it; its size and its SHA-256.

        content: each piece is gone when the next is asked for.
        """
        size, digest = 0, hashlib.sha256()
        with file.open("xb") as stream:
            for piece in content:
                size += stream.write(piece)
                digest.update(piece)
            stream.flush()
            if self.durable:
                os.fsync(stream.fileno())
        return size, digest.hexdigest()

    def copy(self, source: Path, target: Path) -> None:
        """One whole file, from beginning to end, as a mounted bucket wants it."""
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """A folder, at once."""
        if self.durable:
            _wait_for(source)
        source.rename(target)
        if self.durable:
            _wait_for(target.parent)

    def remove(self, folder: Path) -> None:
        """A folder with all that is in it; half of it is no checkpoint at any moment, and does not look like one."""
        # A mounted bucket renames nothing at once.
        if folder.is_relative_to(places.MOUNT) or _LEFT_OVER.fullmatch(folder.name):
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)
            return
        hidden = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


class ShortLivedDisk(Disk):
    """For files that nobody looks for once the process has ended, as those of a run into a bucket: no waiting."""

    durable = False


DISK = Disk()


def _wait_for(folder: Path) -> None:
    """Until the disk knows the names in it."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def in_threads(
    function: Callable[[Item], Found], items: Sequence[Item], threads: int, fails: Callable[[], object] = bool
) -> list[Found]:
    """What ``function`` gives of each item, in their order, by so many threads, none of which runs any more then.

    fails: called when one has failed or a signal came, so that the others may end. The error raised is the first that
    is none of their StoppedErrors.
    """
    with ThreadPoolExecutor(max(1, min(threads, len(items)))) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            _, running = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            fails()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if running:
            fails()
            pool.shutdown(wait=False, cancel_futures=True)
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    if errors:
        raise next((error for error in errors if not isinstance(error, StoppedError)), errors[0])
    return [future.result() for future in futures]


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


def damage(folder: Path, manifest: Manifest, threads: int = AT_ONCE) -> str | None:
    """What is wrong with the files of a checkpoint, ending the sentence "The checkpoint ..."; None if nothing is."""

    def wrong(name: str) -> str | None:
        size, digest = manifest.files[name]
        file = folder / name
        try:
            found = file.stat().st_size
            if found != size:
                return f"is damaged: {name} has {found:,} bytes and had {size:,}"
            if _sha256(file) != digest:
                return f"is damaged: the content of {name} is not what was written"
        except FileNotFoundError:
            return f"is not whole: {name} is missing"
        except OSError as error:
            return f"cannot be read: {name}: {error.strerror or error}"
        return None

    return next(filter(None, in_threads(wrong, list(manifest.files), threads)), None)


def _sha256(file: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(min(BLOCK, file.stat().st_size)))
    with file.open("rb", buffering=0) as stream:
        while read := stream.readinto(block):
            digest.update(block[:read])
    return digest.hexdigest()


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
