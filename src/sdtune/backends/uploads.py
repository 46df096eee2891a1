"""Local files put into a bucket under an address that their content decides.

The same files have the same address, so that a second run finds them there, an interrupted one goes on where it was,
and a changed dataset never mixes with what another run still reads. Planning asks nothing of the network.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import mimetypes
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from google_crc32c import Checksum

from sdtune.errors import DatasetError, ProjectError, SdtuneError
from sdtune.methods.places import bucket_and_path
from sdtune.methods.threads import SECONDS_BETWEEN_REPORTS, in_threads

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Client

AT_ONCE = 16
"""Files. Where each answer takes 150 ms, 400 files of 1 MB took 9 s in 8 threads, 5 s in 16, and 3 s in 32; a thread
may hold 16 MB."""
BLOCK = 1 << 20
CHUNK = 1 << 23
"""Bytes that are sent again where the line broke. The client sends what is not larger in one request."""
LONGEST_WAIT = 120
"""Seconds for which a file is tried again: hours of sending should outlive a router's restart."""
LONGEST_NAME = 1024
"""Bytes of UTF-8, as Cloud Storage has it."""

THREAD = "sdtune-upload"
"""The name of every thread that sends."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to be in the bucket. name: in the folder there. md5, crc32c: in base64, as Cloud Storage writes them."""

    name: str
    place: Path
    size: int
    md5: str
    crc32c: str


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What an upload came to. files: all; the rest of them was sent.

    address: of the folder, or of the one file. skipped: files that were there. copied: files that an older version had.
    """

    address: str
    files: int
    bytes_sent: int
    skipped: int
    copied: int


@dataclass(frozen=True, slots=True)
class Upload:
    """A planned upload.

    address: as a recipe gives it, of the folder or of the one file. folder: where the files will be, which their
    content decides. older: what the folders of all versions begin with.
    """

    source: Path
    address: str
    folder: str
    older: str
    files: tuple[LocalFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def run(self, client: Client, progress: Progress | None = None) -> Uploaded:
        """Put into the bucket what is not there yet, and look whether all of it is there then.

        progress: called with (bytes done, bytes in all), at most ten times a second.
        DatasetError: a file is not any more what it was when this was planned. ProjectError: the bucket.
        """
        return _Run(self, client, progress or (lambda done, total: None)).run()


def plan_upload(source: Path, prefix: str, names: Sequence[str]) -> Upload:
    """The upload of the files ``names`` of the folder ``source`` to below the address ``prefix``, gs://bucket/path.

    ``source`` may be a file as well; names is then its name alone. Every file is read once.
    """
    folder = source if source.is_dir() else source.parent
    files = tuple(in_threads(lambda name: _read(folder, name), sorted(set(names))))
    if not files:
        raise DatasetError(f"{source}: there is nothing to upload.")
    key = hashlib.sha256(json.dumps([(file.name, file.size, file.md5) for file in files]).encode()).hexdigest()[:16]
    # Characters that gcloud's wildcards or a web address would take for their own.
    stem = re.sub(r"[^\w.-]", "_", source.resolve().name)
    older = f"{prefix}/{stem}-"
    _, start = bucket_and_path(f"{older}{key}/")
    for file in files:
        if len((start + file.name).encode()) > LONGEST_NAME:
            raise DatasetError(f"{source}: the name of {file.name} is too long for Cloud Storage; shorten it.")
    address = older + key if source.is_dir() else f"{older}{key}/{files[0].name}"
    return Upload(source, address, older + key, older, files)


def _read(folder: Path, name: str) -> LocalFile:
    place = folder / name
    if not Path(os.path.realpath(place)).is_relative_to(folder.resolve()):  # Path.resolve raises at a link to itself
        raise DatasetError(f"{folder}: {name} leads out of the folder; put the file itself there.")
    return _hashed(name, place)


def _hashed(name: str, place: Path) -> LocalFile:
    """A file with both hashes, from one go over it."""
    md5, crc32c, size = hashlib.md5(usedforsecurity=False), Checksum(), 0
    try:
        with place.open("rb") as stream:
            while block := stream.read(BLOCK):
                md5.update(block)
                crc32c.update(block)
                size += len(block)
    except OSError as error:
        raise DatasetError(f"{place} cannot be read ({error.strerror or error}).") from None
    return LocalFile(name, place, size, _base64(md5.digest()), _base64(crc32c.digest()))


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


# --- running one -----------------------------------------------------------------------------------------------------


class _StopError(Exception):
    """Ends the thread that uploads a file."""


class _Stream(io.BufferedReader):
    """A file that tells how far it has been read, and ends where the upload is to stop."""

    def __init__(self, file: LocalFile, done: dict[str, int], stop: Event) -> None:
        super().__init__(io.FileIO(file.place))
        self._of, self._done, self._stop = file, done, stop

    def read(self, size: int | None = -1, /) -> bytes:
        if self._stop.is_set():
            raise _StopError
        data = super().read(size)
        self._done[self._of.name] = min(self.tell(), self._of.size)
        return data


@dataclass(frozen=True, slots=True)
class _Task:
    """A file that is not there. replaces: the generation of what is, or 0. version: an object with the same bytes."""

    file: LocalFile
    replaces: int
    version: Blob | None


class _Run:
    """One run of an upload; its state lives as long as the run."""

    def __init__(self, upload: Upload, client: Client, progress: Progress) -> None:
        self.upload, self.client, self.progress = upload, client, progress
        name, path = bucket_and_path(upload.folder)
        self.bucket = client.bucket(name)
        self.start = f"{path}/"
        self.done: dict[str, int] = {}
        self.stop = Event()

    def run(self) -> Uploaded:
        files = self.upload.files
        there = self._list(self.start)
        tasks = self._plan(there)
        # The largest first, so that none of them is left for the end.
        self._do(sorted(tasks, key=lambda task: -task.file.size))
        self._check(self._list(self.start) if tasks else there)
        sent = sum(task.file.size for task in tasks if task.version is None)
        copied = sum(task.version is not None for task in tasks)
        return Uploaded(self.upload.address, len(files), sent, len(files) - len(tasks), copied)

    def _list(self, prefix: str) -> dict[str, Blob]:
        from sdtune.backends.storage import FIELDS, RETRY, WRITER, explained

        with explained(self.upload.folder, WRITER):
            blobs = self.client.list_blobs(self.bucket, prefix=prefix, fields=FIELDS, retry=RETRY)
            return {blob.name: blob for blob in blobs if not blob.name.endswith("/")}

    def _plan(self, there: Mapping[str, Blob]) -> list[_Task]:
        """What is to be done; older versions are listed only if anything is."""
        missing = []
        for file in self.upload.files:
            if (blob := there.get(self.start + file.name)) and _same(blob, file):
                self.done[file.name] = file.size
            else:
                missing.append((file, blob.generation if blob else 0))
        if not missing:
            return []
        _, older = bucket_and_path(self.upload.older)
        versions = {blob.md5_hash: blob for blob in self._list(older).values() if blob.md5_hash}
        tasks = []
        for file, replaces in missing:
            version = versions.get(file.md5)
            tasks.append(_Task(file, replaces, version if version and _same(version, file) else None))
        return tasks

    def _do(self, tasks: Sequence[_Task]) -> None:
        """All of them, several at once. The threads are daemons: Ctrl-C waits for no one's line."""
        waiting: SimpleQueue[_Task] = SimpleQueue()
        ended: SimpleQueue[BaseException | None] = SimpleQueue()
        for task in tasks:
            waiting.put(task)

        def work() -> None:
            while not self.stop.is_set():
                try:
                    self._one(waiting.get_nowait())
                except Empty:
                    return
                except BaseException as error:  # noqa: BLE001  raised below
                    ended.put(error)
                else:
                    ended.put(None)

        for _ in range(min(AT_ONCE, len(tasks))):
            Thread(target=work, name=THREAD, daemon=True).start()
        left, reported = len(tasks), 0.0
        try:
            while left:
                with suppress(Empty):
                    if error := ended.get(timeout=SECONDS_BETWEEN_REPORTS):
                        raise error
                    left -= 1
                if time.monotonic() - reported >= SECONDS_BETWEEN_REPORTS:
                    reported = time.monotonic()
                    self.progress(sum(self.done.copy().values()), self.upload.size)
        finally:
            self.stop.set()
        self.progress(self.upload.size, self.upload.size)

    def _one(self, task: _Task) -> None:
        """Copy a file inside the bucket, or send it."""
        from google.api_core import exceptions as api

        from sdtune.backends.storage import RETRY, WRITER, explained

        def worth_it(error: Exception) -> bool:
            return not self.stop.is_set() and bool(RETRY._predicate(error))

        file = task.file
        blob = self.bucket.blob(self.start + file.name, chunk_size=CHUNK)
        try:
            with explained(self.upload.folder, WRITER, let_through=(api.PreconditionFailed, api.BadRequest)):
                if task.version is None or not _copy(task.version, blob, task.replaces):
                    self._send(file, blob, task.replaces, RETRY.with_predicate(worth_it).with_timeout(LONGEST_WAIT))
        except api.PreconditionFailed:
            # Written meanwhile: by another run, or by this very request, whose answer was lost. _check() looks at it.
            pass
        except (api.BadRequest, OSError, ValueError) as error:  # ValueError: it has become shorter
            raise self._refused(file, error) from None
        else:
            if not _same(blob, file):
                with explained(self.upload.folder, WRITER, let_through=(api.NotFound,)), suppress(api.NotFound):
                    blob.delete(if_generation_match=blob.generation)
                raise self._refused(file, "other bytes arrived")
        self.done[file.name] = file.size

    def _send(self, file: LocalFile, blob: Blob, replaces: int, retry: Any) -> None:
        # The hashes of the plan go along: what has changed since, or does on its way, is not stored.
        blob.md5_hash, blob.crc32c = file.md5, file.crc32c
        kind, _ = mimetypes.guess_type(file.name)
        with _Stream(file, self.done, self.stop) as stream:
            if file.size > CHUNK:
                from sdtune.backends.resumable import PartedUpload

                PartedUpload(self.client, blob, file.size, replaces, CHUNK).send(stream, kind, retry)
                # Of the generation that is there now, with its hashes.
                blob.reload(retry=retry)
                return
            blob.upload_from_file(
                stream, size=file.size, content_type=kind, if_generation_match=replaces, checksum=None, retry=retry
            )

    def _refused(self, file: LocalFile, why: object) -> SdtuneError:
        """Whose fault it is that the bucket has not taken what was planned."""
        try:
            changed = _hashed(file.name, file.place) != file
        except DatasetError as error:
            return error
        if changed:
            return DatasetError(
                f"{file.place} has changed while it was uploaded; leave the files alone and start again."
            )
        return ProjectError(f"{self.upload.folder}: {file.name} was not taken ({why}); start again.")

    def _check(self, there: Mapping[str, Blob]) -> None:
        """All is there, and nothing else: a dataset is all that lies in its folder."""
        wanted = {self.start + file.name: file for file in self.upload.files}
        wrong = [file.name for name, file in wanted.items() if not (name in there and _same(there[name], file))]
        if wrong:
            raise ProjectError(
                f"{self.upload.folder}: {_some(wrong)} not what was sent; has someone else written there? Start again."
            )
        if strange := [name.removeprefix(self.start) for name in there if name not in wanted]:
            raise ProjectError(
                f"{self.upload.folder}: {_some(strange)} not of {self.upload.source}, and would be used too; "
                f"remove what is there with: gcloud storage rm --recursive {self.upload.folder}"
            )


def _same(blob: Blob, file: LocalFile) -> bool:
    """Composed objects have no MD5."""
    hashes_fit = blob.crc32c == file.crc32c and blob.md5_hash in (None, file.md5)
    return blob.size == file.size and hashes_fit and not blob.content_encoding


def _copy(version: Blob, blob: Blob, replaces: int) -> bool:
    """Whether the bucket has copied it: without, where the older version has just been removed."""
    from google.api_core import exceptions as api

    from sdtune.backends.storage import RETRY

    token = None
    try:
        while True:
            token, _, _ = blob.rewrite(version, token=token, if_generation_match=replaces, retry=RETRY)
            if token is None:
                return True
    except api.NotFound:
        return False


def _some(names: Sequence[str]) -> str:
    """dog/1.jpg is; dog/1.jpg and 12 more are."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
