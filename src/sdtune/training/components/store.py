"""Base models out of Cloud Storage, as copies on this machine's own disk.

The one module of the trainer that knows Google, and only where an address asks for it: without one the training
process needs no client library.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, TypeAlias

from sdtune import events
from sdtune.errors import ProjectError, TrainingError
from sdtune.methods import base_models
from sdtune.methods.base_models import BUCKETS, CHECKPOINTS, BaseModel, files_to_load, locate_base_model
from sdtune.methods.fields import CommonFields
from sdtune.training.components.files import publish

AT_ONCE = 4
"""Files. Google's own transfer_manager says that threads gain nothing on the parts of one file, and processes would
each import this program anew."""
BLOCK = 1 << 23


def base_model_here(method: CommonFields) -> BaseModel:
    """The base model as this process loads it: an id as it is, all else as a folder or file on this disk.

    TrainingError, RecipeError: it cannot be had, and why. ProjectError: no access to Cloud Storage at all.
    """
    found = locate_base_model(method.base_model, method.revision)
    if found.note:
        events.emit(events.Note(found.note, "warning"))
    if found.name.startswith(BUCKETS):
        return replace(found, path=_copied(found.name, _list_bucket(found.name)))
    if found.path and found.path.is_relative_to(base_models.MOUNT):
        # A weights file is read at random, which FUSE is slow at; from beginning to end it is not.
        return replace(found, path=_copied(str(found.path), _list_mount(found.path)))
    return found


Write: TypeAlias = Callable[[bytes], None]


@dataclass(frozen=True)
class _Original:
    """A file to copy.

    name: in the model's folder, or of the file that is the model. version: another one where the content is another.
    """

    name: str
    size: int
    version: str
    copy_to: Callable[[Write, Event], None]


class _StopError(Exception):
    """Ends the thread that copies a file."""


def _copied(address: str, originals: Sequence[_Original]) -> Path:
    """The copy of a model in the cache, made where it is not there yet. Each file is whole or not there.

    A changed model is another folder: a run that still reads the old one is not disturbed. Any of them may be deleted.
    """
    key = json.dumps([address, sorted((original.name, original.version) for original in originals)])
    last = re.sub(r"[^\w.-]", "_", address.rpartition("/")[2])
    folder = _cache() / f"{last}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    try:
        if missing := [original for original in originals if not (folder / original.name).is_file()]:
            _check_space(folder, sum(original.size for original in missing))
            _copy(address, missing, folder)
    except OSError as error:
        raise TrainingError(
            f"base_model: {address} cannot be copied to {folder} ({error.strerror or error}); "
            "set SDTUNE_CACHE to a folder on a disk with room for it."
        ) from None
    return folder / originals[0].name if len(originals) == 1 else folder


def _cache() -> Path:
    given = os.environ.get("SDTUNE_CACHE")
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "sdtune") / "base-models"


def _check_space(folder: Path, wanted: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(f"it takes {_megabytes(wanted):,} MB, and {_megabytes(free):,} MB are free")


def _megabytes(size: int) -> int:
    return math.ceil(size / 1_000_000)


def _copy(address: str, originals: Sequence[_Original], folder: Path) -> None:
    """Copy all of them, several at once, and tell how far it has come."""
    total = sum(original.size for original in originals)
    events.emit(events.Phase("fetch", f"Fetching the base model from {address}, {_megabytes(total):,} MB"))
    copied = dict.fromkeys([original.name for original in originals], 0)
    stop = Event()

    def copy(original: _Original) -> None:
        with publish(folder / original.name) as temporary, temporary.open("wb") as stream:

            def write(data: bytes) -> None:
                if stop.is_set():
                    raise _StopError
                stream.write(data)
                copied[original.name] += len(data)

            original.copy_to(write, stop)
            if copied[original.name] != original.size:
                raise TrainingError(
                    f"base_model: {address}: of {original.name}, {copied[original.name]} bytes came instead of "
                    f"{original.size}; has it been changed meanwhile? Start again."
                )

    with ThreadPoolExecutor(AT_ONCE) as pool:
        running: set[Future[None]] = {pool.submit(copy, original) for original in originals}
        try:
            while running:
                done, running = wait(running, timeout=1)
                for future in done:
                    future.result()
                events.emit(events.Progress("fetch", _megabytes(sum(copied.values())), _megabytes(total)))
        except BaseException:  # Ctrl-C must not wait for gigabytes
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# --- where a bucket is mounted ---------------------------------------------------------------------------------------


def _list_mount(path: Path) -> list[_Original]:
    with _readable(path):
        if path.is_file():
            return [_mounted(path, path.name)]
        files = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        return [_mounted(path / name, name) for name in files_to_load(str(path), files)]


def _mounted(file: Path, name: str) -> _Original:
    status = file.stat()

    def copy_to(write: Write, stop: Event) -> None:
        for block in _blocks(file):
            write(block)

    return _Original(name, status.st_size, f"{status.st_size} {status.st_mtime_ns}", copy_to)


def _blocks(file: Path) -> Iterator[bytes]:
    with _readable(file), file.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"base_model: {path} cannot be read: {error.strerror or error}.") from None


# --- a bucket --------------------------------------------------------------------------------------------------------


def _list_bucket(address: str) -> list[_Original]:
    """The files of a model there: one request, and one more per 1,000 objects in the folder."""
    try:
        from google.cloud import storage
    except ImportError:
        raise ProjectError(
            f"base_model: {address} is read by google-cloud-storage, which this Python does not have; install it with: "
            "pip install google-cloud-storage"
        ) from None
    bucket, _, path = address.removeprefix(BUCKETS).partition("/")
    with _explained(address):
        client = storage.Client()
        if path.endswith(CHECKPOINTS):
            blob = client.bucket(bucket).get_blob(path)
            if blob is None:
                raise TrainingError(f"base_model: {address}: there is no such object; check bucket and path.")
            return [_stored(address, path.rpartition("/")[2], blob)]
        start = f"{path}/" if path else ""
        blobs = {blob.name.removeprefix(start): blob for blob in client.list_blobs(bucket, prefix=start)}
    if not blobs:
        raise TrainingError(f"base_model: {address}: there is nothing in this folder of the bucket; check the path.")
    return [_stored(address, name, blobs[name]) for name in files_to_load(address, blobs)]


def _stored(address: str, name: str, blob: Any) -> _Original:
    if blob.content_encoding:
        raise TrainingError(
            f"base_model: {address}: {name} is stored with Content-Encoding {blob.content_encoding}; "
            "upload it without compression."
        )
    return _Original(name, blob.size, str(blob.generation), partial(_download, address, name, blob))


def _download(address: str, name: str, blob: Any, write: Write, stop: Event) -> None:
    """One object, of the generation that was listed; the client takes up a broken connection where it was."""
    from google.cloud.storage.retry import DEFAULT_RETRY
    from google_crc32c import Checksum

    checksum, expected = Checksum(), blob.crc32c

    def checked(data: bytes) -> None:
        checksum.update(data)
        write(data)

    def worth_it(error: Exception) -> bool:
        return not stop.is_set() and bool(DEFAULT_RETRY._predicate(error))

    with _explained(address):
        # The client would check a whole answer, but not one that it took up again.
        retry = DEFAULT_RETRY.with_predicate(worth_it).with_delay(maximum=4)
        blob.download_to_file(SimpleNamespace(write=checked), checksum=None, retry=retry)
    if base64.b64encode(checksum.digest()).decode() != expected:
        raise TrainingError(f"base_model: {address}: {name} arrived damaged (its CRC32C is another); start again.")


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Google's errors in the user's terms."""
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth
    from requests import RequestException

    try:
        yield
    except auth.DefaultCredentialsError:
        raise ProjectError(
            f"base_model: {address} needs Google Cloud credentials, and there are none here; get some with: "
            "gcloud auth application-default login"
        ) from None
    except auth.RefreshError as error:
        raise ProjectError(
            f"base_model: {address}: the Google Cloud credentials are no longer taken ({error}); renew them with: "
            "gcloud auth application-default login"
        ) from None
    except (api.Forbidden, api.Unauthorized) as error:
        raise TrainingError(
            f"base_model: {address} may not be read ({error.message}); give this account the role "
            "roles/storage.objectViewer on the bucket."
        ) from None
    except api.NotFound as error:
        raise TrainingError(
            f"base_model: {address}: not found ({error.message}); check the name, and whether it has just been changed."
        ) from None
    except (api.GoogleAPIError, auth.GoogleAuthError, RequestException) as error:
        raise TrainingError(f"base_model: {address} cannot be fetched ({error}); is Cloud Storage in reach?") from None
