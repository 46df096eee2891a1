"""Large files into a bucket in parts, and on from the last of them, also by the next process.

The protocol is Cloud Storage's own (cloud.google.com/storage/docs/performing-resumable-uploads). What Google's client
leaves out is that an upload's address can be kept: it is good for a week, and whoever has it may go on there. So it is
noted in the cache of this user, readable by no one else, until the file is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from google.api_core import exceptions as api

from sdtune.backends.connections import SECONDS_PER_CALL

if TYPE_CHECKING:
    from google.cloud.storage import Blob, Client


class PartedUpload:
    """One file on its way to ``blob``, whose hashes are set: Cloud Storage takes no other content.

    replaces: the generation of what is there, or 0. part: bytes that are sent at once, a multiple of 256 KiB.
    """

    def __init__(self, client: Client, blob: Blob, size: int, replaces: int, part: int) -> None:
        self._client, self._blob, self._size, self._replaces, self._part = client, blob, size, replaces, part
        about = f"{client._connection.API_BASE_URL} {blob.path} {size} {blob.md5_hash} {blob.crc32c} {replaces}"
        self._note = _cache() / hashlib.sha256(about.encode()).hexdigest()[:32]
        self._address = self._noted()
        self._sent = 0
        self._is_sure = False
        """What the bucket has is known to be ``_sent``."""

    def send(self, stream: BinaryIO, kind: str | None, retry: Any) -> None:
        """All that the bucket does not have yet. GoogleAPICallError, RequestException: when ``retry`` is at its end."""
        is_whole = False
        while not is_whole:
            is_whole = retry(lambda: self._step(stream, kind))()
        self._forget()

    def _step(self, stream: BinaryIO, kind: str | None) -> bool:
        """One part, after asking how much is there if that is not sure. Whether the file is whole."""
        if not self._address:
            self._address = self._blob.create_resumable_upload_session(
                kind, self._size, client=self._client, checksum=None, if_generation_match=self._replaces, retry=None
            )
            self._remember()
            self._sent, self._is_sure = 0, True
        if not self._is_sure and self._put(b"", f"bytes */{self._size}"):
            return True
        stream.seek(self._sent)
        data = stream.read(min(self._part, self._size - self._sent))
        if not data:
            raise ValueError("the file has become shorter")
        self._is_sure = False
        return self._put(data, f"bytes {self._sent}-{self._sent + len(data) - 1}/{self._size}")

    def _put(self, data: bytes, part: str) -> bool:
        # Redirects are not followed: 308 is this protocol's own.
        response = self._client._http.request(
            "PUT", self._address, data=data, headers={"Content-Range": part}, timeout=SECONDS_PER_CALL,
            allow_redirects=False,
        )  # fmt: skip
        if response.status_code in (404, 410):
            # Too old, or given up: begin anew.
            self._forget()
            self._address = ""
            raise api.ServiceUnavailable("the upload was not known any more")
        if response.status_code == 308:
            there = re.fullmatch(r"bytes=0-(\d+)", response.headers.get("Range", ""))
            self._sent, self._is_sure = int(there[1]) + 1 if there else 0, True
            return False
        if response.status_code >= 400:
            error = api.from_http_response(response)
            if isinstance(error, api.BadRequest | api.PreconditionFailed):
                self._forget()
            raise error
        return True

    # The note --------------------------------------------------------------------------------------------------------

    def _noted(self) -> str:
        """The address that an earlier process has left; never one of another host than this client's."""
        with suppress(OSError, UnicodeDecodeError):
            address = self._note.read_text()
            if address.startswith(f"{self._client._connection.API_BASE_URL.rstrip('/')}/"):
                return address
        return ""

    def _remember(self) -> None:
        with suppress(OSError):
            self._note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._note.unlink(missing_ok=True)
            with os.fdopen(os.open(self._note, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(self._address)

    def _forget(self) -> None:
        with suppress(OSError):
            self._note.unlink(missing_ok=True)


def _cache() -> Path:
    given = os.environ.get("SDTUNE_CACHE")
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "sdtune") / "uploads"
