"""Where caches are kept: in memory while there is enough of it, then in a file that nobody sees."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods import places
from sdtune.training.components import room
from sdtune.training.components.processes import Share
from sdtune.training.components.room import room_for

MEGABYTE = 1_000_000


class Stage:
    """Stands for a Run: one of so many processes of a machine."""

    def __init__(self, processes: int = 1) -> None:
        self.told: list[events.Event] = []
        self.tell = self.told.append
        self.share_of_machine = Share(0, processes)


@pytest.fixture(autouse=True)
def spilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where files would be; 30 MB of memory are left."""
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(room, "free_memory", lambda: 30 * MEGABYTE)
    return tmp_path / "cache" / "spilled"


def room_of(megabytes: int, stage: Stage, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return room_for("latents", megabytes * MEGABYTE // dtype.itemsize, dtype, stage)  # type: ignore[arg-type]


def is_on_disk(tensor: torch.Tensor) -> bool:
    address = f"{tensor.data_ptr():x}-"
    (line,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(address)] or [""]
    return line.endswith("(deleted)")


def test_small_caches_are_in_memory(spilled: Path) -> None:
    stage = Stage()
    assert not is_on_disk(room_of(10, stage))
    assert not stage.told
    assert not spilled.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_ones_are_on_disk_in_a_file_without_a_name(dtype: torch.dtype, spilled: Path) -> None:
    stage = Stage()
    tensor = room_of(11, stage, dtype)
    assert is_on_disk(tensor)
    # Nothing of it can be left, not even by SIGKILL.
    assert list(spilled.iterdir()) == []
    given = torch.randn(len(tensor)).to(dtype)
    tensor.copy_(given)
    assert torch.equal(tensor, given)
    [note] = stage.told
    assert isinstance(note, events.Note)
    assert note.text == (
        f"The latents take 11 MB, and 30 MB of memory are free: until the run ends they are kept on disk, in {spilled}."
    )


def test_the_file_ends_with_its_tensor(spilled: Path) -> None:
    def files() -> int:
        return len([one for one in psutil.Process().memory_maps() if str(spilled) in one.path])

    tensor = room_of(11, Stage())
    part = tensor[5:7]
    del tensor
    assert files() == 1
    del part
    assert files() == 0


def test_where_nobody_says_what_is_free_it_is_memory(spilled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: 0)
    assert not is_on_disk(room_of(11, Stage()))


def test_processes_of_one_machine_share_its_memory(spilled: Path) -> None:
    assert not is_on_disk(room_of(4, Stage(processes=2)))
    stage = Stage(processes=3)
    assert is_on_disk(room_of(4, stage))
    assert "The latents take 4 MB in each of 3 processes" in str(stage.told[0])


def test_a_bucket_is_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MOUNT", str(tmp_path / "cache"))
    assert is_on_disk(room_of(11, Stage()))
    assert not (tmp_path / "cache").exists()


def test_a_disk_without_so_much_is_told(spilled: Path) -> None:
    spilled.mkdir(parents=True)
    most = 2 * shutil.disk_usage(spilled).free // MEGABYTE
    with pytest.raises(
        TrainingError,
        match=rf"the latents take {most:,} MB, and 30 MB of memory are free, of which they may have a third; {spilled} "
        r"does not take them \(No space left on device; [\d,]+ MB are free\). Set SDTUNE_CACHE to a folder on a disk",
    ):
        room_of(most, Stage())


def test_its_space_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is found to be full only while the mapping is written to ends the process by a signal."""
    taken = []
    real = numpy.memmap

    def memmap(file: Any, *arguments: Any, **options: Any) -> Any:
        taken.append(512 * os.fstat(file.fileno()).st_blocks)
        return real(file, *arguments, **options)

    monkeypatch.setattr(room.numpy, "memmap", memmap)
    room_of(11, Stage())
    assert taken[0] >= 11 * MEGABYTE


def test_space_that_is_gone_meanwhile_is_told(spilled: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MEGABYTE, hard))
    try:
        with pytest.raises(TrainingError, match=r"does not take them \(File too large; [\d,]+ MB are free\)"):
            room_of(11, Stage())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(spilled.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(TrainingError, match=r"file/spilled does not take them \(Not a directory\)\. Set SDTUNE_CACHE"):
        room_of(11, Stage())
