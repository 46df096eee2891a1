"""Copies on this machine's own disk of what lies in a bucket: several files at once, each whole or not there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TypeAlias

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.training.components.files import publish

LARGE, SMALL = 4, 8
"""Files at once. Google's own transfer_manager says that threads gain nothing on the parts of one large file, and
processes would each import this program anew; small files wait for answers more than for bytes. Its client keeps ten
connections."""

Write: TypeAlias = Callable[[bytes], object]


@dataclass(frozen=True)
class Original:
    """A file to copy.

    name: in its folder, or of the file alone. version: another one where the content is another.
    copy_to: hands its bytes over, piece by piece; gives up trying again once the event is set.
    """

    name: str
    size: int
    version: str
    copy_to: Callable[[Write, Event], None]


class StopError(Exception):
    """Ends the thread that copies a file."""


def cache(kind: str) -> Path:
    """Where copies of one kind are kept: SDTUNE_CACHE, or ~/.cache/sdtune. Any of them may be deleted."""
    given = os.environ.get("SDTUNE_CACHE")
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "sdtune") / kind


def key_of(address: str, originals: Iterable[Original]) -> str:
    """Another one where a file is another: a run that still reads the old copy is not disturbed."""
    key = json.dumps([address, sorted((original.name, original.version) for original in originals)])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def last_name(address: str) -> str:
    """The last part of an address, as a name for a file."""
    return re.sub(r"[^\w.-]", "_", address.rpartition("/")[2])


def copy_missing(
    setting: str, what: str, address: str, originals: Sequence[Original], folder: Path, at_once: int = LARGE
) -> None:
    """Copy what is not in ``folder`` yet, and tell how far it has come.

    setting: that named the address, for errors; what: it is, for people. TrainingError: a file cannot be had whole, or
    the disk does not take it.
    """
    try:
        if missing := [original for original in originals if not _is_there(folder / original.name, original.size)]:
            _check_space(folder, sum(original.size for original in missing))
            _copy(setting, what, address, missing, folder, at_once)
    except OSError as error:
        raise TrainingError(
            f"{setting}: {address} cannot be copied to {folder} ({error.strerror or error}); "
            "set SDTUNE_CACHE to a folder on a disk with room for it."
        ) from None


def _is_there(copy: Path, size: int) -> bool:
    return copy.is_file() and copy.stat().st_size == size


def _check_space(folder: Path, wanted: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(f"it takes {megabytes(wanted):,} MB, and {megabytes(free):,} MB are free")


def megabytes(size: int) -> int:
    """Of so many bytes, rounded up."""
    return math.ceil(size / 1_000_000)


def _copy(setting: str, what: str, address: str, originals: Sequence[Original], folder: Path, at_once: int) -> None:
    total = sum(original.size for original in originals)
    events.emit(events.Phase("fetch", f"Fetching {what} from {address}, {megabytes(total):,} MB"))
    copied = dict.fromkeys([original.name for original in originals], 0)
    stop = Event()

    def copy(original: Original) -> None:
        # Waiting for the disk after each of thousands of small files would take longer than fetching them.
        with publish(folder / original.name, durable=at_once == LARGE) as temporary, temporary.open("wb") as stream:

            def write(data: bytes) -> None:
                if stop.is_set():
                    raise StopError
                stream.write(data)
                copied[original.name] += len(data)

            original.copy_to(write, stop)
            if copied[original.name] != original.size:
                raise TrainingError(
                    f"{setting}: {address}: of {original.name}, {copied[original.name]} bytes came instead of "
                    f"{original.size}; has it been changed meanwhile? Start again."
                )

    with ThreadPoolExecutor(at_once) as pool:
        running: set[Future[None]] = {pool.submit(copy, original) for original in originals}
        try:
            while running:
                done, running = wait(running, timeout=1)
                for future in done:
                    future.result()
                events.emit(events.Progress("fetch", megabytes(sum(copied.values())), megabytes(total)))
        except BaseException:  # Ctrl-C must not wait for gigabytes
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
