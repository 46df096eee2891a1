"""Runs that read from Cloud Storage and write to it, through Google's real client: what arrives, in which order, what
becomes of an earlier result, and what is told where it goes wrong."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdtune import events
from sdtune.methods import places
from sdtune.methods.catalog import METHODS
from sdtune.training import outbox
from sdtune.training.__main__ import main
from sdtune.training.components import store
from sdtune.training.components.checkpoint_files import Disk
from sdtune.training.components.fetch import FETCHED, folder_here
from sdtune.training.components.store import in_store
from sdtune.training.destinations import RUN_FOLDER
from sdtune.training.outbox import CURVES, Outbox, whole_size
from tests.conftest import DATASETS
from tests.servers.storage import StorageServer

RESULT = {".sdtune", "README.md", "dog_lora.safetensors", "pytorch_lora_weights.safetensors", "recipe.yaml"}
Train = Callable[..., tuple[int, list[events.Event], str]]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "FIRST_DELAY", 0.05)
    for name in (FETCHED, RUN_FOLDER):
        monkeypatch.setenv(name, "{}")
        monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def stored(storage: StorageServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all objects in the order in which they were stored."""
    names: list[str] = []
    put = storage.put

    def noting(bucket: str, name: str, data: bytes, **more: Any) -> Any:
        names.append(name)
        return put(bucket, name, data, **more)

    monkeypatch.setattr(storage, "put", noting)
    return names


@pytest.fixture
def dataset(storage: StorageServer) -> str:
    for picture in sorted((DATASETS / "images").iterdir())[:3]:
        storage.put("pets", f"dog/{picture.name}", picture.read_bytes())
    storage.put("pets", "dog/", b"")
    storage.put("pets", "dog-other/x.png", b"not of this folder")
    return "gs://pets/dog"


@pytest.fixture
def train(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> Train:
    """Trains in this process: exit code, events, everything printed."""

    def run(
        dataset: str,
        output: str | None = "gs://pets/dog_lora",
        *words: str,
        method: str = "dreambooth-lora",
        **more: Any,
    ) -> tuple[int, list[events.Event], str]:
        code = main(arguments(settings, dataset, output, *words, method=method, **more))
        printed = capsys.readouterr().out
        return code, [event for line in printed.splitlines() if (event := events.parse(line))], printed

    return run


def arguments(
    settings: dict[str, Any],
    dataset: str,
    output: str | None,
    *words: str,
    method: str = "dreambooth-lora",
    **more: Any,
) -> list[str]:
    wanted = {**settings, "num_samples": 0, "max_train_steps": 2, **more}
    fields = METHODS[method].model_fields
    recipe = METHODS[method].from_settings({name: wanted[name] for name in wanted if name in fields})
    place = [f"--output={output}"] if output else []
    return ["train", method, f"--dataset={dataset}", *place, *words, *recipe.to_args()]


def names(storage: StorageServer, start: str = "dog_lora/") -> set[str]:
    """Of the objects below ``start``, less the curves, whose names have the time in them."""
    found = [name.removeprefix(start) for name in storage.buckets["pets"] if name.startswith(start)]
    return {name for name in found if not name.startswith("logs/")}


def data(storage: StorageServer, name: str) -> bytes:
    return storage.buckets["pets"][name].data


def error(told: list[events.Event]) -> str:
    assert isinstance(told[-1], events.Failed)
    return told[-1].text


# --- from beginning to end --------------------------------------------------------------------------------------------


def test_a_run_from_a_bucket_to_a_bucket(
    storage: StorageServer, dataset: str, stored: list[str], train: Train, settings: dict[str, Any], tmp_path: Path
) -> None:
    storage.cut("dog/chelsea-1", after=1000, times=2)
    storage.fail("GET", "alt=media", 503, times=1)
    storage.fail("POST", "uploadType", 503, times=1)
    storage.drop("POST", "uploadType", after=100, times=1)
    code, told, printed = train(dataset, num_samples=1, max_train_steps=4)
    assert code == 0, printed
    assert told[0] == events.Phase("fetch", "Fetching the dataset (3 files) from gs://pets/dog, 1 MB")
    assert isinstance(told[-1], events.Finished)
    samples = {f"samples/step-{step:06}/prompt-0-sample-0.png" for step in (0, 4)}
    assert names(storage) == RESULT | samples | {"contact_sheet.png"}
    assert (stored[0], stored[-1]) == ("dog_lora/.sdtune", "dog_lora/recipe.yaml")
    assert stored.count("dog_lora/recipe.yaml") == stored.count("dog_lora/dog_lora.safetensors") == 1
    assert "dog_lora.safetensors" in data(storage, "dog_lora/.sdtune").decode().splitlines()
    artifacts = {event.kind: event.path for event in told if isinstance(event, events.Artifact)}
    assert artifacts["kohya_lora"] == "gs://pets/dog_lora/dog_lora.safetensors"
    assert {path.startswith("gs://pets/dog_lora/") for path in artifacts.values()} == {True}
    assert "gs://" not in data(storage, "dog_lora/README.md").decode()

    # The same as from a folder into a folder.
    (tmp_path / "dog").mkdir()
    for picture in sorted((DATASETS / "images").iterdir())[:3]:
        (tmp_path / "dog" / picture.name).write_bytes(picture.read_bytes())
    assert train(str(tmp_path / "dog"), str(tmp_path / "dog_lora"), max_train_steps=4, num_samples=1)[0] == 0
    for name in ("dog_lora.safetensors", "pytorch_lora_weights.safetensors", *samples):
        assert data(storage, f"dog_lora/{name}") == (tmp_path / "dog_lora" / name).read_bytes()

    # Curves are whole, and nothing is left on this disk but the copy of the dataset.
    (curve,) = (name for name in storage.buckets["pets"] if name.startswith("dog_lora/logs/"))
    (tmp_path / "curves").mkdir()
    (tmp_path / "curves" / curve.rpartition("/")[2]).write_bytes(data(storage, curve))
    points = EventAccumulator(str(tmp_path / "curves")).Reload()
    assert points.Scalars("train/loss")[-1].step == 4
    assert points.Scalars("held_out_loss")[-1].step == 4
    assert not list((tmp_path / "cache" / "runs").iterdir())


def test_the_mounts_path_is_the_buckets(storage: StorageServer, dataset: str, train: Train) -> None:
    code, told, printed = train("/gcs/pets/dog/", "/gcs/pets/a/dog_lora")
    assert code == 0, printed
    assert names(storage, "a/dog_lora/") == RESULT
    assert any(
        isinstance(event, events.Artifact) and event.path == "gs://pets/a/dog_lora/recipe.yaml" for event in told
    )


def test_without_googles_client_the_mount_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gcs" / "pets" / "dog").mkdir(parents=True)
    place = f"{tmp_path}/gcs/pets/dog"
    monkeypatch.setattr(places, "MOUNT", f"{tmp_path}/gcs")
    assert in_store(place) == "gs://pets/dog"
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    assert in_store(place) is None
    assert folder_here(place, "dataset") == Path(place)
    assert in_store("gs://pets/dog") == "gs://pets/dog"
    monkeypatch.setattr(places, "MOUNT", f"{tmp_path}/nothing-is-mounted")
    assert in_store(f"{tmp_path}/nothing-is-mounted/pets/dog") == "gs://pets/dog"


def test_class_pictures_come_from_a_bucket_and_drawn_ones_stay_there(
    storage: StorageServer, dataset: str, train: Train, stored: list[str]
) -> None:
    for number in range(2):
        storage.put("pets", f"dogs/{number}.jpg", data(storage, f"dog/chelsea-{number + 1}.jpg"))
    more: dict[str, Any] = {
        "with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 3, "class_data_dir": "gs://pets/dogs"
    }  # fmt: skip
    code, told, printed = train(dataset, **more)
    assert code == 0, printed
    phases = [event for event in told if isinstance(event, events.Phase)]
    assert "Fetching the class pictures (2 files) from gs://pets/dogs, 1 MB" in [phase.text for phase in phases]
    (drawn,) = (name for name in names(storage) if name.startswith("class_pictures/"))
    assert yaml.safe_load(data(storage, "dog_lora/recipe.yaml"))["class_data_dir"] == "gs://pets/dogs"
    # They are drawn once: the next run into the same place has them.
    code, told, printed = train(dataset, "gs://pets/dog_lora", "--overwrite=again", **more)
    assert code == 0, printed
    assert stored.count(f"dog_lora/{drawn}") == 1
    assert "class pictures of an earlier run" in " ".join(
        event.text for event in told if isinstance(event, events.Phase)
    )


def test_several_processes_share_one_copy(
    storage: StorageServer, dataset: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    words = arguments(settings, dataset, "gs://pets/dog_lora", "--processes=2", train_batch_size=1)
    ran = subprocess.run([sys.executable, "-m", "sdtune.training", *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert len([request for request in storage.requests if "alt=media" in request and "/dog/" in request]) == 3
    assert names(storage) == RESULT
    assert ran.stdout.count('"event": "finished"') == 1
    assert not list((tmp_path / "cache" / "runs").iterdir())


def test_vertex_says_where_the_output_is(
    storage: StorageServer, dataset: str, train: Train, monkeypatch: pytest.MonkeyPatch, stored: list[str]
) -> None:
    code, told, _ = train(dataset, None)
    assert (code, "output: missing; give --output" in error(told)) == (2, True)
    monkeypatch.setenv("AIP_MODEL_DIR", "gs://pets/job/model/")
    monkeypatch.setenv("AIP_TENSORBOARD_LOG_DIR", "gs://pets/job/logs/")
    code, told, printed = train(dataset, None)
    assert code == 0, printed
    assert "model.safetensors" in names(storage, "job/model/")
    curves = [name for name in stored if "tfevents" in name]
    assert {name.rpartition("/")[0] for name in curves} == {"job/model/logs", "job/logs"}
    # As sdtune starts its own jobs both are one place.
    stored.clear()
    assert train(dataset, "gs://pets/job")[0] == 0
    assert {name.rpartition("/")[0] for name in stored if "tfevents" in name} == {"job/logs"}


# --- an earlier result ------------------------------------------------------------------------------------------------


def test_nothing_of_an_earlier_result_is_left(storage: StorageServer, dataset: str, train: Train) -> None:
    assert train(dataset, save_bin=True, num_samples=1)[0] == 0
    assert {"pytorch_lora_weights.bin", "contact_sheet.png", "samples/step-000002/prompt-0-sample-0.png"} <= names(
        storage
    )
    (curve,) = (name for name in storage.buckets["pets"] if "tfevents" in name)
    storage.put("pets", "dog_lora/mine.safetensors", b"mine")
    storage.put("pets", "dog_lora/samples/mine.png", b"mine")
    storage.requests.clear()

    code, _, printed = train(
        dataset, "gs://pets/dog_lora", "--overwrite=again", method="peft-dreambooth-lora", adapter="oft", rank=8
    )
    assert code == 0, printed
    adapter = {"unet/adapter_config.json", "unet/adapter_model.safetensors"}
    mine = {"mine.safetensors", "samples/mine.png"}
    assert names(storage) == {".sdtune", "README.md", "recipe.yaml", *adapter, *mine}
    assert curve not in storage.buckets["pets"]
    gone = [request for request in storage.requests if request.startswith("DELETE")]
    assert "recipe.yaml" in gone[0]


def test_a_run_that_fails_leaves_the_earlier_result_and_shows_its_curves(
    storage: StorageServer, dataset: str, train: Train
) -> None:
    assert train(dataset)[0] == 0
    before = data(storage, "dog_lora/dog_lora.safetensors")
    code, told, _ = train(dataset, "gs://pets/dog_lora", "--overwrite=again", learning_rate=1e-30, num_samples=1)
    assert (code, "nothing was learned" in error(told)) == (5, True)
    assert data(storage, "dog_lora/dog_lora.safetensors") == before
    assert "recipe.yaml" not in names(storage)
    assert "samples/step-000000/prompt-0-sample-0.png" in names(storage)
    assert len([name for name in storage.buckets["pets"] if "tfevents" in name]) == 1
    # What lies there is still known to be ours.
    third = train(
        dataset, "gs://pets/dog_lora", "--overwrite=once more", method="peft-dreambooth-lora", adapter="oft", rank=8
    )
    assert third[0] == 0
    assert "dog_lora.safetensors" not in names(storage)


def test_a_run_that_cannot_begin_leaves_everything(storage: StorageServer, dataset: str, train: Train) -> None:
    assert train(dataset)[0] == 0
    before = {name: object.data for name, object in storage.buckets["pets"].items()}
    assert train(dataset, "gs://pets/dog_lora", "--overwrite=again", target_modules=["nope"])[0] == 5
    assert {name: object.data for name, object in storage.buckets["pets"].items()} == before


def test_a_stopped_run_uploads_what_is_whole(
    storage: StorageServer, dataset: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    words = arguments(settings, dataset, "gs://pets/dog_lora", max_train_steps=100_000, num_samples=1)
    process = subprocess.Popen([sys.executable, "-m", "sdtune.training", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if '"step"' in line and '"event": "step"' in line:
            break
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    process.stdout.read()
    assert process.wait(timeout=30) == 143
    assert time.monotonic() - started < 10
    left = names(storage)
    assert {name for name in left if not name.startswith("checkpoints/")} == {
        ".sdtune", "samples/step-000000/prompt-0-sample-0.png"
    }  # fmt: skip
    assert [name for name in left if name.endswith("/manifest.json")]
    assert len([name for name in storage.buckets["pets"] if "tfevents" in name]) == 1
    assert not list((tmp_path / "cache" / "runs").iterdir())


def test_a_checkpoint_waits_for_the_disk_only_where_it_stays(
    dataset: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[bool] = []
    write = Disk.write

    def noting(disk: Disk, file: Path, content: Any) -> tuple[int, str]:
        waited.append(disk.durable)
        return write(disk, file, content)

    monkeypatch.setattr(Disk, "write", noting)
    for output, waits in (("gs://pets/dog_lora", False), (str(tmp_path / "out"), True)):
        waited.clear()
        assert train(dataset, output)[0] == 0
        assert set(waited) == {waits}


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["gs://nowhere/dog_lora", "gs://pets/dog_lora"])
def test_who_may_not_write_is_told_before_anything_is_trained(
    storage: StorageServer, dataset: str, train: Train, output: str
) -> None:
    if output.startswith("gs://pets/"):
        storage.fail("POST", "uploadType", 403)
    code, told, _ = train(dataset, output)
    assert code == 3
    assert output in error(told)
    assert ("roles/storage.objectAdmin" if "pets" in output else "bucket does not exist") in error(told)
    assert not [event for event in told if isinstance(event, events.Phase) and event.name != "fetch"]


def test_a_whole_bucket_is_no_output(storage: StorageServer, dataset: str, train: Train) -> None:
    code, told, _ = train(dataset, "gs://pets")
    assert (code, "gs://pets is a whole bucket; wanted a folder in it" in error(told)) == (2, True)


@pytest.mark.parametrize("status", [403, 503])
def test_a_result_that_cannot_be_uploaded_stays_on_the_disk(
    storage: StorageServer, dataset: str, train: Train, monkeypatch: pytest.MonkeyPatch, status: int, tmp_path: Path
) -> None:
    monkeypatch.setattr(outbox, "SECONDS_TO_RETRY", 0.3)
    emit = events.emit

    def failing(event: events.Event) -> None:
        emit(event)
        if isinstance(event, events.Phase) and event.name == "save":
            storage.fail("POST", "uploadType", status)

    monkeypatch.setattr(events, "emit", failing)
    # The mark is rewritten right after that, so the fault must begin with the file that comes then.
    monkeypatch.setattr(Outbox, "send_now", lambda self, name: None)
    storage.put("pets", "dog_lora/.sdtune", b"The output of a run\n")
    code, told, _ = train(dataset)
    assert code == 6, told[-3:]
    text = error(told)
    assert "could not be uploaded to gs://pets/dog_lora; on the machine of the run they are whole in " in text
    (folder,) = (tmp_path / "cache" / "runs").glob("*/dog_lora")
    assert str(folder) in text
    assert (folder / "dog_lora.safetensors").is_file()
    assert "recipe.yaml" not in names(storage)


@pytest.mark.parametrize(
    ("name", "words"),
    [("dog/../../x.png", "has an object named '../../x.png', which is no path"), ("dog//x.png", "named '/x.png'")],
)
def test_no_name_leads_out_of_the_folder(
    storage: StorageServer, dataset: str, train: Train, name: str, words: str, tmp_path: Path
) -> None:
    storage.put("pets", name, b"x")
    code, told, _ = train(dataset)
    assert (code, words in error(told)) == (2, True)
    assert not (tmp_path / "cache" / "datasets").exists()


@pytest.mark.parametrize(
    ("setting", "address", "words"),
    [
        ("dataset", "gs://pets/cats", "dataset: gs://pets/cats: there is nothing in this folder of the bucket"),
        ("dataset", "gs://nowhere/cats", "dataset: gs://nowhere/cats: not found"),
        ("class_data_dir", "gs://pets/cats", "class_data_dir: gs://pets/cats: there is nothing in this folder"),
    ],
)
def test_a_dataset_that_is_not_there_is_named(
    storage: StorageServer, dataset: str, train: Train, setting: str, address: str, words: str
) -> None:
    more = {"with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": address}
    code, told, _ = train(address) if setting == "dataset" else train(dataset, **more)
    assert (code, words in error(told)) == (2, True), error(told)


def test_a_dataset_that_may_not_be_read(storage: StorageServer, dataset: str, train: Train) -> None:
    storage.fail("GET", "prefix=dog/", 403)
    code, told, _ = train(dataset)
    assert code == 2
    assert "dataset: gs://pets/dog may not be read" in error(told)
    assert "roles/storage.objectViewer" in error(told)


def test_a_picture_that_arrives_damaged_is_not_trained_on(storage: StorageServer, dataset: str, train: Train) -> None:
    picture = data(storage, "dog/chelsea-1.jpg")
    storage.put("pets", "dog/chelsea-1.jpg", picture, crc32c=base64.b64encode(b"four").decode())
    code, told, _ = train(dataset)
    assert (code, "chelsea-1.jpg arrived damaged" in error(told)) == (5, True)


def test_a_finding_names_the_bucket(storage: StorageServer, train: Train) -> None:
    storage.put("pets", "dog/x.png", b"no picture")
    code, told, _ = train("gs://pets/dog")
    assert code == 2
    assert error(told).startswith("gs://pets/dog: ")


def test_a_changed_dataset_is_fetched_beside_the_old_one(
    storage: StorageServer, dataset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = folder_here(dataset, "dataset")
    assert old.name == "dog"
    assert folder_here(dataset, "dataset") == old
    before = len(storage.requests)
    monkeypatch.setenv(FETCHED, json.dumps({dataset: str(old)}))
    assert folder_here(dataset, "dataset") == old
    assert len(storage.requests) == before  # a process that was started by another asks nothing
    monkeypatch.delenv(FETCHED)
    storage.put("pets", "dog/chelsea-1.jpg", b"changed")
    new = folder_here(dataset, "dataset")
    assert ((new / "chelsea-1.jpg").read_bytes(), new == old) == (b"changed", False)


# --- the outbox -------------------------------------------------------------------------------------------------------


def test_what_grows_is_uploaded_now_and_then(
    storage: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: list[str]
) -> None:
    monkeypatch.setattr(outbox, "SECONDS_BETWEEN_UPLOADS", 0.02)
    storage.put("pets", "x", b"")
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "notes.txt").write_text("not of the kind")
    (tmp_path / "run" / "samples" / ".b.png.partial-1").write_bytes(b"half")
    with Outbox(tmp_path / "run", "gs://pets/run") as box:
        for content in (b"one", b"two and more"):
            (tmp_path / "run" / "samples" / "a.png").write_bytes(content)
            wait_for(
                lambda content=content: "run/samples/a.png" in stored and data(storage, "run/samples/a.png") == content
            )
        count = len(stored)
        time.sleep(0.1)
        assert len(stored) == count  # what has not changed is not sent again
        box.finish()
    assert names(storage, "run/") == {"samples/a.png"}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_newest_content_stays(storage: StorageServer, tmp_path: Path) -> None:
    storage.put("pets", "x", b"")
    storage.delay = 0.1
    file = tmp_path / "model.safetensors"
    with Outbox(tmp_path, "gs://pets/run") as box:
        for number in range(3):
            file.write_bytes(bytes([number]) * (number + 1))
            box.send(["model.safetensors"])
            time.sleep(0.03)
        box.finish()
    assert data(storage, "run/model.safetensors") == b"\2\2\2"


def test_a_large_file_breaks_and_arrives(
    storage: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK", 1 << 20)
    storage.put("pets", "x", b"")
    storage.fail("PUT", "upload_id", 503, times=1)
    storage.drop("PUT", "upload_id", after=300_000)
    content = os.urandom(9_000_000)
    (tmp_path / "model.safetensors").write_bytes(content)
    with Outbox(tmp_path, "gs://pets/run") as box:
        box.send(["model.safetensors"])
        box.finish()
    assert data(storage, "run/model.safetensors") == content


def test_only_whole_records_of_a_curve_are_uploaded(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for step in range(3):
            writer.add_scalar("loss", 1.0, step)
    (curve,) = tmp_path.glob(CURVES)
    content = curve.read_bytes()
    assert whole_size(curve) == len(content)
    curve.write_bytes(content[:-1])
    last = whole_size(curve)
    assert 0 < last < len(content) - 1
    curve.write_bytes(content[: last + 5])
    assert whole_size(curve) == last
    curve.write_bytes(content[:7])
    assert whole_size(curve) == 0


def test_an_object_of_a_mark_is_below_its_folder(storage: StorageServer, dataset: str, train: Train) -> None:
    storage.put("pets", "dog_lora/.sdtune", b"The output of a run\n../dog/chelsea-1.jpg\n/dog/chelsea-2.jpg\n")
    assert train(dataset)[0] == 0
    assert {"chelsea-1.jpg", "chelsea-2.jpg"} <= names(storage, "dog/")


def test_curves_that_cannot_go_where_vertex_wants_them_are_a_warning(
    storage: StorageServer, dataset: str, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AIP_TENSORBOARD_LOG_DIR", "gs://nowhere/logs/")
    code, told, printed = train(dataset, str(tmp_path / "out"))
    assert code == 0, printed
    warnings = [event.text for event in told if isinstance(event, events.Note) and event.level == "warning"]
    assert len(warnings) == 1
    assert "gs://nowhere/logs/events.out" in warnings[0]
    assert (tmp_path / "out" / "recipe.yaml").is_file()


def test_a_signal_waits_for_what_is_on_its_way(storage: StorageServer, tmp_path: Path) -> None:
    storage.put("pets", "x", b"")
    storage.delay = 0.1
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    with pytest.raises(KeyboardInterrupt), Outbox(tmp_path, "gs://pets/run") as box:  # noqa: PT012
        box.send(["model.safetensors"])
        raise KeyboardInterrupt
    assert data(storage, "run/model.safetensors") == b"whole"


def test_but_not_for_ever(
    storage: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outbox, "SECONDS_AFTER_SIGNAL", 0.2)
    storage.put("pets", "x", b"")
    storage.fail("POST", "uploadType", 503)
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Outbox(tmp_path, "gs://pets/run") as box:  # noqa: PT012
        box.send(["model.safetensors"])
        raise KeyboardInterrupt
    assert time.monotonic() - started < 5
    assert "could not be uploaded to gs://pets/run" in capsys.readouterr().out
    assert "run/model.safetensors" not in storage.buckets["pets"]
