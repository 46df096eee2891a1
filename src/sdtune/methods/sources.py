"""Where the files of a dataset come from: a list of names and sizes, and a way to open each."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from sdtune.errors import DatasetError


class File(Protocol):
    """One file. The rules ask nothing else of it, so it may as well lie in a bucket and be read by range."""

    @property
    def path(self) -> str:
        """Relative to the dataset, with forward slashes."""

    @property
    def size(self) -> int:
        """In bytes."""

    def open(self) -> BinaryIO:
        """A seekable stream of its bytes. May raise OSError."""

    def digest(self) -> bytes:
        """Equal exactly for files with equal bytes. May raise OSError. A bucket knows it without reading."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A directory entry that is not a file to be read. ``code`` and ``message`` as in a finding."""

    path: str
    code: str
    message: str


class Source(Protocol):
    """A dataset as a list of files, in any order."""

    @property
    def root(self) -> str:
        """As the user calls it."""

    @property
    def name(self) -> str:
        """Of the folder alone."""

    @property
    def workers(self) -> int | None:
        """Threads to look at files with: None for one per core; more where it is waiting, not work."""

    def files(self) -> Iterator[File | Obstacle]:
        """Every file at any depth. DatasetError if there is no such place."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    path: str
    size: int
    place: str

    def open(self) -> BinaryIO:
        return Path(self.place).open("rb")

    def digest(self) -> bytes:
        with Path(self.place).open("rb") as stream:
            return hashlib.file_digest(stream, "blake2b").digest()


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder of this machine. Links are followed to files inside the folder only; nothing is ever written."""

    folder: Path

    @property
    def root(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def workers(self) -> int | None:
        return None

    def files(self) -> Iterator[LocalFile | Obstacle]:
        try:
            top = self.folder.resolve(strict=True)
            is_folder = top.is_dir()
        except FileNotFoundError:
            raise DatasetError(f"{self.folder}: no such folder. The dataset must be a folder of images.") from None
        except (OSError, RuntimeError, ValueError) as error:
            raise DatasetError(f"{self.folder}: cannot be opened ({error}).") from None
        if not is_folder:
            unpack = " Unpack it first." if top.suffix.lower() in (".zip", ".tar", ".gz", ".7z", ".rar") else ""
            raise DatasetError(f"{self.folder}: is a file. The dataset must be a folder of images.{unpack}")
        waiting = [""]
        while waiting:
            inside = waiting.pop()
            try:
                with os.scandir(top / inside) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                if not inside:
                    raise DatasetError(f"{self.folder}: cannot be listed ({error.strerror}).") from None
                yield Obstacle(inside, "unreadable", f"the folder cannot be listed ({error.strerror})")
                continue
            for entry in found:
                path = f"{inside}/{entry.name}" if inside else entry.name
                try:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
                    else:
                        yield _file_or_obstacle(entry, path, top)
                except OSError as error:
                    yield Obstacle(path, "unreadable", f"cannot be looked at ({error.strerror})")


def _file_or_obstacle(entry: os.DirEntry[str], path: str, top: Path) -> LocalFile | Obstacle:
    if entry.is_symlink():
        target = Path(os.path.realpath(entry.path))  # Path.resolve raises at a link to itself
        if not target.is_relative_to(top):
            return Obstacle(path, "link-outside", "is a link that leads out of the dataset. Put the file itself here.")
        if not target.exists():
            return Obstacle(
                path, "link-broken", "is a link to a file that is not there. Remove it or restore the file."
            )
        if target.is_dir():
            return Obstacle(path, "link-folder", "is a link to another folder of the dataset and is not followed")
    status = entry.stat()
    if not stat.S_ISREG(status.st_mode):
        return Obstacle(path, "special-file", "is neither a file nor a folder (a pipe or a device). Remove it.")
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        return Obstacle(path, "bad-name", "has a name that is not UTF-8. Rename it.")
    if not entry.name.isprintable():
        return Obstacle(path, "bad-name", "has a control character in its name. Rename it.")
    return LocalFile(path, status.st_size, entry.path)
