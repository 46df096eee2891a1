"""A run's folder on its way into a bucket: whole objects, uploaded in the background while the run goes on.

A run writes to a folder of this machine's disk. A file of the result is uploaded when the run tells it, curves and
samples every minute, and the recipe last: a folder that has one holds a finished run, in a bucket as on a disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Self

from sdtune import events
from sdtune.errors import ProjectError, PublishError, SdtuneError
from sdtune.methods.base import MARK
from sdtune.training.components.copying import LARGE, StopError
from sdtune.training.components.files import publish
from sdtune.training.components.store import Asked, Folder

SECONDS_BETWEEN_UPLOADS = 60.0
"""Of curves and samples."""
SECONDS_TO_RETRY = 600.0
"""What a run has made is lost with its machine, so that an upload is not given up easily."""
SECONDS_AFTER_ERROR, SECONDS_AFTER_SIGNAL = 60.0, 15.0
"""For what a run that ends early has made by then. A machine that is taken away gives half a minute."""

CURVES = "events.out.tfevents.*"
DRAWN = (f"logs/{CURVES}", "samples/**/*", "class_pictures/**/*", "cache/torch/*")
"""What grows while a run goes. The last: what --torch-compile has made, for a process that goes on from here."""
OFFLINE = ("logs/wandb/offline-run-*/**/*",)
"""What Weights & Biases keeps for a later ``wandb sync``; whole at the end alone."""


class Outbox:
    """Uploads files of ``folder`` to ``address``, where they have the same names.

    drawn: patterns of what is uploaded every minute. needed: the run fails if the result cannot be uploaded; without,
    that is a warning.
    """

    def __init__(self, folder: Path, address: str, drawn: Iterable[str] = DRAWN, *, needed: bool = True) -> None:
        self.folder, self.address, self.needed = folder, address, needed
        self._drawn = tuple(drawn)
        # Before anything of the run exists: whoever may not write is told at once, with the role that is missing.
        self._bucket = Folder(address, Asked("output", ProjectError, writing=True))
        self._pool = ThreadPoolExecutor(LARGE)
        self._waiting: dict[str, Future[None]] = {}
        self._running: set[str] = set()
        self._again: set[str] = set()
        self._lock = Lock()
        self._sent: dict[str, tuple[int, int]] = {}
        self._hurry, self._ended = Event(), Event()
        self._warned = False
        self._clock = Thread(target=self._upload_now_and_then, daemon=True)

    def __enter__(self) -> Self:
        self._clock.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._ended.set()
        try:
            if error is not None and not isinstance(error, PublishError):
                # Curves and samples of a run that failed tell why.
                self.send(self._files(self._drawn))
                self._drain(SECONDS_AFTER_SIGNAL if isinstance(error, KeyboardInterrupt) else SECONDS_AFTER_ERROR)
        except PublishError as failed:
            self._warn(failed)
        finally:
            self._hurry.set()
            self._pool.shutdown(wait=False, cancel_futures=True)

    # --- what an earlier run left -------------------------------------------------------------------------------------

    def fetch_mark(self) -> None:
        """Bring the mark that an earlier run left there, which lists its files."""
        if (mark := self._bucket.read(MARK)) is not None:
            (self.folder / MARK).write_bytes(mark)
        # Class pictures were fetched from there, and are not sent back.
        for name, blob in self._bucket.files("class_pictures/").items():
            file = self.folder / name
            if file.is_file() and file.stat().st_size == blob.size:
                self._sent[name] = _state(file)

    def bring(self, names: Iterable[str]) -> None:
        """Bring small files that an earlier process of this run left there, as far as they are there."""
        for name in names:
            file = self.folder / name
            if not file.is_file() and (content := self._bucket.read(name)) is not None:
                with publish(file, durable=False) as temporary:
                    temporary.write_bytes(content)
                self._sent[name] = _state(file)

    def remove(self, names: Iterable[str]) -> None:
        """Take these away; such as are not there are none the less gone."""
        self._bucket.delete(names)

    def names(self) -> list[str]:
        """All that lies there."""
        return list(self._bucket.files())

    # --- uploads ------------------------------------------------------------------------------------------------------

    def send(self, names: Iterable[str]) -> None:
        """Upload these files in the background, as they are when their turn comes."""
        for name in names:
            with self._lock:
                if name in self._running:
                    self._again.add(name)
                    continue
                self._running.add(name)
                self._waiting[name] = self._pool.submit(self._upload_until_unchanged, name)

    def is_sending(self, name: str) -> bool:
        """Whether an upload of that file is on its way or waits for its turn."""
        with self._lock:
            return name in self._running

    def send_now(self, name: str) -> None:
        """Upload one small file, and wait for it. ProjectError: it may not be written there."""
        self._upload(name)

    def finish(self) -> None:
        """Upload everything that was drawn, and wait until all is there.

        PublishError: something could not be uploaded; it is whole on this machine.
        """
        self._ended.set()
        self.send(self._files((*self._drawn, *OFFLINE)))
        # However long it takes: an upload that comes to nothing ends by itself.
        self._drain(math.inf)

    def _drain(self, seconds: float) -> None:
        """Wait for what is on its way, so many seconds at most."""
        end = time.monotonic() + seconds
        with self._lock:
            waiting = dict(self._waiting)
        while left := [future for future in waiting.values() if not future.done()]:
            # In turns, so that a signal is heard.
            wait(left, timeout=0.2)
            if time.monotonic() > end:
                self._hurry.set()
                break
        failed = {
            name: future.exception() if future.done() else None
            for name, future in waiting.items()
            if not future.done() or future.exception()
        }
        with self._lock:
            self._waiting.clear()
        if not failed:
            return
        first, error = next(iter(failed.items()))
        if error is None or isinstance(error, StopError):
            why = f"output: {self.address}/{first}: {seconds:.0f} seconds were not enough."
        else:
            why = str(error) if isinstance(error, SdtuneError) else f"output: {self.address}/{first}: {error}."
        if not self.needed:
            self._warn(PublishError(why))
            return
        raise PublishError(
            f"{why} {len(failed)} file{'s' * (len(failed) > 1)} of this run, such as {first}, could not be uploaded to "
            f"{self.address}; on the machine of the run they are whole in {self.folder}."
        )

    def _upload_until_unchanged(self, name: str) -> None:
        """One upload of a name at a time, so that the newest content is what stays."""
        while True:
            try:
                self._upload(name)
            except BaseException:
                with self._lock:
                    self._running.discard(name)
                    self._again.discard(name)
                raise
            with self._lock:
                if name not in self._again:
                    self._running.discard(name)
                    return
                self._again.discard(name)

    def _upload(self, name: str) -> None:
        file = self.folder / name
        state = _state(file)
        if self._sent.get(name) != state:
            size = whole_size(file) if file.match(CURVES) else state[0]
            self._bucket.upload(name, file, size, SECONDS_TO_RETRY, self._hurry)
            self._sent[name] = state

    def _upload_now_and_then(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_UPLOADS):
            try:
                self.send(self._files(self._drawn))
            except RuntimeError:  # the pool was closed meanwhile
                return

    def _files(self, patterns: Iterable[str]) -> Iterator[str]:
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                if path.is_file() and not path.is_symlink() and ".partial-" not in path.name:
                    yield path.relative_to(self.folder).as_posix()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            events.emit(events.Note(str(error), "warning"))


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def whole_size(curve: Path) -> int:
    """How many bytes of an event file are whole records: TensorBoard may be writing the next one.

    A record: its length in 8 bytes, their checksum in 4, itself, its checksum in 4 (TFRecord).
    """
    size, whole = curve.stat().st_size, 0
    with curve.open("rb") as stream:
        while len(head := stream.read(12)) == 12:
            end = whole + 16 + int.from_bytes(head[:8], "little")
            if end > size:
                break
            whole = end
            stream.seek(whole)
    return whole
