"""Cloud Storage for the training process: list, download, upload and delete, and what can go wrong with that.

The one module of the trainer that knows Google's client for it, and only where an address asks for it: without one the
training process needs no client library.
"""

from __future__ import annotations

import base64
import math
import mimetypes
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

from sdtune.errors import ProjectError, SdtuneError, TrainingError
from sdtune.methods import places
from sdtune.methods.passwords import without_passwords
from sdtune.methods.places import bucket_and_path, in_bucket
from sdtune.training.components.copying import SMALL, Original, StopError, Write

FIELDS = "items(name,size,generation,crc32c,contentEncoding),nextPageToken"
CHUNK = 1 << 25
"""Bytes in one request of a large upload: a line that breaks costs no more."""
SECONDS_PER_TRY = 120.0
FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0


@dataclass(frozen=True)
class Asked:
    """Why a place in a bucket is looked at. setting: that named it. refused: the error if it is not to be had."""

    setting: str
    refused: type[SdtuneError] = TrainingError
    writing: bool = False


def in_store(place: str) -> str | None:
    """``place`` as gs://bucket/path; None for a folder of this machine.

    That is also /gcs/bucket/path where Vertex AI has mounted it and Google's client is missing.
    """
    address = in_bucket(place)
    if address and place.startswith(f"{places.MOUNT}/") and Path(places.MOUNT).is_dir() and not _is_installed():
        return None
    return address


def _is_installed() -> bool:
    try:
        from google.cloud import storage  # noqa: F401
    except ImportError:
        return False
    return True


class Folder:
    """A folder of a bucket, at gs://bucket/path."""

    def __init__(self, address: str, asked: Asked) -> None:
        try:
            from google.cloud import storage
        except ImportError:
            verb = "written" if asked.writing else "read"
            raise ProjectError(
                f"{asked.setting}: {address} is {verb} by google-cloud-storage, which this Python does not have; "
                "install it with: pip install google-cloud-storage"
            ) from None
        self.address, self.asked = address, asked
        bucket, path = bucket_and_path(address)
        self._start = f"{path}/" if path else ""
        with self._explained():
            self._client = storage.Client()
            without_passwords(self._client._http)
        self._bucket = self._client.bucket(bucket)

    def files(self, inside: str = "") -> dict[str, Any]:
        """The objects in it, at any depth, by their names in it; one request per 1,000. inside: a prefix of these."""
        with self._explained():
            blobs = self._client.list_blobs(self._bucket, prefix=self._start + inside, fields=FIELDS)
            return {blob.name.removeprefix(self._start): blob for blob in blobs}

    def find(self, name: str) -> Any | None:
        """One object, if it is there."""
        with self._explained(name):
            return self._bucket.get_blob(self._start + name)

    def read(self, name: str) -> bytes | None:
        """The bytes of a small object, if it is there."""
        if (blob := self.find(name)) is None:
            return None
        content = bytearray()
        self.original(name, blob).copy_to(content.extend, Event())
        return bytes(content)

    def original(self, name: str, blob: Any) -> Original:
        """An object as a file to copy."""
        if blob.content_encoding:
            raise TrainingError(
                f"{self.asked.setting}: {self.address}: {name} is stored with Content-Encoding "
                f"{blob.content_encoding}; upload it without compression."
            )
        return Original(name, blob.size, str(blob.generation), partial(self._download, name, blob))

    def _download(self, name: str, blob: Any, write: Write, stop: Event) -> None:
        """One object, of the generation that was listed; the client takes up a broken connection where it was."""
        from google.cloud.storage.retry import DEFAULT_RETRY
        from google_crc32c import Checksum

        checksum, expected = Checksum(), blob.crc32c

        def checked(data: bytes) -> None:
            checksum.update(data)
            write(data)

        def worth_it(error: Exception) -> bool:
            return not stop.is_set() and bool(DEFAULT_RETRY._predicate(error))

        with self._explained():
            # The client would check a whole answer, but not one that it took up again.
            retry = DEFAULT_RETRY.with_predicate(worth_it).with_delay(maximum=4)
            blob.download_to_file(SimpleNamespace(write=checked), checksum=None, retry=retry)
        if base64.b64encode(checksum.digest()).decode() != expected:
            raise TrainingError(
                f"{self.asked.setting}: {self.address}: {name} arrived damaged (its CRC32C is another); start again."
            )

    def upload(self, name: str, file: Path, size: int, seconds: float, stop: Event) -> None:
        """The first ``size`` bytes of ``file`` as one object, which is there whole or not at all.

        seconds: how long it is tried again after it first failed, unless ``stop`` is set before. Its CRC32C is checked
        on arrival.
        """
        from google.api_core.exceptions import GoogleAPIError
        from google.cloud.storage.retry import DEFAULT_RETRY
        from requests import RequestException

        end, delay = math.inf, FIRST_DELAY
        blob = self._bucket.blob(self._start + name, chunk_size=CHUNK)
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"

        def worth_it(error: Exception) -> bool:
            return not stop.is_set() and bool(DEFAULT_RETRY._predicate(error))

        with self._explained(name):
            while True:
                left = min(seconds, SECONDS_PER_TRY, max(0.0, end - time.monotonic()))
                retry = DEFAULT_RETRY.with_predicate(worth_it).with_delay(maximum=4).with_timeout(left)
                try:
                    with _Stoppable(file, stop) as stream:
                        blob.upload_from_file(stream, size=size, content_type=kind, checksum="crc32c", retry=retry)
                    return
                except (GoogleAPIError, RequestException, ConnectionError, *_damaged()) as error:
                    end = min(end, time.monotonic() + seconds)
                    # An upload in pieces that broke in the middle begins anew.
                    if not _passes(error) or end - time.monotonic() < delay or stop.wait(delay):
                        raise
                    delay = min(2 * delay, LONGEST_DELAY)

    def delete(self, names: Iterable[str]) -> None:
        """Take objects away; one that is not there is none the less gone."""
        from google.api_core.exceptions import NotFound

        def delete(name: str) -> None:
            with self._explained(name), suppress(NotFound):
                self._bucket.blob(self._start + name).delete()

        with ThreadPoolExecutor(SMALL) as pool:
            list(pool.map(delete, names))

    @contextmanager
    def _explained(self, name: str = "") -> Iterator[None]:
        """Google's errors in the user's terms."""
        from google.api_core import exceptions as api
        from google.auth import exceptions as auth
        from requests import RequestException

        place = f"{self.asked.setting}: {self.address}{'/' if name else ''}{name}"
        refused, writing = self.asked.refused, self.asked.writing
        may, role = ("written", "objectAdmin") if writing else ("read", "objectViewer")
        try:
            yield
        except auth.DefaultCredentialsError:
            raise ProjectError(
                f"{place} needs Google Cloud credentials, and there are none here; get some with: "
                "gcloud auth application-default login"
            ) from None
        except auth.RefreshError as error:
            raise ProjectError(
                f"{place}: the Google Cloud credentials are no longer taken ({error}); renew them with: "
                "gcloud auth application-default login"
            ) from None
        except (api.Forbidden, api.Unauthorized) as error:
            raise refused(
                f"{place} may not be {may} ({error.message}); give this account the role "
                f"roles/storage.{role} on the bucket."
            ) from None
        except api.NotFound as error:
            raise refused(
                f"{place}: not found ({error.message}); check the name, and whether it has just been changed."
            ) from None
        except (api.GoogleAPIError, auth.GoogleAuthError, RequestException, ConnectionError, *_damaged()) as error:
            what = "written" if writing else "fetched"
            raise TrainingError(f"{place} cannot be {what} ({error}); is Cloud Storage in reach?") from None


class _Stoppable(FileIO):
    """A file of which no more is read once ``stop`` is set: an upload in pieces ends with the piece it is at."""

    def __init__(self, file: Path, stop: Event) -> None:
        super().__init__(file)
        self._stop = stop

    def read(self, size: int | None = -1, /) -> bytes:
        if self._stop.is_set():
            raise StopError
        return super().read(-1 if size is None else size)


def _damaged() -> tuple[type[Exception], ...]:
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    return DataCorruption, InvalidResponse


def _passes(error: Exception) -> bool:
    """It may be another time otherwise."""
    from google.api_core.exceptions import RetryError
    from google.cloud.storage.exceptions import DataCorruption
    from google.cloud.storage.retry import DEFAULT_RETRY

    # 410 Gone: the service has forgotten an upload in pieces.
    gone = getattr(error, "code", None) == 410
    return gone or isinstance(error, (RetryError, DataCorruption)) or bool(DEFAULT_RETRY._predicate(error))
