"""Tensors of any kind and size go through many small files, come back bit for bit, and are never in memory twice."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sdtune.training.components import checkpoint_memory, checkpoint_shards
from sdtune.training.components.checkpoint_files import Disk, StoppedError, damage, in_threads, read_manifest
from sdtune.training.components.checkpoint_memory import Copies
from sdtune.training.components.checkpoint_shards import DTYPES, SHARD, copy_entries
from sdtune.training.components.checkpoint_state import read_state, write_checkpoint
from tests.survival.test_checkpoint_files import DAMAGES, equal, manifest


def bits(tensor: torch.Tensor) -> bytes:
    """Not a number is not equal to itself; its bits are."""
    return torch.cat([tensor.flatten()]).view(torch.uint8).numpy().tobytes()


def any_bits(shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    shape = list(shape)
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    width = torch.empty(0, dtype=dtype).element_size()
    many = torch.randint(0, 256, (torch.Size(shape).numel() * width,), dtype=torch.uint8)
    return many.view(dtype).view(shape)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda t: t,
    "turned": lambda t: t.permute(tuple(reversed(range(t.dim())))),
    "every second": lambda t: t[..., ::2] if t.dim() else t,
    "a view from the middle": lambda t: t[1:] if t.dim() else t,
    "one row for all": lambda t: t[:1].expand(3, *t.shape[1:]) if t.dim() and len(t) else t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "a parameter": lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t,
}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    tensor = any_bits(shape, draw(st.sampled_from(list(DTYPES))))
    return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](tensor)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a hundred bytes, read and written in chunks of three to twenty-four entries."""
    monkeypatch.setattr(checkpoint_shards, "SHARD", 100)
    for module in (checkpoint_shards, checkpoint_memory):
        monkeypatch.setattr(module, "CHUNK", 24)


@pytest.mark.usefixtures("small")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(tensors(), max_size=6))
def test_any_tensors_come_back_through_small_files(
    tmp_path_factory: pytest.TempPathFactory, given: list[torch.Tensor]
) -> None:
    state = {"weights": {"masters": given}, "step": 3, "empty": {}}
    for written in (state, Copies().of(state)):
        folder = write_checkpoint(tmp_path_factory.mktemp("any"), manifest(), written)
        found = read_state(folder)["weights"]["masters"]
        assert [(t.dtype, t.shape, bits(t)) for t in found] == [(t.dtype, t.shape, bits(t.detach())) for t in given]
        # And by safetensors alone.
        index = json.loads((folder / "state.json").read_text())["tensors"]
        for number, tensor in enumerate(given):
            name = f"weights.masters.{number}"
            pieces = [load_file(folder / file)[name].flatten() for file in index[name]["files"]]
            assert bits(torch.cat(pieces).view(index[name]["shape"])) == bits(tensor.detach())


@pytest.mark.usefixtures("small")
def test_a_tensor_is_cut_and_small_ones_share_a_file(tmp_path: Path) -> None:
    state = {"weights": {"large": torch.arange(100), "small": torch.zeros(3)}, "random": torch.ones(2)}
    folder = write_checkpoint(tmp_path, manifest(), state)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    # 12 numbers of 8 bytes in 100.
    assert names == ["random.safetensors", *(f"weights-{number:05d}-of-00009.safetensors" for number in range(1, 10))]
    assert set(load_file(folder / names[-1])) == {"weights.large", "weights.small"}
    sizes = [sum(t.nbytes for t in load_file(folder / name).values()) for name in names]
    assert max(sizes) <= 100
    assert equal(read_state(folder), state)


def test_names_that_look_alike_are_kept_apart(tmp_path: Path) -> None:
    state = {"x": {"a.b": torch.ones(1), "a": {"b": torch.zeros(2)}, 0: torch.ones(3), "0": torch.zeros(4)}}
    assert equal(read_state(write_checkpoint(tmp_path, manifest(), state)), state)


def test_what_safetensors_has_no_name_for_is_told(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"x\.0: torch.complex64 cannot be kept"):
        write_checkpoint(tmp_path, manifest(), {"x": [torch.zeros(1, dtype=torch.complex64)]})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_seen_in_any_of_them(tmp_path: Path, how: str) -> None:
    state = {"weights": torch.arange(60)}
    number = len(list(write_checkpoint(tmp_path / "counted", manifest(), state).glob("*.safetensors")))
    assert number == 5
    for file in range(number):
        folder = write_checkpoint(tmp_path / f"{file}", manifest(), state)
        damaged = sorted(folder.glob("*.safetensors"))[file]
        DAMAGES[how](damaged)
        found = read_manifest(folder)
        assert found
        assert damaged.name in str(damage(folder, found))


@pytest.mark.usefixtures("small")
def test_files_that_do_not_fit_the_index_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, manifest(), {"weights": torch.arange(30)})
    said = json.loads((folder / "state.json").read_text())
    for shape, words in (([31], "31 entries, and its files have 30"), ([29], "29 entries, and its files have 30")):
        said["tensors"]["weights"]["shape"] = shape
        (folder / "state.json").write_text(json.dumps(said))
        with pytest.raises(ValueError, match=words):
            read_state(folder)
    said["tensors"]["weights"] = {**said["tensors"]["weights"], "shape": [30], "dtype": "F64"}
    (folder / "state.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="weights is I64 of"):
        read_state(folder)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_range_of_entries(data: st.DataObject) -> None:
    tensor = data.draw(tensors()).detach()
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    out = torch.empty(stop - start, dtype=tensor.dtype)
    if start < stop:
        copy_entries(tensor, start, stop, out)
    assert bits(out) == bits(tensor.contiguous().flatten()[start:stop])


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_files_are_written_at_once_and_an_error_of_one_ends_all(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    class Together(Disk):
        def write(self, file: Path, content: Iterable[bytes | memoryview]) -> tuple[int, str]:
            if "-of-" not in file.name:
                return super().write(file, content)
            # Fails after 30 s if there is nobody else.
            both.wait(30)
            if file.name.startswith("weights-00003"):
                raise OSError(28, "No space left on device")
            return super().write(file, content)

    before = threading.active_count()
    write_checkpoint(tmp_path / "whole", manifest(), {"weights": torch.arange(24)}, Together(), threads=2)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path / "half", manifest(), {"weights": torch.arange(48)}, Together(), threads=2)
    assert threading.active_count() <= before
    assert list((tmp_path / "half").iterdir()) == []


def test_the_error_that_is_told_is_not_that_of_the_stopped() -> None:
    stop = threading.Event()

    def work(number: int) -> int:
        if number == 1:
            raise OSError("the disk")
        if number < 3:
            assert stop.wait(30)
            raise StoppedError
        return number

    with pytest.raises(OSError, match="the disk"):
        in_threads(work, range(6), 3, stop.set)
    assert in_threads(lambda number: number + 1, range(6), 3) == [1, 2, 3, 4, 5, 6]
    assert in_threads(lambda number: number, [], 3) == []


@pytest.mark.usefixtures("small")
def test_one_that_is_wanted_no_more_ends_after_any_chunk(tmp_path: Path) -> None:
    state = {"weights": torch.arange(60).view(6, 10).t()}
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    write_checkpoint(tmp_path, manifest(4), state, threads=1, stopped=count)
    for last in range(asked):
        left = last
        questions = iter(range(left))
        with pytest.raises(StoppedError):
            write_checkpoint(
                tmp_path,
                manifest(5),
                state,
                threads=1,
                stopped=lambda: next(questions, None) is None,  # noqa: B023
            )
        assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]
    assert asked > 20


# --- memory -----------------------------------------------------------------------------------------------------------

MEGABYTES = 512
WRITE = f"""
import re, sys
from pathlib import Path
import torch
from sdtune.methods.resuming import Manifest
from sdtune.training.components.checkpoint_memory import Copies
from sdtune.training.components.checkpoint_state import write_checkpoint

def peak():
    # Not getrusage, to which that of the process that has started this one belongs as well.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

# It does not lie as it will in the file, so that it takes the way of what lies on a GPU.
state = {{"weights": torch.ones({MEGABYTES} * 512, 512).t()}}
small = {{"weights": torch.ones(3, 5).t()}}
write_checkpoint(Path(sys.argv[1]) / "small", Manifest(1, "", {{}}, ""), small, threads=4)
before = peak()
if sys.argv[2] == "copied":
    state = Copies(4).of(state)
write_checkpoint(Path(sys.argv[1]), Manifest(1, "", {{}}, ""), state, threads=4)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("way", "least", "most"),
    [
        # Four buffers of 16 MB each.
        ("at once", 0, 4 * 16 + 64),
        # The copy, and as much.
        ("copied", MEGABYTES, MEGABYTES + 4 * 16 + 64),
    ],
)
def test_no_more_of_a_state_is_in_memory_than_must_be(tmp_path: Path, way: str, least: int, most: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path), way], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert least <= int(done.stdout) <= most
    files = list((tmp_path / "step-000001").glob("*.safetensors"))
    assert len(files) == MEGABYTES * 2**20 // SHARD
