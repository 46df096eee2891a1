"""Models on NFS shares, which folders stand for: what goes where, whole or not at all, and what is told of each."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdtune import events
from sdtune.errors import ProjectError
from sdtune.methods.catalog import METHODS
from sdtune.training import nfs
from sdtune.training.__main__ import main
from sdtune.training.nfs import FOR_PEFT, check_shares, choose
from tests.servers.storage import StorageServer
from tests.training.conftest import EntryPoint

pytestmark = pytest.mark.usefixtures("small")

LORA = {
    "dog_lora.safetensors": b"for web UIs",
    "pytorch_lora_weights.safetensors": b"for diffusers",
    "recipe.yaml": b"method: dreambooth-lora\nrank: 4\n",
    ".sdtune": b"The output of a run\n",
    "README.md": b"a card",
    "samples/step-000000/prompt-0-sample-0.png": b"a picture",
    "logs/events.out.tfevents.1": b"a curve",
}
Sync = Callable[..., tuple[int, list[events.Event]]]


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def share(tmp_path: Path) -> Path:
    (tmp_path / "share").mkdir()
    return tmp_path / "share"


@pytest.fixture
def sync(share: Path, capsys: pytest.CaptureFixture[str]) -> Sync:
    """Runs the task: exit code, events."""

    def run(*words: str) -> tuple[int, list[events.Event]]:
        code = main(["sync-nfs", f"--nfs={share}", *words])
        return code, [event for line in capsys.readouterr().out.splitlines() if (event := events.parse(line))]

    return run


@pytest.fixture
def lora(storage: StorageServer) -> str:
    for name, content in LORA.items():
        storage.put("pets", f"dog_lora/{name}", content)
    return "gs://pets/dog_lora"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ledger(told: list[events.Event]) -> dict[str, str]:
    return {Path(event.path).name: event.outcome for event in told if isinstance(event, events.Copy)}


UI, PROGRAMS = "dreambooth-lora/dog_lora.safetensors", "dreambooth-lora/dog_lora/pytorch_lora_weights.safetensors"
NAMES = [Path(UI).name, Path(PROGRAMS).name]


@pytest.mark.parametrize("source", ["gs://pets/dog_lora", "gs://pets/dog_lora/", "/gcs/pets/dog_lora"])
def test_a_lora_has_a_file_for_uis_and_a_folder_for_programs(lora: str, sync: Sync, share: Path, source: str) -> None:
    code, told = sync(f"--from={source}")
    assert code == 0, told
    assert files(share) == {UI: b"for web UIs", PROGRAMS: b"for diffusers"}
    assert ledger(told) == dict.fromkeys(NAMES, "copied")
    assert told[0] == events.Phase("copy", f"Copying 2 files, 1 MB, to {share}")
    assert told[1] == events.Copy("gs://pets/dog_lora/dog_lora.safetensors", str(share / UI), "copied")


def test_what_is_there_already_is_left_and_what_has_changed_is_replaced(
    lora: str, sync: Sync, share: Path, storage: StorageServer
) -> None:
    sync(f"--from={lora}")
    before = (share / UI).stat().st_ino
    storage.requests.clear()
    assert ledger(sync(f"--from={lora}")[1]) == dict.fromkeys(NAMES, "equal")
    assert not [request for request in storage.requests if "alt=media" in request and "recipe" not in request]
    storage.put("pets", "dog_lora/pytorch_lora_weights.safetensors", b"for Diffusers")  # as long as before
    assert list(ledger(sync(f"--from={lora}")[1]).values()) == ["equal", "copied"]
    assert (share / PROGRAMS).read_bytes() == b"for Diffusers"
    assert (share / UI).stat().st_ino == before


def test_two_runs_of_one_method_stand_side_by_side(lora: str, sync: Sync, share: Path, tmp_path: Path) -> None:
    cat = tmp_path / "cat"
    cat.mkdir()
    for name, content in LORA.items():
        (cat / name.replace("dog_lora", "cat")).parent.mkdir(parents=True, exist_ok=True)
        (cat / name.replace("dog_lora", "cat")).write_bytes(content)
    assert sync(f"--from={lora}")[0] == sync(f"--from={cat}")[0] == 0
    cats = {"dreambooth-lora/cat.safetensors", "dreambooth-lora/cat/pytorch_lora_weights.safetensors"}
    assert set(files(share)) == {UI, PROGRAMS, *cats}


def test_a_method_can_be_given_for_a_folder_without_a_recipe(sync: Sync, storage: StorageServer, share: Path) -> None:
    storage.put("pets", "old/a.safetensors", b"a")
    code, told = sync("--from=gs://pets/old")
    assert code == 2
    assert "gs://pets/old has no recipe.yaml that names one" in told[-1].text  # type: ignore[union-attr]
    assert sync("--from=gs://pets/old", "--method=kohya-native-lora")[0] == 0
    assert files(share) == {"kohya-native-lora/a.safetensors": b"a"}
    assert sync("--from=gs://pets/old", "--method=../x")[0] == 2
    assert sync("--from=gs://pets/old", "--method=kohya-native-lora", "--what=1")[0] == 2


@pytest.mark.parametrize("recipe", [b"method: ../../x\n", b"- 1\n", b"method: 3\n", b"{", b"rank: 4\n"])
def test_a_recipe_that_names_no_method(
    sync: Sync, lora: str, storage: StorageServer, recipe: bytes, share: Path
) -> None:
    storage.put("pets", "dog_lora/recipe.yaml", recipe)
    assert sync(f"--from={lora}")[0] == 2
    assert not files(share)


def test_a_run_that_has_not_finished_is_not_copied(sync: Sync, lora: str, storage: StorageServer, share: Path) -> None:
    del storage.buckets["pets"]["dog_lora/recipe.yaml"]
    code, told = sync(f"--from={lora}", "--method=dreambooth-lora")
    assert (code, "holds a run that has not finished" in told[-1].text) == (2, True)  # type: ignore[union-attr]
    del storage.buckets["pets"]["dog_lora/.sdtune"]
    for name in ("dog_lora.safetensors", "pytorch_lora_weights.safetensors"):
        del storage.buckets["pets"][f"dog_lora/{name}"]
    code, told = sync(f"--from={lora}", "--method=dreambooth-lora")
    assert (code, "holds no model" in told[-1].text) == (2, True)  # type: ignore[union-attr]
    assert not files(share)


def test_a_whole_model_is_a_folder_that_is_a_model_last() -> None:
    names = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/a.json",
        "dog.safetensors", "recipe.yaml", "samples/step-000000/x.png", "class_pictures/a/0.png",
    ]  # fmt: skip
    chosen = choose(names, "dog")
    assert list(chosen.items()) == [
        ("dog.safetensors", "dog.safetensors"),
        ("scheduler/a.json", "dog/scheduler/a.json"),
        ("unet/config.json", "dog/unet/config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "dog/unet/diffusion_pytorch_model.safetensors"),
        ("model_index.json", "dog/model_index.json"),
    ]
    peft = ["unet/adapter_config.json", "unet/adapter_model.safetensors", "unet/notes.txt", "recipe.yaml"]
    assert list(choose(peft, "dog").values()) == [f"dog/unet/{FOR_PEFT[1]}", f"dog/unet/{FOR_PEFT[0]}"]
    assert not choose(["unet/adapter_config.json", "recipe.yaml"], "dog")


def test_a_file_that_cannot_be_had_does_not_stop_the_others_and_fails_the_job(
    lora: str, sync: Sync, share: Path, storage: StorageServer
) -> None:
    storage.put("pets", "dog_lora/dog_lora.safetensors", b"for web UIs", crc32c="AAAAAA==")
    code, told = sync(f"--from={lora}")
    assert code == 6
    assert ledger(told) == {NAMES[0]: "failed", NAMES[1]: "copied"}
    assert files(share) == {PROGRAMS: b"for diffusers"}
    assert "nfs: 1 of 2 files could not be copied" in told[-1].text  # type: ignore[union-attr]
    assert "arrived damaged" in told[-1].text  # type: ignore[union-attr]


def test_what_the_share_has_made_of_a_file_is_read_back(
    lora: str, sync: Sync, share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (share / "dreambooth-lora").mkdir()
    (share / UI).write_bytes(b"the earlier")
    write = nfs._write

    def damaging(original: Any, file: Path) -> None:
        write(original, file)
        file.write_bytes(bytes(original.size))

    monkeypatch.setattr(nfs, "_write", damaging)
    code, told = sync(f"--from={lora}")
    assert code == 6
    assert ledger(told) == dict.fromkeys(NAMES, "failed")
    assert "what was read back is not what was written" in told[-1].text  # type: ignore[union-attr]
    assert files(share) == {UI: b"the earlier"}


def test_a_share_that_is_full_fails_in_its_own_words(sync: Sync, lora: str, share: Path) -> None:
    # A folder where the file should be: the rename is refused.
    (share / UI / "x").mkdir(parents=True)
    code, told = sync(f"--from={lora}")
    assert code == 6
    assert ledger(told) == {NAMES[0]: "failed", NAMES[1]: "copied"}
    assert "Is a directory" in told[-1].text  # type: ignore[union-attr]
    assert not list(share.rglob("*partial*"))


def test_what_a_killed_copy_has_left_is_taken_away(lora: str, sync: Sync, share: Path) -> None:
    (share / "dreambooth-lora").mkdir()
    old, new = (share / "dreambooth-lora" / f".dog_lora.safetensors.partial-{number}" for number in (1, 2))
    for left in (old, new):
        left.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert sync(f"--from={lora}")[0] == 0
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("/mnt/nfs/nothing", r"/mnt/nfs/nothing is not there: was the job given --nfs SERVER:/PATH=/mnt/nfs/nothing"),
        ("/sys", "/sys cannot be written to"),
    ],
)
def test_a_share_that_is_missing_or_read_only(place: str, words: str) -> None:
    with pytest.raises(ProjectError, match=words):
        check_shares([Path(place)])


def test_all_shares_are_tried_before_anything_is_copied(lora: str, sync: Sync, share: Path) -> None:
    code, told = sync(f"--from={lora}", "--nfs=/mnt/nfs/nothing")
    assert (code, files(share)) == (3, {})
    assert isinstance(told[-1], events.Failed)


# --- at the end of a run ----------------------------------------------------------------------------------------------


def test_a_run_copies_its_models_and_fails_if_it_cannot(
    storage: StorageServer, settings: dict[str, Any], pictures: Callable[..., Path], share: Path, tmp_path: Path,
    entry_point: EntryPoint, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    storage.put("pets", "x", b"")
    recipe = METHODS["dreambooth-lora"].from_settings({**settings, "max_train_steps": 1, "num_samples": 0})
    second = tmp_path / "second"
    second.mkdir()
    words = [
        "train", "dreambooth-lora", f"--dataset={pictures()}", "--output=gs://pets/dog_lora", f"--nfs={share}",
        f"--nfs={second}", *recipe.to_args(),
    ]  # fmt: skip
    (second / UI / "x").mkdir(parents=True)
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    code, told, errors = entry_point(words)
    assert code == 6, errors
    assert set(files(share)) == {UI, PROGRAMS}
    assert files(share)[UI] == storage.buckets["pets"]["dog_lora/dog_lora.safetensors"].data
    assert "recipe.yaml" in json.dumps(sorted(storage.buckets["pets"]))
    assert isinstance(told[-1], events.Failed)
    assert "The result is whole in gs://pets/dog_lora; copy it again with: sdtune sync-nfs --from gs" in told[-1].text
    rows = [event for event in told if isinstance(event, events.Copy)]
    assert [row.outcome for row in rows] == ["copied", "copied", "failed", "copied"]
    assert rows[0].source == "gs://pets/dog_lora/dog_lora.safetensors"


def test_a_missing_share_ends_a_run_before_it_begins(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = METHODS["dreambooth-lora"].from_settings(settings)
    words = ["train", "dreambooth-lora", f"--dataset={pictures()}", f"--output={tmp_path / 'out'}", "--nfs=/mnt/nfs/no"]
    assert main([*words, *recipe.to_args()]) == 3
    assert "/mnt/nfs/no is not there" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
