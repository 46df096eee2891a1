"""Folders of this machine and of Cloud Storage, looked at alike: what every backend shares."""

from __future__ import annotations

import os
from errno import ENOENT
from pathlib import Path

from sdtune.methods.places import bucket_and_path, in_bucket
from sdtune.methods.sources import LocalFolder, Source

LARGEST = 2**28
"""Bytes that are read of one file."""


class Places:
    """offline: no call is made; what would need one counts as empty, writable and not to be looked at."""

    def __init__(self, offline: bool = False) -> None:
        self.offline = offline

    def resolve(self, path: str) -> str:
        return in_bucket(path) or str(Path(path).expanduser().resolve())

    def dataset(self, path: str) -> Source | None:
        address = in_bucket(path)
        if address is None:
            return LocalFolder(Path(path).expanduser())
        if self.offline:
            return None
        # Imported only now: Google's client takes a third of a second.
        from sdtune.backends.storage import BucketFolder, open_client

        return BucketFolder(open_client(), address)

    def read(self, file: str) -> bytes | None:
        address = in_bucket(file)
        if address is None:
            with Path(file).expanduser().open("rb") as stream:
                return stream.read(LARGEST)
        if self.offline:
            return None
        from sdtune.backends.storage import open_client, read_object

        if (data := read_object(open_client(), address, LARGEST)) is None:
            raise FileNotFoundError(ENOENT, "there is no such file", address)
        return data

    def list_names(self, folder: str) -> list[str]:
        address = in_bucket(folder)
        if address is None:
            path = Path(folder)
            return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        if self.offline:
            return []
        from sdtune.backends.storage import list_names, open_client

        return list_names(open_client(), address)

    def why_not_written(self, folder: str) -> str | None:
        address = in_bucket(folder)
        if address is None:
            return None if _can_write(Path(folder)) else "is no folder, or cannot be written to"
        if not bucket_and_path(address)[1]:
            return "is a whole bucket; wanted a folder in it"
        if self.offline:
            return None
        from sdtune.backends.storage import can_write, open_client

        missing = can_write(open_client(), address)
        return f"cannot be written to: you lack {', '.join(missing)} on the bucket" if missing else None


def _can_write(path: Path) -> bool:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    # Root may write to a virtual file system, says the system, but no file can be made there.
    virtual = existing.is_relative_to("/proc") or existing.is_relative_to("/sys")
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK) and not virtual
