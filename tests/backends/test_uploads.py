"""Local files into a bucket: only what is missing, whole, and under an address that their content decides.

By Google's own client, on the emulator and on our server; faults are ordered from the latter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from google.cloud.storage import Client

from sdtune.backends.storage import open_client
from sdtune.backends.uploads import CHUNK, THREAD, Upload, Uploaded, plan_upload
from sdtune.errors import DatasetError, ProjectError
from sdtune.methods.sources import LocalFile, LocalFolder
from tests.servers.emulator import Emulator
from tests.servers.storage import StorageServer

PREFIX = "gs://bucket/sdtune/datasets"
CONTENTS = {
    "1.jpg": b"one" * 1000,
    "2.jpg": b"two" * 1000,
    "with space ä犬.txt": "ein Hund, 犬".encode(),
    "10_sks dog/#1?%2F&+.png": os.urandom(5000),
    "10_sks dog/empty.txt": b"",
}


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


@pytest.fixture
def bucket(storage: StorageServer) -> dict[str, object]:
    """Of our server, for faults."""
    return storage.buckets.setdefault("bucket", {})  # type: ignore[return-value]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "dog", CONTENTS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where addresses of uploads are noted."""
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def plan(folder: Path) -> Upload:
    names = [entry.path for entry in LocalFolder(folder).files() if isinstance(entry, LocalFile)]
    return plan_upload(folder, PREFIX, names)


def stored(client: Client, address: str) -> dict[str, bytes]:
    start = address.removeprefix("gs://bucket/") + "/"
    blobs = client.list_blobs("bucket", prefix=start)
    return {blob.name.removeprefix(start): blob.download_as_bytes() for blob in blobs}


# --- addresses -------------------------------------------------------------------------------------------------------


def test_the_content_decides_the_address(folder: Path, tmp_path: Path) -> None:
    first = plan(folder).address
    assert first.startswith(f"{PREFIX}/dog-")
    assert len(first) == len(f"{PREFIX}/dog-") + 16
    assert plan(shutil.copytree(folder, tmp_path / "elsewhere" / "dog")).address == first
    assert plan(shutil.copytree(folder, tmp_path / "cat")).address.rpartition("-")[2] == first.rpartition("-")[2]
    for change in ({"1.jpg": b"other"}, {"new.jpg": b"one" * 1000}):
        other = shutil.copytree(folder, tmp_path / f"{len(change)}{next(iter(change))}" / "dog")
        assert plan(written(other, change)).address not in (first, None)
    (folder / "1.jpg").rename(folder / "renamed.jpg")
    assert plan(folder).address != first


def test_a_folder_with_a_name_that_wildcards_read(tmp_path: Path) -> None:
    assert plan(written(tmp_path / "my dog [1]?", {"x": b"x"})).address.startswith(f"{PREFIX}/my_dog__1__-")


def test_planning_knows_nothing_of_google(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sdtune.backends.uploads import plan_upload\n"
        "assert plan_upload(Path(sys.argv[1]), 'gs://b/x', ['1.jpg']).size == 3000\n"
        "sys.exit(any(name.startswith(('google.auth', 'google.cloud.storage', 'requests')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0


def test_what_cannot_be_planned(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nothing to upload"):
        plan_upload(folder, PREFIX, [])
    with pytest.raises(DatasetError, match=r"gone.jpg cannot be read \(No such file"):
        plan_upload(folder, PREFIX, ["1.jpg", "gone.jpg"])
    (tmp_path / "secret").write_bytes(b"x")
    (folder / "link.jpg").symlink_to(tmp_path / "secret")
    for name in ("link.jpg", "../secret"):
        with pytest.raises(DatasetError, match="leads out of the folder"):
            plan_upload(folder, PREFIX, [name])
    with pytest.raises(DatasetError, match="too long"):
        plan_upload(folder, f"gs://bucket/{'x' * 1000}", ["1.jpg"])


# --- uploading -------------------------------------------------------------------------------------------------------


def test_all_arrives_and_nothing_is_sent_twice(client: Client, folder: Path, tmp_path: Path) -> None:
    (folder / "out.jpg").symlink_to("/etc/hostname")  # what the check of the dataset leaves out
    (folder / "in.jpg").symlink_to("2.jpg")
    expected = CONTENTS | {"in.jpg": CONTENTS["2.jpg"]}
    size = sum(map(len, expected.values()))
    told: list[tuple[int, int]] = []
    done = plan(folder).run(client, lambda *now: told.append(now))
    assert done == Uploaded(plan(folder).address, files=6, bytes_sent=size, skipped=0, copied=0)
    assert stored(client, done.address) == expected
    assert told[-1] == (size, size)
    assert [now for now, _ in told] == sorted(now for now, _ in told)
    assert client.bucket("bucket").get_blob(f"{done.address.removeprefix('gs://bucket/')}/1.jpg").content_type == (
        "image/jpeg"
    )
    assert plan(folder).run(client) == Uploaded(done.address, files=6, bytes_sent=0, skipped=6, copied=0)


def test_of_a_changed_folder_only_what_changed_is_sent(client: Client, folder: Path) -> None:
    first = plan(folder).run(client)
    written(folder, {"1.jpg": b"new"})
    (folder / "2.jpg").rename(folder / "moved.jpg")
    second = plan(folder).run(client)
    assert second == Uploaded(plan(folder).address, files=5, bytes_sent=3, skipped=0, copied=4)
    assert stored(client, second.address) == {
        **{name: data for name, data in CONTENTS.items() if name != "2.jpg"},
        "1.jpg": b"new",
        "moved.jpg": CONTENTS["2.jpg"],
    }
    assert stored(client, first.address) == CONTENTS


def test_a_single_file(client: Client, tmp_path: Path) -> None:
    file = written(tmp_path, {"base model.safetensors": b"weights", "other": b""}) / "base model.safetensors"
    done = plan_upload(file, PREFIX, [file.name]).run(client)
    assert done.address.startswith(f"{PREFIX}/base_model.safetensors-")
    assert done.address.endswith("/base model.safetensors")
    assert stored(client, done.address.rpartition("/")[0]) == {"base model.safetensors": b"weights"}


def test_large_files_go_in_parts(client: Client, tmp_path: Path) -> None:
    data = os.urandom(2 * CHUNK + 12345)
    told: list[int] = []
    done = plan(written(tmp_path / "m", {"model.bin": data})).run(client, lambda now, _: told.append(now))
    assert stored(client, done.address) == {"model.bin": data}
    assert told == sorted(told)


@pytest.mark.parametrize("size", [1000, CHUNK + 1000], ids=["small", "large"])
@pytest.mark.parametrize("change", ["content", "gone", "shorter"])
def test_files_that_change_meanwhile(client: Client, tmp_path: Path, change: str, size: int) -> None:
    """Nothing of them stays in the bucket: the address would promise another content."""
    folder = written(tmp_path / "dog", {"1.jpg": os.urandom(size)})
    planned = plan(folder)
    match change:
        case "content":
            (folder / "1.jpg").write_bytes(os.urandom(size))
        case "gone":
            (folder / "1.jpg").unlink()
        case "shorter":
            (folder / "1.jpg").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"dog/1.jpg (has changed while|cannot be read)"):
        planned.run(client)
    assert stored(client, planned.address) == {}


def test_what_does_not_belong_there_is_told(client: Client, folder: Path) -> None:
    planned = plan(folder)
    start = planned.address.removeprefix("gs://bucket/")
    client.bucket("bucket").blob(f"{start}/1.jpg").upload_from_string(b"damaged")
    client.bucket("bucket").blob(f"{start}/").upload_from_string(b"")
    planned.run(client)
    assert stored(client, planned.address) == CONTENTS | {"": b""}
    client.bucket("bucket").blob(f"{start}/strange.jpg").upload_from_string(b"x")
    with pytest.raises(ProjectError, match=r"strange.jpg is not of .*/dog.*gcloud storage rm --recursive gs://bucket/"):
        planned.run(client)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_passing_faults_are_sat_out(storage: StorageServer, bucket: object, tmp_path: Path) -> None:
    contents = {"small.jpg": os.urandom(50_000), "large.bin": os.urandom(3 * CHUNK - 1)}
    storage.fail("GET", r"/o\?", 503, times=1)
    storage.fail("POST", "uploadType=multipart", 503, times=1)
    storage.drop("POST", "uploadType=multipart")
    storage.fail("POST", "uploadType=resumable", 503, times=1)
    storage.fail("PUT", "upload_id", 503, times=1)
    storage.drop("PUT", "upload_id", after=CHUNK // 2)
    done = plan(written(tmp_path / "dog", contents)).run(open_client())
    assert stored(open_client(), done.address) == contents
    # Three parts, the first of them again, and what is left of it; and twice the question how much is there.
    assert sum(request.startswith("PUT ") for request in storage.requests) <= 8
    assert sum(length for length in storage.put_lengths) < 5 * CHUNK


def test_an_interrupted_upload_goes_on(storage: StorageServer, bucket: dict[str, object], folder: Path) -> None:
    storage.fail("POST", "uploadType", 403, times=1)
    planned = plan(folder)
    with pytest.raises(ProjectError, match=r"told to answer 403.*--role=roles/storage.objectUser"):
        planned.run(open_client())
    # The other threads end what they had begun, and begin nothing more: how much that was depends on the machine.
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(30)
    start = planned.address.removeprefix("gs://bucket/") + "/"
    there = {name.removeprefix(start) for name in bucket}
    assert there < set(CONTENTS)
    storage.requests.clear()
    done = plan(folder).run(open_client())
    assert (done.skipped, done.copied) == (len(there), 0)
    sent = [request for request in storage.requests if request.startswith("POST ")]
    assert len(sent) == len(CONTENTS) - len(there)
    assert stored(open_client(), done.address) == CONTENTS


@pytest.mark.parametrize("note", ["good", "gone", "of another host", "unreadable"])
def test_a_large_file_goes_on_in_the_next_process(
    storage: StorageServer, bucket: object, tmp_path: Path, cache: Path, note: str
) -> None:
    """Where the first was killed after two parts; where nothing good was noted, from the beginning."""
    contents = {"model.bin": os.urandom(4 * CHUNK)}
    planned = plan(written(tmp_path / "m", contents))
    killed = (
        "import os, sys; from pathlib import Path; from sdtune.backends.storage import open_client\n"
        "from sdtune.backends import resumable; from sdtune.backends.uploads import CHUNK, plan_upload\n"
        "put = resumable.PartedUpload._put\n"
        "def until(self, data, part):\n"
        "    if f'bytes {2 * CHUNK}-' in part: os._exit(9)\n"
        "    return put(self, data, part)\n"
        "resumable.PartedUpload._put = until\n"
        "plan_upload(Path(sys.argv[1]), sys.argv[2], ['model.bin']).run(open_client())"
    )
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path / "m"), PREFIX], check=False).returncode == 9
    [noted] = (cache / "uploads").iterdir()
    assert noted.stat().st_mode & 0o777 == 0o600
    match note:
        case "gone":
            storage.fail("PUT", "upload_id=upload-0", 410, times=1)
        case "of another host":
            noted.write_text("https://elsewhere.example/upload?upload_id=1")
        case "unreadable":
            noted.write_bytes(b"\xff\xfe")
    storage.put_lengths.clear()
    done = planned.run(open_client())
    assert stored(open_client(), done.address) == contents
    assert sum(storage.put_lengths) == (2 if note == "good" else 4) * CHUNK
    assert not list((cache / "uploads").iterdir())


def test_a_second_run_lists_once(storage: StorageServer, bucket: object, folder: Path) -> None:
    plan(folder).run(open_client())
    storage.requests.clear()
    plan(folder).run(open_client())
    assert [request.split("?")[0] for request in storage.requests if "/o" in request] == ["GET /storage/v1/b/bucket/o"]


def test_two_runs_at_once(storage: StorageServer, bucket: object, folder: Path) -> None:
    """Both find nothing and send all; what the other has written is left, as it is the same."""
    storage.delay = 0.05
    done: list[Uploaded] = []
    threads = [Thread(target=lambda: done.append(plan(folder).run(open_client()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.files for one in done] == [5, 5]
    assert stored(open_client(), done[0].address) == CONTENTS


def test_nothing_is_overwritten_unseen(storage: StorageServer, bucket: dict[str, object], folder: Path) -> None:
    planned = plan(folder)
    damaged = storage.put("bucket", f"{planned.folder.removeprefix('gs://bucket/')}/1.jpg", b"damaged")
    planned.run(open_client())
    sent = [request for request in storage.requests if request.startswith("POST ")]
    assert sum("ifGenerationMatch=0" in request for request in sent) == 4
    assert sum(f"ifGenerationMatch={damaged.generation}" in request for request in sent) == 1


def test_another_writer_with_another_content(storage: StorageServer, bucket: object, folder: Path) -> None:
    storage.fail("POST", "uploadType", 412, times=1)
    with pytest.raises(ProjectError, match="is not what was sent; has someone else written there"):
        plan(folder).run(open_client())


def test_an_older_version_that_goes_away(storage: StorageServer, bucket: object, folder: Path) -> None:
    plan(folder).run(open_client())
    written(folder, {"1.jpg": b"new"})
    storage.fail("POST", "rewriteTo", 404, times=1)
    assert stored(open_client(), plan(folder).run(open_client()).address) == CONTENTS | {"1.jpg": b"new"}


def test_composed_objects_have_no_md5(storage: StorageServer, folder: Path) -> None:
    """What gcloud has put together from parts is known by its CRC32C."""
    planned = plan(folder)
    for name, data in CONTENTS.items():
        storage.put("bucket", f"{planned.folder.removeprefix('gs://bucket/')}/{name}", data, md5Hash=None)
    assert planned.run(open_client()).skipped == 5


def test_no_bucket(storage: StorageServer, folder: Path) -> None:
    with pytest.raises(ProjectError, match=r"no bucket bucket.*gcloud storage buckets create gs://bucket"):
        plan(folder).run(open_client())


def test_ctrl_c_waits_for_nobody(storage: StorageServer, bucket: object, folder: Path) -> None:
    client = open_client()
    planned = plan(folder)

    def interrupt(done: int, total: int) -> None:
        storage.delay = 10.0
        if any(request.startswith("POST ") for request in storage.requests):
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        planned.run(client, interrupt)
    assert time.monotonic() - started < 5
