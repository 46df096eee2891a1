"""The files of a dataset, sorted by what their names promise."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from posixpath import basename, dirname, splitext

from sdtune.methods.images import CONVERT, SUFFIXES, sniff
from sdtune.methods.ledger import Draft
from sdtune.methods.sources import File, Obstacle, Source

CAPTION_SUFFIXES = (".txt", ".caption")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")

_SYSTEM_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db")
_SYSTEM_FOLDERS = ("__macosx", "__pycache__", "@eadir")


@dataclass
class Folder:
    """The files of a dataset by what their names promise. Each dict: path -> file, in the order of the paths."""

    name: str
    images: dict[str, File] = field(default_factory=dict)
    texts: dict[str, File] = field(default_factory=dict)
    others: dict[str, File] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)

    @cached_property
    def images_in(self) -> dict[str, dict[str, File]]:
        """By the folder they lie directly in; "" is the dataset itself. Read only when all images are known."""
        return _by_parent(self.images)

    @cached_property
    def texts_in(self) -> dict[str, dict[str, File]]:
        return _by_parent(self.texts)


def sort_files(source: Source, draft: Draft) -> Folder:
    """Everything in ``source``; what no layout can use is noted at once."""
    found = sorted(source.files(), key=lambda entry: entry.path)
    folder = Folder(source.name)
    for entry in found:
        folder.paths.append(entry.path)
        suffix = splitext(entry.path)[1].lower()
        if _is_hidden(entry.path):
            draft.drop(entry.path, "system-file")
        elif isinstance(entry, Obstacle):
            draft.reject(entry.code, entry.path, entry.message)
        elif suffix in SUFFIXES:
            folder.images[entry.path] = entry
        elif suffix in CAPTION_SUFFIXES and _unlike_metadata(entry.path):
            folder.texts[entry.path] = entry
        else:
            folder.others[entry.path] = entry
            _remark_on_other(entry, suffix, draft)
    if not found:
        draft.find("empty", "", "the folder is empty. Put the images into it.")
    return folder


def _by_parent(files: dict[str, File]) -> dict[str, dict[str, File]]:
    parents: dict[str, dict[str, File]] = {}
    for path, file in files.items():
        parents.setdefault(dirname(path), {})[path] = file
    return parents


def _is_hidden(path: str) -> bool:
    # "." and ".." are objects of a bucket that lead elsewhere on a disk, and not hidden.
    *folders, name = [part for part in path.lower().split("/") if part not in (".", "..")] or [""]
    return (
        name.startswith(".")
        or name in _SYSTEM_FILES
        or any(folder.startswith(".") or folder in _SYSTEM_FOLDERS for folder in folders)
    )


def _unlike_metadata(path: str) -> bool:
    return not re.search(r"metadata\.|\.jsonl?\.", basename(path).lower())


def _remark_on_other(file: File, suffix: str, draft: Draft) -> None:
    if suffix in CONVERT:
        draft.reject("convert", file.path, f"{suffix} pictures cannot be trained on. Convert it to PNG or JPEG.")
    elif suffix in ARCHIVES:
        draft.reject("archive", file.path, "is an archive and is not opened. Unpack it if its images should count.")
    elif not suffix and (format_ := sniff(_head(file))):
        message = (
            f"is a {format_} picture, but its name does not end in {_suffix_of(format_)}: it is not used. Rename it."
        )
        draft.reject("no-suffix", file.path, message)


def _head(file: File) -> bytes:
    try:
        with file.open() as stream:
            return stream.read(32)
    except OSError:
        return b""


def _suffix_of(format_: str) -> str:
    return next((suffix for suffix, name in SUFFIXES.items() if name == format_), "." + format_.lower())


def number_of(count: int, noun: str) -> str:
    """1 image, 3 images."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
