"""Datasets and class pictures on this machine's own disk: folders of Cloud Storage, fetched once for each machine.

The process that starts those that train together fetches; they find the copies by their environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdtune.errors import DatasetError, ProjectError
from sdtune.methods.sources import LocalFolder
from sdtune.training.components.copying import SMALL, Original, cache, copy_missing, key_of, last_name
from sdtune.training.components.store import Asked, Folder, in_store

FETCHED = "SDTUNE_FETCHED"
"""In the environment, for the processes that this one starts: address -> copy, as JSON."""
WHAT = {"dataset": "the dataset", "class_data_dir": "the class pictures"}
"""By the setting that names the folder: what it is, for people."""


@dataclass(frozen=True, slots=True)
class FetchedFolder(LocalFolder):
    """The copy of a folder in a bucket, called as the user calls it."""

    address: str

    @property
    def root(self) -> str:
        return self.address


def folder_here(place: str, setting: str) -> Path:
    """``place`` as a folder of this machine: itself, or the copy of a folder in a bucket.

    DatasetError: there is no such folder, or it may not be read. TrainingError: it cannot be fetched. ProjectError: no
    access to Cloud Storage at all.
    """
    address = in_store(place)
    if address is None:
        return Path(place)
    fetched = _fetched()
    if address not in fetched or not Path(fetched[address]).is_dir():
        fetched[address] = str(_copied(address, setting))
        os.environ[FETCHED] = json.dumps(fetched)
    return Path(fetched[address])


def source_of(folder: Path) -> LocalFolder:
    """A folder for the check of datasets, which calls a copy by its address."""
    for address, copy in _fetched().items():
        if Path(copy) == folder:
            return FetchedFolder(folder, address)
    return LocalFolder(folder)


def _fetched() -> dict[str, str]:
    fetched: dict[str, str] = json.loads(os.environ.get(FETCHED, "{}"))
    return fetched


def _copied(address: str, setting: str) -> Path:
    """The copy in the cache, made where it is not there yet; its last name is the folder's own."""
    originals = list_originals(Folder(address, Asked(setting, DatasetError)))
    if not originals:
        raise DatasetError(f"{setting}: {address}: there is nothing in this folder of the bucket; check the path.")
    folder = cache("datasets") / key_of(address, originals) / last_name(address)
    copy_missing(setting, f"{WHAT[setting]} ({len(originals):,} files)", address, originals, folder, SMALL)
    return folder


def fetch_drawn(address: str, folder: Path) -> None:
    """Bring the class pictures that an earlier run into the same bucket drew, so that they need not be drawn again."""
    originals = list_originals(Folder(address, Asked("output", ProjectError)), "class_pictures/")
    copy_missing("output", "class pictures of an earlier run", address, originals, folder, SMALL)


def list_originals(folder: Folder, inside: str = "") -> list[Original]:
    """The objects of a folder that are files; DatasetError where the name of one leads out of it."""
    blobs = folder.files(inside)
    # Consoles make empty objects whose names end with a slash, for folders.
    names = [name for name in blobs if name and not name.endswith("/")]
    check_names(folder.address, names, folder.asked.setting)
    return [folder.original(name, blobs[name]) for name in names]


def check_names(address: str, names: Iterable[str], setting: str) -> None:
    """DatasetError: the name of an object could be no file below one folder."""
    for name in names:
        if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
            raise DatasetError(
                f"{setting}: {address} has an object named {name!r}, which is no path in a folder; rename it."
            )
