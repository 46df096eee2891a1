"""Cloud Storage as the launcher sees it, by Google's own client: datasets checked in place, output folders looked at.

What must be the same everywhere runs on the emulator too; faults are ordered from our own server.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.cloud.storage import Client
from PIL import Image

from sdtune.backends.endpoints import override, takes_credentials
from sdtune.backends.storage import LONG_HEAD, BucketFile, BucketFolder, can_write, list_names, location, open_client
from sdtune.errors import DatasetError, ProjectError
from sdtune.methods.layouts import check, check_source
from sdtune.methods.ledger import Layout, Ledger
from sdtune.methods.sources import Obstacle
from tests.conftest import DATASETS
from tests.servers.emulator import Emulator
from tests.servers.storage import StorageServer


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture(params=["ours", "emulator"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Of an empty bucket "bucket" in each of the two servers."""
    if request.param == "ours":
        request.getfixturevalue("storage").buckets["bucket"] = {}
        return open_client()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("emulator").address)
    client = open_client("project")
    bucket = client.bucket("bucket")
    if bucket.exists():
        bucket.delete(force=True)
    client.create_bucket("bucket")
    return client


def put(client: Client, name: str, data: bytes) -> None:
    client.bucket("bucket").blob(name).upload_from_string(data)


def jpeg(side: int = 64, **more: object) -> bytes:
    """Of noise, so that no two are the same."""
    stream = io.BytesIO()
    Image.effect_noise((side, side), 50).convert("RGB").save(stream, "JPEG", **more)
    return stream.getvalue()


def look(address: str = "gs://bucket/dog", layout: Layout = Layout.IMAGES) -> Ledger:
    return check_source(BucketFolder(open_client(), address), layout, decode=False, workers=4)


def asked(storage: StorageServer) -> list[str]:
    """The requests for objects. For tracing, the client asks for the bucket itself besides."""
    return [request for request in storage.requests if "/b/bucket/o" in request]


def codes(ledger: Ledger) -> dict[str, str]:
    return {finding.path: finding.code for finding in ledger.findings}


# --- datasets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(Layout))
def test_a_dataset_in_a_bucket_is_what_it_is_on_a_disk(client: Client, layout: Layout) -> None:
    folder = DATASETS / layout.value
    for place in folder.rglob("*"):
        if place.is_file():
            put(client, f"sets/{layout.value}/{place.relative_to(folder).as_posix()}", place.read_bytes())
    there, here = look(f"gs://bucket/sets/{layout.value}", layout), check(folder, layout, decode=False)
    assert there.examples == here.examples
    assert len(there.examples) == 8
    assert (there.rows, there.findings) == (here.rows, here.findings)
    assert there.root == f"gs://bucket/sets/{layout.value}"


def test_names_of_every_kind(client: Client) -> None:
    for name in ("a b.jpg", "ä#?%2F.jpg", "犬.jpg", "+&=.jpg"):
        put(client, f"dog/{name}", jpeg())
    assert [example.image for example in look().examples] == ["+&=.jpg", "a b.jpg", "ä#?%2F.jpg", "犬.jpg"]


def test_a_picture_costs_one_request_and_a_twin_none(storage: StorageServer) -> None:
    for number in range(40):
        storage.put("bucket", f"dog/{number:02}.jpg", jpeg(256, quality=95))
        storage.put("bucket", f"dog/{number:02}.txt", b"a dog")
    storage.put("bucket", "dog/twin.jpg", storage.buckets["bucket"]["dog/00.jpg"].data)
    storage.put("bucket", "dog/whole.webp", _webp(1024))
    ledger = look()
    assert len(ledger.examples) == 42
    assert codes(ledger)["twin.jpg"] == "duplicate"
    assert len(asked(storage)) == 1 + 40 + 40 + 2


def _webp(side: int) -> bytes:
    """Larger than a header, and read whole by Pillow."""
    stream = io.BytesIO()
    Image.effect_noise((side, side), 50).convert("RGB").save(stream, "WEBP", quality=95)
    assert len(stream.getvalue()) > 2 * LONG_HEAD
    return stream.getvalue()


def test_long_headers_are_learned(storage: StorageServer) -> None:
    """Of a folder from a camera, whose files begin with a preview."""
    for number in range(20):
        storage.put("bucket", f"dog/{number:02}.jpg", jpeg(512, quality=95, comment=b"x" * 40_000))
    folder = BucketFolder(open_client(), "gs://bucket/dog")
    assert len(check_source(folder, Layout.IMAGES, decode=False, workers=1).examples) == 20
    assert len(asked(storage)) == 1 + 20 + 1


@pytest.mark.parametrize(
    "name", ["../up.jpg", "a/./b.jpg", "/top.jpg", "a//b.jpg", "line\nbreak.jpg", "both.jpg"], ids=repr
)
def test_names_that_no_disk_can_hold(storage: StorageServer, name: str) -> None:
    storage.put("bucket", f"dog/{name}", jpeg())
    storage.put("bucket", "dog/both.jpg/below.txt", b"")
    storage.put("bucket", "dog/good.jpg", jpeg())
    found = [entry for entry in BucketFolder(open_client(), "gs://bucket/dog").files() if isinstance(entry, Obstacle)]
    assert [(entry.path, entry.code) for entry in found] == [(name, "bad-name")]
    assert [example.image for example in look().examples] == ["good.jpg"]


def test_what_stands_for_a_folder_is_no_file(client: Client) -> None:
    for name, data in {"dog/": b"", "dog/sub/": b"", "dog/1.jpg": jpeg(), "dogs/2.jpg": jpeg()}.items():
        put(client, name, data)
    ledger = look()
    assert [row.path for row in ledger.rows] == ["1.jpg"]
    assert ledger.ok


def test_an_empty_folder(client: Client) -> None:
    put(client, "dog/", b"")
    assert codes(look()) == {"": "empty"}


def test_compressed_objects_are_refused(client: Client) -> None:
    blob = client.bucket("bucket").blob("dog/1.jpg")
    blob.content_encoding = "gzip"
    blob.upload_from_string(jpeg())
    put(client, "dog/2.jpg", jpeg())
    [finding] = look().errors
    assert (finding.code, finding.path) == ("unreadable", "1.jpg")
    assert "Content-Encoding gzip" in finding.message


def test_what_is_not_there(client: Client) -> None:
    put(client, "sets/cat/1.jpg", jpeg())
    put(client, "sets/dog.zip", b"PK")
    with pytest.raises(DatasetError, match=r"^gs://bucket/sets/dog: no such folder. gs://bucket/sets has: cat/, dog.z"):
        look("gs://bucket/sets/dog")
    with pytest.raises(DatasetError, match=r"gs://bucket/sets/dog.zip: is a file.*Unpack it first"):
        look("gs://bucket/sets/dog.zip")
    with pytest.raises(DatasetError, match="gs://bucket/none is empty"):
        look("gs://bucket/none/at")
    with pytest.raises(ProjectError, match=r"there is no bucket other.*gcloud storage buckets create gs://other"):
        look("gs://other/dog")


def test_streams_read_like_files(client: Client) -> None:
    data = random.Random(1).randbytes(900_000)
    put(client, "dog/1.jpg", data)
    put(client, "dog/small.jpg", data[:100])
    put(client, "dog/empty.jpg", b"")
    files = {file.path: file for file in BucketFolder(open_client(), "gs://bucket/dog").files()}
    for name, content in {"1.jpg": data, "small.jpg": data[:100], "empty.jpg": b""}.items():
        file = files[name]
        assert isinstance(file, BucketFile)
        with file.open() as ours, io.BytesIO(content) as other:
            assert ours.read() == content
            for step in range(150):
                draw = random.Random(step)
                place, whence = draw.choice([(draw.randrange(950_000), 0), (-draw.randrange(len(content) + 1), 2)])
                assert ours.seek(place, whence) == other.seek(place, whence)
                count = draw.choice([1, 100, 20_000, 400_000])
                assert ours.read(count) == other.read(count)
                assert ours.tell() == other.tell()
            with pytest.raises(ValueError, match="-1"):
                ours.seek(-1)


def test_a_file_replaced_meanwhile_is_not_mixed_with_the_other(storage: StorageServer) -> None:
    for name in ("1", "2"):
        storage.put("bucket", f"dog/{name}.jpg", jpeg())
    folder = BucketFolder(open_client(), "gs://bucket/dog")
    entries = list(folder.files())

    class Listed(BucketFolder):
        def files(self) -> Iterator[BucketFile | Obstacle]:
            return iter(entries)

    storage.put("bucket", "dog/2.jpg", jpeg(128))
    ledger = check_source(Listed(folder.client, folder.address), Layout.IMAGES, decode=False)
    assert [(finding.path, finding.code) for finding in ledger.errors] == [("2.jpg", "unreadable")]
    assert "changed or removed since" in ledger.errors[0].message


# --- faults ----------------------------------------------------------------------------------------------------------


def test_passing_faults_are_sat_out(storage: StorageServer) -> None:
    picture = jpeg(256)
    storage.put("bucket", "dog/1.jpg", picture)
    storage.fail("GET", r"/o\?", 503, times=1)
    storage.cut("dog/1.jpg", after=5000, times=1)
    assert len(look().examples) == 1


@pytest.mark.parametrize("what", [r"/o\?", "alt=media"], ids=["listing", "reading"])
def test_no_right_to_read_ends_the_check(storage: StorageServer, what: str) -> None:
    """Told once and not once for each picture."""
    storage.put("bucket", "dog/1.jpg", jpeg())
    storage.fail("GET", what, 403)
    with pytest.raises(
        ProjectError, match=r"not allowed \(The server was told to answer 403.\);.*roles/storage.objectViewer"
    ) as raised:
        look()
    assert "http://" not in str(raised.value)


def test_no_server(storage: StorageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtune.backends.storage.RETRY", None)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    with pytest.raises(
        ProjectError, match=r"^gs://bucket/dog: Cloud Storage does not answer .*\(Failed to [^()]*refused\); is it in"
    ):
        look()


# --- an output folder ------------------------------------------------------------------------------------------------


def test_names_in_a_folder(client: Client) -> None:
    for name in ("out/recipe.yaml", "out/", "out/samples/1.png", "out/samples/2.png", "outside"):
        put(client, name, b"x")
    assert list_names(client, "gs://bucket/out") == ["recipe.yaml", "samples/"]
    assert list_names(client, "gs://bucket") == ["out/", "outside"]
    assert list_names(client, "gs://bucket/none") == []
    with pytest.raises(ProjectError, match="no bucket other"):
        list_names(client, "gs://other/out")


def test_names_are_asked_for_once(storage: StorageServer) -> None:
    for number in range(1500):
        storage.put("bucket", f"out/{number:04}", b"")
    assert len(list_names(open_client(), "gs://bucket/out")) == 1000
    assert len(asked(storage)) == 1


def test_permissions(client: Client) -> None:
    assert can_write(client, "gs://bucket/out") == []
    with pytest.raises(ProjectError, match=r"no bucket other.*buckets create"):
        can_write(client, "gs://other/out")
    assert list_names(client, "gs://bucket") == []


def test_lacking_permissions_are_named(storage: StorageServer) -> None:
    storage.buckets["bucket"] = {}
    storage.denied = {"storage.objects.create", "storage.objects.delete"}
    assert can_write(open_client(), "gs://bucket/out") == ["storage.objects.create", "storage.objects.delete"]
    assert all(request.startswith("GET ") for request in storage.requests)


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_that_cannot_tell(storage: StorageServer, status: int) -> None:
    storage.buckets["bucket"] = {}
    storage.fail("GET", "testPermissions", status)
    assert can_write(open_client(), "gs://bucket/out") == []


def test_location(storage: StorageServer) -> None:
    storage.buckets["bucket"] = {}
    storage.locations["bucket"] = "EUROPE-WEST4"
    assert location(open_client(), "gs://bucket/out") == "EUROPE-WEST4"
    storage.fail("GET", "/b/bucket", 403)
    assert location(open_client(), "gs://bucket/out") is None
    with pytest.raises(ProjectError, match="no bucket other"):
        location(open_client(), "gs://other/out")


# --- the way there ---------------------------------------------------------------------------------------------------

OVERRIDE = "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE"


@pytest.mark.parametrize("path", ["", "/", "/storage/v1/"])
def test_the_variable_of_gcloud_leads_there_too(
    storage: StorageServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    """And the user's credentials stay here."""
    secret = {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "t"}
    (tmp_path / "key.json").write_text(json.dumps(secret))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv(OVERRIDE, storage.address + path)
    storage.put("bucket", "x", b"")
    assert list_names(open_client(), "gs://bucket") == ["x"]
    assert (len(asked(storage)), storage.authorizations) == (1, [])


def test_the_emulators_variable_goes_first(storage: StorageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put("bucket", "x", b"")
    monkeypatch.setenv(OVERRIDE, "http://127.0.0.1:1/")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.address.removeprefix("http://"))
    assert list_names(open_client(), "gs://bucket") == ["x"]


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST", OVERRIDE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(ProjectError, match="gcloud auth application-default login"):
        open_client()


@pytest.mark.parametrize(
    ("given", "meant"),
    {
        "http://127.0.0.1:8080": "http://127.0.0.1:8080/",
        "http://127.9.9.9//": "http://127.9.9.9/",
        "http://[::1]:80/v1/": "http://[::1]:80/v1/",
        "http://localhost/": "http://localhost/",
        "https://storage.example.com": "https://storage.example.com/",
        " ": None,
    }.items(),
)
def test_addresses_that_are_taken(monkeypatch: pytest.MonkeyPatch, given: str, meant: str | None) -> None:
    monkeypatch.setenv(OVERRIDE, given)
    assert override("storage") == meant
    assert override("aiplatform") is None


@pytest.mark.parametrize(
    "given",
    [
        "http://example.com/",
        "http://127.0.0.1.example.com/",
        "http://127.0.0.1@example.com/",
        "http://localhost.example.com/",
        "http://0.0.0.0/",
        "http://10.0.0.1/",
        "ftp://127.0.0.1/",
        "127.0.0.1:80",
        "http://[::1",
        "http://127.0.0.1:99999/",
        "https://x/?y",
    ],
)
def test_addresses_that_are_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv(OVERRIDE, given)
    with pytest.raises(ProjectError, match=OVERRIDE):
        open_client()


def test_who_is_shown_credentials() -> None:
    assert takes_credentials(None)
    assert takes_credentials("https://storage-mine.p.googleapis.com/")
    for other in ("https://storage.example.com/", "http://127.0.0.1/", "https://googleapis.com.example.com/"):
        assert not takes_credentials(other)


def test_endpoints_know_nothing_of_google() -> None:
    code = "import sys, sdtune.backends.endpoints; sys.exit('google.auth' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
