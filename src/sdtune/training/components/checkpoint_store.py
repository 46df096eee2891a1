"""Checkpoints in a bucket: whole objects, uploaded while training goes on, the manifest last; listed and fetched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock
from typing import Self

from sdtune.errors import ProjectError, SdtuneError
from sdtune.methods.resuming import MANIFEST, Manifest, name_of, step_of
from sdtune.training.components.checkpoint_files import read_manifest, steps_in
from sdtune.training.components.copying import SMALL, StopError, copy_missing
from sdtune.training.components.fetch import check_names
from sdtune.training.components.store import Asked, Folder

AT_ONCE = SMALL
"""Files, also large ones: Google's client keeps ten connections, and each of them is slower than the network."""
SECONDS_TO_RETRY = 300.0
"""The next checkpoint is under way by then."""
SECONDS_AFTER_SIGNAL = 15.0
"""A machine that is taken away gives half a minute."""


class CheckpointStore:
    """The folder ``address`` of a bucket, with one folder in it for each checkpoint."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._bucket = Folder(address, Asked("checkpoint", ProjectError, writing=True))

    def steps(self) -> list[int]:
        """Of the checkpoints that have a manifest there, the newest first."""
        return sorted((step for step, names in self._names().items() if MANIFEST in names), reverse=True)

    def manifest(self, step: int) -> Manifest | None:
        """None if there is none that is right. RecipeError: of another version of sdtune."""
        content = self._bucket.read(f"{name_of(step)}/{MANIFEST}")
        manifest = Manifest.of(content) if content is not None else None
        return manifest if manifest and manifest.step == step else None

    def fetch(self, step: int, manifest: Manifest, folder: Path) -> None:
        """Copy a checkpoint to ``folder``, its manifest last. SdtuneError: it could not be had whole."""
        inside = f"{name_of(step)}/"
        blobs = self._bucket.files(inside)
        check_names(self.address, blobs, "checkpoint")
        originals = [self._bucket.original(name, blob) for name, blob in blobs.items()]
        what = f"the checkpoint of step {step}"
        wanted = [original for original in originals if original.name.removeprefix(inside) in manifest.files]
        # The disk is not waited for: their hashes are looked at next, and they are still in the bucket.
        copy_missing("checkpoint", what, self.address, wanted, folder.parent, AT_ONCE)
        if wanted:
            (folder / MANIFEST).write_bytes(manifest.to_bytes())

    def upload(self, step: int, folder: Path, stop: Event) -> None:
        """Upload a checkpoint of this machine, its manifest last."""

        def put(name: str) -> None:
            file = folder / name
            self._bucket.upload(f"{name_of(step)}/{name}", file, file.stat().st_size, SECONDS_TO_RETRY, stop)

        manifest = read_manifest(folder)
        assert manifest
        with ThreadPoolExecutor(AT_ONCE) as pool:
            # The largest first, so that none is left alone at the end.
            list(pool.map(put, sorted(manifest.files, key=lambda name: -manifest.files[name][0])))
        put(MANIFEST)

    def remove_others(self, keep: Iterable[int]) -> None:
        """Take away all checkpoints but these: the manifests first, so that half of one is none."""
        kept = set(keep)
        others = {step: names for step, names in self._names().items() if step not in kept}
        gone = [f"{name_of(step)}/{name}" for step, names in others.items() for name in names]
        for are_manifests in (True, False):
            if now := [name for name in gone if name.endswith(f"/{MANIFEST}") is are_manifests]:
                self._bucket.delete(now)

    def _names(self) -> dict[int, list[str]]:
        """By step, the names of the objects of what is, or was to be, a checkpoint."""
        found: dict[int, list[str]] = {}
        for name in self._bucket.files("step-"):
            folder, _, file = name.partition("/")
            if (step := step_of(folder)) is not None and file:
                found.setdefault(step, []).append(file)
        return found


class Uploads:
    """Uploads one checkpoint at a time in the background, and the newest next.

    folder: where they are on this machine. limit: so many are kept in the bucket. warn: is told what went wrong; the
    run goes on, and the next checkpoint is tried.
    """

    def __init__(self, store: CheckpointStore, folder: Path, limit: int, warn: Callable[[str], None]) -> None:
        self.address = store.address
        self._store, self._folder, self._limit, self._warn = store, folder, limit, warn
        self._there = set(store.steps())
        self._pool = ThreadPoolExecutor(1)
        self._hurry = Event()
        self._lock = Lock()
        self._next: int | None = None
        self._now: int | None = None
        self._busy = False
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.drain(SECONDS_AFTER_SIGNAL)
        self._hurry.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, newest: int) -> None:
        """Take away all that is newer than ``newest``: it is damaged, or another run's."""
        self._there = {step for step in self._there if step <= newest}
        self._store.remove_others(self._there)

    def put(self, step: int) -> None:
        """Upload the checkpoint of ``step``; one that waits for its turn makes room for it."""
        with self._lock:
            self._next = step
            if not self._busy:
                self._busy, self._running = True, self._pool.submit(self._upload_all)

    @property
    def needed(self) -> set[int]:
        """The steps whose files on this machine are being read, or will be."""
        with self._lock:
            return {step for step in (self._now, self._next) if step is not None}

    def drain(self, seconds: float = math.inf) -> None:
        """Wait for what is on its way, so many seconds at most."""
        end = time.monotonic() + seconds
        while (running := self._running) and not running.done():
            # In turns, so that a signal is heard.
            wait([running], timeout=0.2)
            if time.monotonic() > end:
                self._warn(f"{seconds:.0f} s were not enough to upload a checkpoint to {self._store.address}.")
                return

    def clear(self) -> None:
        """Take all away from the bucket; what is on its way is not waited for longer than it takes to stop it."""
        with self._lock:
            self._next = None
        self._hurry.set()
        self.drain(SECONDS_TO_RETRY)
        self._store.remove_others(())
        self._there.clear()

    def _upload_all(self) -> None:
        while True:
            with self._lock:
                self._now, self._next = self._next, None
                step = self._now
                self._busy = step is not None
            if step is None:
                return
            try:
                self._store.upload(step, self._folder / name_of(step), self._hurry)
                self._there.add(step)
                newest = sorted(self._there, reverse=True)[: self._limit]
                self._store.remove_others(newest)
                self._there = set(newest)
            except StopError:
                self._warn(f"The checkpoint of step {step} was not uploaded any more.")
            except (SdtuneError, OSError) as error:
                kept = f"; the newest there is that of step {max(self._there)}" if self._there else ""
                self._warn(f"The checkpoint of step {step} could not be uploaded{kept}. {error}")


def newest_first(folder: Path, store: CheckpointStore | None) -> list[int]:
    """The steps of all checkpoints, of this machine and of the bucket."""
    return sorted({*steps_in(folder), *(store.steps() if store else ())}, reverse=True)
