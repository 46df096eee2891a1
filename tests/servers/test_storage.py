"""The storage server under Google's real client: what the client does to a bucket, it does here."""

from __future__ import annotations

import io
import os
from typing import Any

import pytest
from google.api_core import exceptions
from google.cloud.storage import Client, transfer_manager

from tests.servers.storage import StorageServer

CONTENTS = [b"", b"a\r\n\r\n--b\n\n", os.urandom(700_000)]


@pytest.fixture
def bucket(storage: StorageServer) -> Any:
    storage.buckets["bucket"] = {}
    return Client().bucket("bucket")


@pytest.mark.parametrize("data", CONTENTS, ids=["nothing", "lines", "much"])
@pytest.mark.parametrize("chunk_size", [None, 1 << 18], ids=["multipart", "resumable"])
def test_what_is_uploaded_comes_back(bucket: Any, data: bytes, chunk_size: int | None) -> None:
    blob = bucket.blob("a folder/ä?#.bin", chunk_size=chunk_size)
    blob.metadata = {"by": "me"}
    blob.upload_from_file(io.BytesIO(data), content_type="image/png", checksum="crc32c")
    found = bucket.get_blob("a folder/ä?#.bin")
    assert (found.size, found.content_type, found.metadata) == (len(data), "image/png", {"by": "me"})
    assert found.download_as_bytes(checksum="crc32c") == found.download_as_bytes(checksum="md5") == data


def test_parts_are_downloaded(bucket: Any, tmp_path: Any) -> None:
    bucket.blob("x").upload_from_string(CONTENTS[2])
    assert bucket.blob("x").download_as_bytes(start=5, end=9) == CONTENTS[2][5:10]
    transfer_manager.download_chunks_concurrently(
        bucket.get_blob("x"), str(tmp_path / "x"), chunk_size=100_000, worker_type=transfer_manager.THREAD
    )
    assert (tmp_path / "x").read_bytes() == CONTENTS[2]


def test_many_objects_are_listed_in_pages(bucket: Any, storage: StorageServer) -> None:
    for number in range(2500):
        storage.put("bucket", f"many/{number % 2}/{number:05}", b"")
    storage.put("bucket", "other", b"")
    names = [blob.name for blob in bucket.list_blobs(prefix="many/")]
    assert names == sorted(names)
    assert len(names) == 2500
    assert sum("/o?" in request for request in storage.requests) == 3
    top = bucket.list_blobs(delimiter="/")
    assert ([blob.name for blob in top], top.prefixes) == (["other"], {"many/"})
    below = bucket.list_blobs(prefix="many/", delimiter="/", page_size=1)
    assert (list(below), below.prefixes, below.page_number) == ([], {"many/0/", "many/1/"}, 2)


def test_generations(bucket: Any) -> None:
    blob = bucket.blob("x")
    blob.upload_from_string(b"one", if_generation_match=0)
    old = bucket.get_blob("x")
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("x").upload_from_string(b"two", if_generation_match=0)
    bucket.blob("x").upload_from_string(b"two", if_generation_match=old.generation)
    assert bucket.get_blob("x").generation > old.generation
    with pytest.raises(exceptions.NotFound):
        old.download_as_bytes()
    bucket.delete_blob("x")
    assert bucket.get_blob("x") is None


def test_faults(bucket: Any, storage: StorageServer) -> None:
    storage.put("bucket", "x", CONTENTS[2])
    storage.fail("GET", "/o/x", 503, times=1)
    storage.cut("/o/x", after=300_000, times=1)
    assert bucket.blob("x").download_as_bytes() == CONTENTS[2]  # the client tries again, and takes up where it was
    storage.fail("GET", "/o/x", 403)
    with pytest.raises(exceptions.Forbidden, match="was told to answer 403"):
        bucket.blob("x").download_as_bytes()
    with pytest.raises(exceptions.NotFound, match="bucket does not exist"):
        list(Client().list_blobs("nowhere"))
