"""Base models out of a bucket, through Google's real client, and from where a bucket is mounted."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdtune import events
from sdtune.errors import ProjectError, RecipeError, TrainingError
from sdtune.methods import base_models
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components import copying
from sdtune.training.components.base_model_copy import base_model_here
from tests.conftest import BASE_MODEL
from tests.servers.storage import StorageServer
from tests.training.conftest import EntryPoint
from tests.training.test_entry import arguments

pytestmark = pytest.mark.usefixtures("small")

NEEDED = {path.relative_to(BASE_MODEL).as_posix(): path for path in sorted(BASE_MODEL.rglob("*.*")) if path.is_file()}
NEEDED = {name: path for name, path in NEEDED.items() if "/" in name or name == "model_index.json"}
NOT_READ = (
    "v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack", "vae/model.onnx",
    "safety_checker/model.safetensors", "safety_checker/config.json", "README.md", "unet/deeper/config.json", "",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "base-models"


@pytest.fixture
def model(storage: StorageServer) -> str:
    """The shipped base model as a careless upload: with much that nothing reads."""
    for name, path in NEEDED.items():
        storage.put("models", f"tiny/{name}", path.read_bytes())
    for name in NOT_READ:
        storage.put("models", f"tiny/{name}", b"not to be read")
    storage.put("models", "tiny-other/model_index.json", b"{}")
    return "gs://models/tiny"


def here(base_model: str, **more: Any) -> Path:
    found = base_model_here(DreamBoothLora(instance_prompt="x", base_model=base_model, **more))
    assert found.path is not None
    return found.path


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def downloads(storage: StorageServer) -> list[str]:
    return [request for request in storage.requests if "alt=media" in request]


@pytest.mark.parametrize("address", ["gs://models/tiny", "gs://models/tiny/", "/gcs/models/tiny"])
def test_a_folder_is_fetched_once_and_only_what_is_read(
    storage: StorageServer, model: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here(address)
    assert files(folder) == {name: path.read_bytes() for name, path in NEEDED.items()}
    told = [events.parse(line) for line in capsys.readouterr().out.splitlines()]
    size = math.ceil(sum(path.stat().st_size for path in NEEDED.values()) / 1_000_000)
    assert told[0] == events.Phase("fetch", f"Fetching the base model from {model}, {size} MB")
    assert told[-1] == events.Progress("fetch", size, size)
    fetched = len(downloads(storage))
    assert here(address) == folder
    assert (len(downloads(storage)), capsys.readouterr().out) == (fetched, "")


def test_a_model_at_the_top_of_its_bucket(storage: StorageServer) -> None:
    for name, path in NEEDED.items():
        storage.put("tiny-model", name, path.read_bytes())
    assert sorted(files(here("gs://tiny-model"))) == sorted(NEEDED)


def test_a_changed_model_is_fetched_anew_beside_the_old_one(storage: StorageServer, model: str) -> None:
    old = here(model)
    storage.put("models", "tiny/scheduler/scheduler_config.json", b'{"new": 1}')
    storage.put("models", "tiny/README.md", b"changed, but nobody reads it")
    new = here(model)
    assert (new / "scheduler" / "scheduler_config.json").read_bytes() == b'{"new": 1}'
    assert sorted(files(old)) == sorted(files(new))
    assert (old / "scheduler" / "scheduler_config.json").read_bytes() != b'{"new": 1}'


def test_a_file(storage: StorageServer, cache: Path) -> None:
    storage.put("models", "a/sd.safetensors", b"one")
    storage.put("models", "a/sd.safetensors.json", b"another")
    first = here("gs://models/a/sd.safetensors")
    assert (first.name, first.read_bytes()) == ("sd.safetensors", b"one")
    storage.put("models", "a/sd.safetensors", b"two")
    assert (here("gs://models/a/sd.safetensors").read_bytes(), first.read_bytes()) == (b"two", b"one")
    assert len(files(cache)) == 2


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("gs://nowhere/tiny", TrainingError, "gs://nowhere/tiny: not found .*bucket does not exist.*check the name"),
        ("gs://nowhere/a.ckpt", TrainingError, "no such object; check bucket and path"),
        ("gs://models/tin", TrainingError, "nothing in this folder of the bucket"),
        ("gs://models/none.safetensors", TrainingError, "no such object"),
        ("gs://models/tiny/unet", RecipeError, "gs://models/tiny/unet has no model_index.json"),
        ("gs://Models/x", RecipeError, "no place in Cloud Storage; wanted gs://bucket/path"),
        ("gs://", RecipeError, "no place in Cloud Storage"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(
    storage: StorageServer, model: str, address: str, error: type[Exception], words: str, cache: Path
) -> None:
    with pytest.raises(error, match=words):
        here(address)
    assert not cache.exists()


def test_a_folder_that_lacks_weights_is_not_fetched(storage: StorageServer, model: str, cache: Path) -> None:
    del storage.buckets["models"]["tiny/vae/diffusion_pytorch_model.safetensors"]
    with pytest.raises(RecipeError, match="gs://models/tiny has no weights in vae/"):
        here(model)
    assert not downloads(storage)


@pytest.mark.parametrize("pattern", ["prefix=tiny/", "/o/tiny/unet/.*alt=media"])
def test_what_may_not_be_read(storage: StorageServer, model: str, cache: Path, pattern: str) -> None:
    storage.fail("GET", pattern, 403)
    with pytest.raises(
        TrainingError, match=r"gs://models/tiny may not be read .*; give this account the role roles/st"
    ):
        here(model)
    assert not [name for name in files(cache) if "unet/diffusion" in name]


def test_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(ProjectError, match=r"needs Google Cloud credentials.*gcloud auth application-default login"):
        here("gs://models/tiny")


def test_a_broken_connection_is_taken_up_again(storage: StorageServer, model: str) -> None:
    storage.cut("diffusion_pytorch_model.safetensors", after=50_000, times=2)
    assert (
        files(here(model))["unet/diffusion_pytorch_model.safetensors"]
        == (BASE_MODEL / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    )


def test_a_damaged_file_is_not_kept(storage: StorageServer, model: str, cache: Path) -> None:
    # The client itself does not check what it took up again after a break.
    storage.put("models", "tiny/unet/config.json", bytes(1000), crc32c="AAAAAA==")
    storage.cut("unet/config.json", after=500, times=1)
    with pytest.raises(TrainingError, match=r"unet/config\.json arrived damaged .*; start again"):
        here(model)
    assert not [name for name in files(cache) if "unet/config" in name]


def test_a_compressed_upload_is_refused(storage: StorageServer, model: str) -> None:
    storage.put("models", "tiny/unet/config.json", b"x", contentEncoding="gzip")
    with pytest.raises(
        TrainingError, match=r"unet/config\.json is stored with Content-Encoding gzip; upload it without"
    ):
        here(model)


def test_a_stopped_download_leaves_whole_files_and_goes_on(
    storage: StorageServer, model: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(event: events.Event) -> None:
        if isinstance(event, events.Progress):
            raise KeyboardInterrupt

    storage.cut("diffusion_pytorch_model.safetensors", after=1000)
    with monkeypatch.context() as patch:
        patch.setattr(events, "emit", stopped)
        with pytest.raises(KeyboardInterrupt):
            here(model)
    kept = {name.partition("/")[2]: data for name, data in files(cache).items()}
    assert kept
    assert all(data == NEEDED[name].read_bytes() for name, data in kept.items())
    assert not [name for name in kept if name.endswith("diffusion_pytorch_model.safetensors")]
    storage._faults.clear()
    before = len(downloads(storage))
    assert len(files(here(model))) == len(NEEDED)
    assert len(downloads(storage)) - before == len(NEEDED) - len(kept)


def test_a_full_disk_is_told_before_anything_is_fetched(
    storage: StorageServer, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1_000_000))
    with pytest.raises(TrainingError, match=r"it takes \d+ MB, and 1 MB are free.*; set SDTUNE_CACHE to a folder on a"):
        here(model)
    assert not downloads(storage)


def test_a_cache_that_cannot_be_written(storage: StorageServer, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDTUNE_CACHE", "/dev/null")
    with pytest.raises(TrainingError, match=r"cannot be copied to /dev/null/.*; set SDTUNE_CACHE"):
        here(model)


# --- mounted ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(base_models, "MOUNT", str(tmp_path / "gcs"))
    shutil.copytree(BASE_MODEL, tmp_path / "gcs" / "models" / "tiny")
    return tmp_path / "gcs" / "models" / "tiny"


def test_a_mounted_folder_is_copied_to_the_disk(mount: Path, cache: Path) -> None:
    (mount / "safety_checker").mkdir()
    (mount / "safety_checker" / "model.safetensors").write_bytes(b"not to be read")
    folder = here(str(mount))
    assert folder.is_relative_to(cache)
    assert files(folder) == {name: path.read_bytes() for name, path in NEEDED.items()}
    assert here(str(mount)) == folder
    os.utime(mount / "unet" / "config.json", (1, 1))
    assert here(str(mount)) != folder


def test_a_mounted_file_is_copied_to_the_disk(mount: Path, cache: Path) -> None:
    shutil.copyfile(mount / "vae" / "diffusion_pytorch_model.safetensors", mount / "sd.safetensors")
    copy = here(str(mount / "sd.safetensors"))
    assert (copy.name, copy.is_relative_to(cache)) == ("sd.safetensors", True)
    assert copy.read_bytes() == (mount / "sd.safetensors").read_bytes()


def test_what_is_not_in_the_mount_is_asked_of_the_bucket(mount: Path, storage: StorageServer) -> None:
    with pytest.raises(TrainingError, match="gs://models/other: not found"):
        here(str(mount.parent / "other"))


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["gs://models/tiny", "/gcs/models/tiny"])
def test_a_run_trains_from_a_bucket(
    model: str, address: str, settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path,
    entry_point: EntryPoint,
) -> None:  # fmt: skip
    more = {"base_model": address, "max_train_steps": 2, "num_samples": 0}
    code, told, errors = entry_point(arguments({**settings, **more}, pictures(), tmp_path / "out"))
    assert code == 0, errors
    assert next(event.name for event in told if isinstance(event, events.Phase)) == "fetch"
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
