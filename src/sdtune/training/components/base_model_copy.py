"""Base models on this machine's own disk: out of Cloud Storage, or from where Vertex AI mounts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods import base_models
from sdtune.methods.base_models import CHECKPOINTS, BaseModel, files_to_load, locate_base_model
from sdtune.methods.fields import CommonFields
from sdtune.methods.places import BUCKETS
from sdtune.training.components.copying import Original, Write, cache, copy_missing, key_of, last_name
from sdtune.training.components.store import Asked, Folder

SETTING = "base_model"
ASKED = Asked(SETTING)
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


def fetch_base_model(method: CommonFields) -> None:
    """Copy the base model out of its bucket before it is loaded: while libraries are imported."""
    found = locate_base_model(method.base_model, method.revision)
    if found.name.startswith(BUCKETS):
        _copied(found.name, _list_bucket(found.name))


def _copied(address: str, originals: Sequence[Original]) -> Path:
    """The copy of a model in the cache, made where it is not there yet."""
    folder = cache("base-models") / f"{last_name(address)}-{key_of(address, originals)}"
    copy_missing(SETTING, "the base model", address, originals, folder)
    return folder / originals[0].name if len(originals) == 1 else folder


# --- a bucket --------------------------------------------------------------------------------------------------------


def _list_bucket(address: str) -> list[Original]:
    """The files of a model there: one request, and one more per 1,000 objects in the folder."""
    if address.endswith(CHECKPOINTS):
        parent, _, name = address.rpartition("/")
        folder = Folder(parent, ASKED)
        blob = folder.find(name)
        if blob is None:
            raise TrainingError(f"base_model: {address}: there is no such object; check bucket and path.")
        return [folder.original(name, blob)]
    folder = Folder(address, ASKED)
    blobs = folder.files()
    if not blobs:
        raise TrainingError(f"base_model: {address}: there is nothing in this folder of the bucket; check the path.")
    return [folder.original(name, blobs[name]) for name in files_to_load(address, blobs)]


# --- where a bucket is mounted ---------------------------------------------------------------------------------------


def _list_mount(path: Path) -> list[Original]:
    with _readable(path):
        if path.is_file():
            return [_mounted(path, path.name)]
        files = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        return [_mounted(path / name, name) for name in files_to_load(str(path), files)]


def _mounted(file: Path, name: str) -> Original:
    status = file.stat()

    def copy_to(write: Write, stop: Event) -> None:
        for block in _blocks(file):
            write(block)

    return Original(name, status.st_size, f"{status.st_size} {status.st_mtime_ns}", copy_to)


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
