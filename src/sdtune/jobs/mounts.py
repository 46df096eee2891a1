"""NFS shares (Filestore) that a job mounts."""

from __future__ import annotations

import re
from dataclasses import dataclass

ROOT = "/mnt/nfs"
"""Vertex AI mounts every share below it."""


@dataclass(frozen=True, slots=True)
class NfsMount:
    """One share. server: its address; path: on the server; mount_point: a name below /mnt/nfs."""

    server: str
    path: str
    mount_point: str

    @property
    def place(self) -> str:
        """Where the job sees it."""
        return f"{ROOT}/{self.mount_point}"


def parse_mount(text: str) -> NfsMount:
    """``10.0.0.2:/vol1=/mnt/nfs/models``, or ``=models`` alone. ValueError says what is wrong."""
    source, _, place = text.partition("=")
    server, colon, path = source.partition(":")
    if not server or not colon or not path or not place:
        raise ValueError(f"found {text!r}, wanted SERVER:/PATH=/mnt/nfs/NAME, such as 10.0.0.2:/vol1=/mnt/nfs/models.")
    if not re.fullmatch(r"[A-Za-z0-9.-]+", server):
        raise ValueError(f"found the server {server!r}, wanted an address such as 10.0.0.2.")
    if not re.fullmatch(r"(/[\w.-]+)+/?", path) or ".." in path.split("/"):
        raise ValueError(f"found the path {path!r}, wanted one from the root of the server, such as /vol1.")
    name = place.removeprefix(f"{ROOT}/")
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(f"found {place!r}, wanted {ROOT}/NAME: Vertex AI mounts shares nowhere else.")
    return NfsMount(server, path.rstrip("/"), name)
