"""Cloud Storage as the launcher sees it: a dataset that is checked where it lies, an output folder that is looked at.

Imported only where a bucket has to be asked; everything here reads, and nothing writes.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from posixpath import dirname, splitext
from typing import Any, BinaryIO, cast

from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Blob, Client
from google.cloud.storage.retry import DEFAULT_RETRY
from requests import RequestException

from sdtune.backends.connections import make_timely
from sdtune.backends.endpoints import checked, override, takes_credentials
from sdtune.errors import DatasetError, ProjectError
from sdtune.methods.folders import CAPTION_SUFFIXES
from sdtune.methods.places import BUCKETS, bucket_and_path
from sdtune.methods.sources import Obstacle
from sdtune.methods.threads import in_threads

AT_ONCE = 32
"""Requests. At 30 ms each, 10,000 headers take 22 s in 16 threads, 12 s in 32, and 10 s in 64, where one core is the
limit (benchmarks/bucket_check_speed.py)."""
LONGEST_WAIT = 30
"""Seconds for which a request is tried again: someone is sitting in front of it."""
RETRY = (
    DEFAULT_RETRY.with_predicate(
        lambda error: DEFAULT_RETRY._predicate(error) or (isinstance(error, auth.RefreshError) and error.retryable)
    )
    .with_timeout(LONGEST_WAIT)
    .with_delay(maximum=4)
)

READER = "roles/storage.objectViewer"
WRITER = "roles/storage.objectUser"
TO_WRITE = ("storage.objects.create", "storage.objects.delete", "storage.objects.get", "storage.objects.list")


def open_client(project: str | None = None) -> Client:
    """The way to Cloud Storage, or to what the environment names in its place: see endpoints.py.

    project: only needed to make buckets. ProjectError: there are no credentials.
    """
    endpoint = _endpoint()
    options: dict[str, Any] = {"client_options": {"api_endpoint": endpoint}} if endpoint else {}
    if not takes_credentials(endpoint):
        options["credentials"] = AnonymousCredentials()
    with explained("Cloud Storage"):
        client = Client(project=project, **options)
    # The session keeps ten connections unless told otherwise, and would open all others anew for every request.
    make_timely(client._http, AT_ONCE)
    return client


def _endpoint() -> str | None:
    """Without a slash at its end, as this client wants it."""
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST", "").strip():
        given = emulator if "://" in emulator else f"http://{emulator}"
        return checked("STORAGE_EMULATOR_HOST", given).rstrip("/")
    if other := override("storage"):
        # gcloud takes it with the path of the API and without.
        return other.rstrip("/").removesuffix("/storage/v1")
    return None


def list_names(client: Client, address: str) -> list[str]:
    """The names of objects and, with a slash at their end, of folders directly in the folder ``address``: the first
    1,000 at most, by one request. Empty where there is no such folder.

    ProjectError: the bucket is not there, or may not be listed.
    """
    bucket, path = bucket_and_path(address)
    start = f"{path}/" if path else ""
    with explained(address):
        listing = client.list_blobs(
            bucket,
            prefix=start,
            delimiter="/",
            page_size=1000,
            fields="items(name),prefixes,nextPageToken",
            retry=RETRY,
        )
        page = next(listing.pages, ())
        found = [blob.name for blob in page] + list(listing.prefixes)
    return sorted(name.removeprefix(start) for name in found if name != start)


def read_object(client: Client, address: str, most: int) -> bytes | None:
    """The first ``most`` bytes of one object; None where there is none. ProjectError: see list_names()."""
    bucket, path = bucket_and_path(address)
    with explained(address):
        blob = client.bucket(bucket).get_blob(path, retry=RETRY)
        if blob is None or not blob.size:
            return None if blob is None else b""
        data: bytes = blob.download_as_bytes(end=min(most, blob.size) - 1, retry=RETRY)
    return data


def can_write(client: Client, address: str, needed: Collection[str] = TO_WRITE) -> list[str]:
    """Those of the permissions ``needed`` that this account lacks in the bucket of ``address``; nothing is written.

    Empty as well where the server cannot tell, as emulators. ProjectError: there is no such bucket.
    """
    bucket, _ = bucket_and_path(address)
    try:
        with explained(address, WRITER, let_through=(api.NotFound, api.MethodNotAllowed, api.MethodNotImplemented)):
            held = client.bucket(bucket).test_iam_permissions(list(needed), retry=RETRY)
    except (api.NotFound, api.MethodNotAllowed, api.MethodNotImplemented):
        list_names(client, f"{BUCKETS}{bucket}")  # a bucket that is not there is told from a method that is not
        return []
    return [permission for permission in needed if permission not in held]


def location(client: Client, address: str) -> str | None:
    """Where the bucket of ``address`` lies, in Google's capitals: US-CENTRAL1, EU ... None: it may not be asked.

    ProjectError: there is no such bucket.
    """
    bucket, _ = bucket_and_path(address)
    try:
        with explained(address, let_through=(api.Forbidden,)):
            return cast(str, client.get_bucket(bucket, retry=RETRY).location)
    except api.Forbidden:  # the right to read objects does not include it
        return None


# --- a dataset -------------------------------------------------------------------------------------------------------

HEAD = 1 << 14
"""Bytes read of a picture at first: more than most headers, and little enough for a home's line."""
LONG_HEAD = 1 << 16
"""The same in folders where headers have proved longer, with the previews that cameras put into them."""
WHOLE = 1 << 22
"""The size up to which what Pillow or the readers of metadata read from end to end comes in one request."""
READ_WHOLE = (".webp", ".avif", ".gif", ".jsonl", ".json", ".csv", ".parquet", *CAPTION_SUFFIXES)
BLOCK = 1 << 18
LARGEST_BLOCK = 1 << 23
CAPTION = 1 << 14
"""Text files up to this size are fetched together: their readers open them one after the other."""
FIELDS = "items(name,size,crc32c,md5Hash,generation,contentEncoding),nextPageToken"


@dataclass
class _Reach:
    """How far into the files the headers of a folder were found to go."""

    head: int = HEAD


@dataclass(frozen=True, slots=True)
class BucketFile:
    """One object of the generation that was listed."""

    path: str
    size: int
    blob: Blob
    reach: _Reach
    content: bytes | None = None
    """Where it was fetched already."""

    def open(self) -> BinaryIO:
        """OSError: it is not there any more. ProjectError: the bucket cannot be read."""
        if self.content is not None:
            return io.BytesIO(self.content)
        return cast(BinaryIO, io.BufferedReader(_Ranges(self)))

    def digest(self) -> bytes:
        """The MD5, or of composed objects the CRC32C. Files of the same kind and size are compared by it."""
        return base64.b64decode(self.blob.md5_hash or self.blob.crc32c or "")

    def fetch(self, start: int, end: int) -> bytes:
        """Those bytes, ``end`` not included."""
        try:
            with explained(self.blob_address, let_through=(api.NotFound,)):
                data: bytes = self.blob.download_as_bytes(
                    start=start, end=end - 1, raw_download=True, checksum=None, retry=RETRY
                )
        except api.NotFound:
            raise FileNotFoundError("it has been changed or removed since it was listed") from None
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes came instead of {end - start}")
        return data

    @property
    def blob_address(self) -> str:
        return f"{BUCKETS}{self.blob.bucket.name}/{self.blob.name}"


class _Ranges(io.RawIOBase):
    """A seekable stream that keeps its first bytes and the block last read; blocks grow as it is read on."""

    def __init__(self, file: BucketFile) -> None:
        super().__init__()
        self._file = file
        self._learns = not file.path.lower().endswith(READ_WHOLE)
        first = file.reach.head if self._learns else WHOLE
        self._head = file.fetch(0, min(first, file.size)) if file.size else b""
        self._start, self._block = 0, self._head
        self._at = 0
        self._next = BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        if origin + offset < 0:
            raise ValueError(f"there is no place {origin + offset} in a file")
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._file.size - self._at)
        if wanted <= 0:
            return 0
        data = self._at_hand() or self._read_on(wanted)
        count = min(len(data), len(buffer))
        buffer[:count] = data[:count]
        self._at += count
        return count

    def readall(self) -> bytes:
        data = bytes(self._at_hand())
        if (end := self._at + len(data)) < self._file.size:
            data += self._file.fetch(end, self._file.size)
        self._at += len(data)
        return data

    def _at_hand(self) -> memoryview:
        """What is here already of what comes next."""
        for start, block in ((0, self._head), (self._start, self._block)):
            if start <= self._at < start + len(block):
                return memoryview(block)[self._at - start :]
        return memoryview(b"")

    def _read_on(self, wanted: int) -> memoryview:
        size = self._next
        if self._learns and self._at == len(self._head) < LONG_HEAD:
            self._file.reach.head, size = LONG_HEAD, LONG_HEAD - self._at
        else:
            self._next = min(2 * self._next, LARGEST_BLOCK)
        self._start = self._at
        self._block = self._file.fetch(self._at, min(self._at + max(wanted, size), self._file.size))
        return memoryview(self._block)


@dataclass(frozen=True)
class BucketFolder:
    """A dataset in a bucket, as ``methods.layouts.check_source`` reads it. Whole pictures are not fetched."""

    client: Client
    address: str
    reach: _Reach = field(default_factory=_Reach, repr=False)

    @property
    def root(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def workers(self) -> int:
        return AT_ONCE

    def files(self) -> Iterator[BucketFile | Obstacle]:
        """One request for every 1,000 objects, and one for each small text file, many at once."""
        blobs = self._list()
        folders = _folders(blobs)
        found = [_file_or_obstacle(path, blob, folders, self.reach) for path, blob in blobs.items()]
        texts = [
            entry
            for entry in found
            if isinstance(entry, BucketFile)
            and splitext(entry.path)[1].lower() in CAPTION_SUFFIXES
            and entry.size <= CAPTION
        ]
        fetched = {file.path: file for file in in_threads(_with_content, texts, AT_ONCE)}
        yield from (fetched.get(entry.path, entry) for entry in found)

    def _list(self) -> dict[str, Blob]:
        """Every object by its path in the folder, less the empty ones that stand for folders."""
        bucket, path = bucket_and_path(self.address)
        start = f"{path}/" if path else ""
        with explained(self.address):
            blobs = list(self.client.list_blobs(bucket, prefix=start, fields=FIELDS, retry=RETRY))
        if not blobs and path:
            raise DatasetError(self._explain_nothing())
        return {blob.name.removeprefix(start): blob for blob in blobs if not blob.name.endswith("/")}

    def _explain_nothing(self) -> str:
        above, _, name = self.address.rpartition("/")
        names = list_names(self.client, above)
        if name in names:
            unpack = " Unpack it first." if name.lower().endswith((".zip", ".tar", ".gz", ".7z", ".rar")) else ""
            return f"{self.address}: is a file. The dataset must be a folder of images.{unpack}"
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        there = f"{above} has: {shown}." if names else f"{above} is empty."
        return f"{self.address}: no such folder. {there} The dataset must be a folder of images."


def _folders(paths: Collection[str]) -> set[str]:
    """Every folder that one of ``paths`` lies in."""
    folders: set[str] = set()
    for path in paths:
        while (path := dirname(path)) and path not in folders:
            folders.add(path)
    return folders


def _file_or_obstacle(path: str, blob: Blob, folders: Collection[str], reach: _Reach) -> BucketFile | Obstacle:
    """A bucket takes any name; the run copies the dataset to a disk, which does not."""
    parts = path.split("/")
    if not path.isprintable():
        return Obstacle(path, "bad-name", "has a control character in its name. Rename it.")
    if "" in parts:
        return Obstacle(path, "bad-name", "has two slashes in a row or one at its start. Rename it.")
    if "." in parts or ".." in parts:
        return Obstacle(path, "bad-name", "has a '.' or '..' for a folder, which leads elsewhere on a disk. Rename it.")
    if path in folders:
        return Obstacle(path, "bad-name", "has the name of a folder that is there too. Rename one of them.")
    if blob.content_encoding:
        message = f"is stored with Content-Encoding {blob.content_encoding}. Upload it without compression."
        return Obstacle(path, "unreadable", message)
    return BucketFile(path, blob.size, blob, reach)


def _with_content(file: BucketFile) -> BucketFile:
    try:
        content = file.fetch(0, file.size) if file.size else b""
    except OSError:  # told by whoever opens it
        return file
    return BucketFile(file.path, file.size, file.blob, file.reach, content)


# --- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def explained(address: str, role: str = READER, let_through: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Google's errors in the user's terms, as ProjectError; role: the one that allows what is done to ``address``."""
    try:
        yield
    except let_through:
        raise
    except (auth.DefaultCredentialsError, auth.RefreshError) as error:
        if error.retryable:
            raise ProjectError(f"{address}: no token could be had ({_first_line(error)}); try again.") from None
        what = "are no longer taken" if isinstance(error, auth.RefreshError) else "were not found"
        raise ProjectError(
            f"{address}: the credentials for Google Cloud {what} ({_first_line(error)}); get new ones with: "
            "gcloud auth application-default login"
        ) from None
    except api.Unauthorized as error:
        raise ProjectError(
            f"{address}: this account is not known there ({_first_line(error)}); log in with: "
            "gcloud auth application-default login"
        ) from None
    except api.Forbidden as error:
        bucket, _ = bucket_and_path(address)
        raise ProjectError(
            f"{address}: not allowed ({_first_line(error)}); whoever owns the bucket can allow it with: "
            f"gcloud storage buckets add-iam-policy-binding {BUCKETS}{bucket} --role={role} --member=user:YOUR_ADDRESS"
        ) from None
    except api.NotFound:
        bucket, _ = bucket_and_path(address)
        raise ProjectError(
            f"{address}: there is no bucket {bucket}; check the name, or make it with: "
            f"gcloud storage buckets create {BUCKETS}{bucket} --location=REGION"
        ) from None
    except api.TooManyRequests as error:
        raise ProjectError(
            f"{address}: too many requests ({_first_line(error)}); wait a minute and try again."
        ) from None
    except (api.GoogleAPIError, auth.GoogleAuthError, RequestException, ConnectionError) as error:
        raise ProjectError(
            f"{address}: Cloud Storage does not answer as it should ({_first_line(error)}); is it in reach from here?"
        ) from None


def _first_line(error: Exception) -> str:
    """What an error says, without the address that was asked and what the layers around it have wrapped it in."""
    cause = getattr(error, "cause", None) or error  # a retry that gave up says only that it did
    said = re.sub(r"^[A-Z]+ https?://\S+: ", "", str(getattr(cause, "message", None) or cause))
    said = said.partition(": ('Request failed with")[0].strip()
    for wrapping in (r"Caused by \w+\([\"']?(?:[^:]*: )?(.*?)[\"']?\)\)", r'"message": ?"(.*?)(?<!\\)"'):
        if inner := re.search(wrapping, said):
            return inner[1]
    return said.splitlines()[0] if said else type(cause).__name__
