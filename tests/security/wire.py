"""Everything that servers of this process are sent, byte by byte, whatever they make of it; and a search in it."""

from __future__ import annotations

import base64
import gzip
import io
import tarfile
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import StreamRequestHandler
from typing import Any
from unittest import mock


class Tee:
    """A stream that keeps what is read from it."""

    def __init__(self, stream: Any, kept: bytearray) -> None:
        self._stream, self._kept = stream, kept

    def read(self, *size: int) -> bytes:
        return self._keep(self._stream.read(*size))

    def read1(self, *size: int) -> bytes:
        return self._keep(self._stream.read1(*size))

    def readline(self, *size: int) -> bytes:
        return self._keep(self._stream.readline(*size))

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._keep(bytes(buffer[:count]))
        return count

    def _keep(self, data: bytes) -> bytes:
        self._kept += data
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def recorded() -> Iterator[dict[int, list[bytearray]]]:
    """What every server of this process is sent, by its port, each connection for itself."""
    found: dict[int, list[bytearray]] = {}
    lock = threading.Lock()
    setup = StreamRequestHandler.setup

    def tapped(self: Any) -> None:
        setup(self)
        kept = bytearray()
        with lock:
            found.setdefault(self.server.server_address[1], []).append(kept)
        self.rfile = Tee(self.rfile, kept)

    with mock.patch.object(StreamRequestHandler, "setup", tapped):
        yield found


def spellings(secret: str) -> list[bytes]:
    """How a secret may stand in a file: as it is, in base64 wherever it begins, in hexadecimal, in UTF-16."""
    plain = secret.encode()
    # Less the letters that depend on what stands around it.
    encoded = [base64.b64encode(bytes(shift) + plain)[4 if shift else 0 : -4] for shift in range(3)]
    return [plain, *encoded, plain.hex().encode(), secret.encode("utf-16-le")]


def opened(data: bytes) -> Iterator[bytes]:
    """``data``, and what is packed in it."""
    yield data
    for start in (0, *_starts(data, b"\x1f\x8b\x08")):
        with suppress(OSError, EOFError, zlib.error):
            yield gzip.decompress(data[start:])
    with suppress(tarfile.TarError, OSError, EOFError), tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive.getmembers():
            if file := archive.extractfile(member):
                yield member.name.encode() + b"\n" + file.read()


def _starts(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def holds(data: bytes, secrets: Mapping[str, str]) -> list[str]:
    """The names of those of ``secrets`` that are in ``data``."""
    pieces = list(opened(data))
    return [
        name for name, secret in secrets.items() if any(word in piece for word in spellings(secret) for piece in pieces)
    ]


def holds_in_files(folder: Path, secrets: Mapping[str, str]) -> dict[str, list[str]]:
    """By file: the names of those of ``secrets`` that are in it, or in its name."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and (names := holds(str(path).encode() + b"\n" + path.read_bytes(), secrets)):
            found[str(path.relative_to(folder))] = names
    return found
