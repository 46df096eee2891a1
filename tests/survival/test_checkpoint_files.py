"""What is in a checkpoint comes back bit for bit, what is damaged is seen, and what cannot be written costs nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtune.errors import RecipeError
from sdtune.methods import places
from sdtune.methods.resuming import MANIFEST, Manifest
from sdtune.training.components.checkpoint_files import (
    Disk,
    ShortLivedDisk,
    damage,
    read_manifest,
    remove_others,
    steps_in,
)
from sdtune.training.components.checkpoint_state import read_state, size_of, write_checkpoint

STATE: dict[str, Any] = {
    "weights": {"masters": [torch.randn(3, 5), torch.randn(2, dtype=torch.bfloat16), torch.zeros(0, 4)]},
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(7)[::2]}},
        "param_groups": [{"lr": 1e-300, "betas": (0.9, float("inf")), "fused": None, "params": [0]}],
    },
    "random": {"cpu": [torch.get_rng_state()]},
    "losses": [0.1, 1 / 3],
    "step": 5,
}


def manifest(step: int = 5) -> Manifest:
    return Manifest(step, "dreambooth-lora", {"seed": 1, "prompt": "🐈\n"}, "/pictures", told={"samples": {"3": 1}})


def equal(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and one.equal(two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, manifest(), STATE)
    found = read_manifest(folder)
    assert found
    assert damage(folder, found) is None
    assert equal(read_state(folder), STATE)
    assert replace(found, files={}) == manifest()
    assert size_of(STATE) == sum(60 + 4 + 4 + 16 for _ in [0]) + torch.get_rng_state().numel()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


SIMPLE = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text()
NESTED = st.recursive(
    SIMPLE,
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=20,
)


@settings(max_examples=20, deadline=None)
@given(NESTED)
def test_so_does_any_other(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    state = {"part": content, "tensor": torch.arange(3)}
    assert equal(read_state(write_checkpoint(tmp_path_factory.mktemp("any"), manifest(), state)), state)


def test_what_is_no_part_of_a_state_is_a_mistake_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"optimizer\.x: a bytes cannot be kept"):
        write_checkpoint(tmp_path, manifest(), {"optimizer": {"x": b"bytes"}})
    assert not list(tmp_path.iterdir())


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flipped, "cut": cut, "missing": Path.unlink}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
def test_a_damaged_file_is_seen(tmp_path: Path, how: str, name: str) -> None:
    folder = write_checkpoint(tmp_path, manifest(), STATE)
    DAMAGES[how](folder / name)
    found = read_manifest(folder)
    assert found
    assert name in str(damage(folder, found))


@pytest.mark.parametrize("how", DAMAGES)
def test_so_is_a_damaged_manifest(tmp_path: Path, how: str) -> None:
    folder = write_checkpoint(tmp_path, manifest(), STATE)
    DAMAGES[how](folder / MANIFEST)
    assert read_manifest(folder) is None


@settings(max_examples=200, deadline=None)
@given(st.binary() | st.text().map(str.encode) | NESTED.map(json.dumps).map(str.encode))
def test_no_manifest_makes_trouble(content: bytes) -> None:
    assert Manifest.of(content) is None


def test_a_manifest_of_another_format_is_told() -> None:
    said = json.loads(manifest().to_bytes())
    said["format"] = 99
    del said["sha256"]
    from sdtune.methods import resuming

    content = json.dumps({**said, "sha256": resuming._hash(said)}).encode()
    with pytest.raises(RecipeError, match="of format 99, which this version of sdtune does not read"):
        Manifest.of(content)


def test_no_file_of_a_manifest_lies_elsewhere() -> None:
    outside = replace(manifest(), files={"../weights.safetensors": (1, "x")})
    assert Manifest.of(outside.to_bytes()) is None


def test_a_checkpoint_under_another_name_is_none(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, manifest(), STATE)
    folder.rename(tmp_path / "step-000009")
    assert read_manifest(tmp_path / "step-000009") is None


def test_the_newest_are_kept_and_nothing_else_is_touched(tmp_path: Path) -> None:
    for step in (1, 2, 30, 400):
        write_checkpoint(tmp_path, manifest(step), STATE)
    (tmp_path / ".step-000500.partial-77").mkdir()
    (tmp_path / "step-mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert steps_in(tmp_path) == [400, 30, 2, 1]
    remove_others(tmp_path, [400, 30])
    assert {path.name for path in tmp_path.iterdir()} == {"step-000400", "step-000030", "step-mine", "notes.txt"}
    remove_others(tmp_path, [])
    assert {path.name for path in tmp_path.iterdir()} == {"step-mine", "notes.txt"}
    assert steps_in(tmp_path / "nothing") == []


@pytest.mark.parametrize("mounted", [False, True])
def test_half_of_one_that_is_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool) -> None:
    monkeypatch.setattr(places, "MOUNT", str(tmp_path) if mounted else "/gcs")
    for step in (1, 2):
        write_checkpoint(tmp_path, manifest(step), STATE)

    def half(folder: Path, ignore_errors: bool = False) -> None:
        for file in sorted(folder.glob("*.safetensors"))[:1]:
            file.unlink()

    monkeypatch.setattr(shutil, "rmtree", half)
    remove_others(tmp_path, [2])
    # Where nothing can be renamed at once, it has lost its manifest before all else.
    assert steps_in(tmp_path) == ([2, 1] if mounted else [2])
    assert read_manifest(tmp_path / "step-000001") is None
    monkeypatch.undo()
    remove_others(tmp_path, [2])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


# --- writes that fail -------------------------------------------------------------------------------------------------


class FaultyDisk(Disk):
    """Fails at one call, as a full disk does: of a file that is being written, half is there."""

    def __init__(self, at: int) -> None:
        self.calls, self._at, self._lock = 0, at, Lock()

    def _fails(self) -> bool:
        with self._lock:
            self.calls += 1
            return self.calls == self._at

    def make(self, folder: Path) -> None:
        if self._fails():
            raise OSError(30, "Read-only file system")
        super().make(folder)

    def write(self, file: Path, content: Iterable[bytes | memoryview]) -> tuple[int, str]:
        if self._fails():
            whole = b"".join(bytes(piece) for piece in content)
            file.write_bytes(whole[: len(whole) // 2])
            raise OSError(28, "No space left on device")
        return super().write(file, content)

    def copy(self, source: Path, target: Path) -> None:
        if self._fails():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes()[:10])
            raise OSError(5, "Input/output error")
        super().copy(source, target)

    def rename(self, source: Path, target: Path) -> None:
        if self._fails():
            raise OSError(5, "Input/output error")
        super().rename(source, target)

    def remove(self, folder: Path) -> None:
        if self._fails():
            raise OSError(5, "Input/output error")
        super().remove(folder)


def calls_of_a_write(folder: Path) -> int:
    disk = FaultyDisk(0)
    write_checkpoint(folder, manifest(), STATE, disk)
    return disk.calls


@pytest.mark.parametrize("mounted", [False, True])
def test_a_write_that_fails_at_any_call_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool
) -> None:
    if mounted:
        monkeypatch.setattr(places, "MOUNT", str(tmp_path))
    calls = calls_of_a_write(tmp_path / "counted")
    assert calls >= 7
    failed = 0
    for at in range(1, calls + 1):
        folder = tmp_path / str(at)
        before = write_checkpoint(folder, manifest(4), STATE)
        with pytest.raises(OSError, match=r"Read-only|No space|Input/output"):
            write_checkpoint(folder, manifest(5), STATE, FaultyDisk(at))
        failed += 1
        kept = read_manifest(before)
        assert kept
        assert damage(before, kept) is None
        # Of the other there is nothing, or nothing that would be taken for one.
        assert read_manifest(folder / "step-000005") is None
        assert [path for path in folder.iterdir() if path.name.startswith(".")] == []
        # And it can be written later.
        again = write_checkpoint(folder, manifest(5), STATE)
        assert equal(read_state(again), STATE)
    assert failed == calls


def test_a_checkpoint_is_written_anew_in_the_place_of_one_that_is_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, manifest(), STATE)
    folder = write_checkpoint(tmp_path, manifest(), {**STATE, "step": 6})
    assert read_state(folder)["step"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_and_if_it_cannot_be_that_one_is_left(tmp_path: Path) -> None:
    before = write_checkpoint(tmp_path, manifest(), STATE)
    counted = FaultyDisk(0)
    write_checkpoint(tmp_path, manifest(), STATE, counted)
    for at in range(1, counted.calls + 1):
        with pytest.raises(OSError, match=r"Read-only|No space|Input/output"):
            write_checkpoint(tmp_path, manifest(), {**STATE, "step": 6}, FaultyDisk(at))
        kept = read_manifest(before)
        assert kept
        assert damage(before, kept) is None
        assert read_state(before)["step"] == 5
        assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_the_disk_is_waited_for_unless_nobody_will_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(file: int) -> Path:
        return Path(f"/proc/self/fd/{file}").readlink()

    waited, fsync = list[Path](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (waited.append(place(file)), fsync(file)))
    folder = write_checkpoint(tmp_path, manifest(), STATE)
    names = [path.name for path in waited]
    assert sorted(names[:5]) == sorted(path.name for path in folder.iterdir())
    assert names[4:] == [MANIFEST, f".step-000005.partial-{os.getpid()}", tmp_path.name]
    waited.clear()
    write_checkpoint(tmp_path, manifest(6), STATE, ShortLivedDisk())
    assert waited == []
