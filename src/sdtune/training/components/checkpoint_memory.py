"""A state in this machine's memory: whether there is room for a copy of it, and the copy.

Files of its own may be made of the copy while training changes the state itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch

from sdtune.training.components.checkpoint_files import AT_ONCE, in_threads
from sdtune.training.components.checkpoint_shards import CHUNK, Piece, bytes_of, chunks_of, wait_for_gpu

LEFT_FREE = 2**30
"""Bytes at least that a copy must leave to others, and half its own size: saving the result takes about so much."""
UNLIMITED = 2**62


def has_room(size: int, held: int = 0, root: Path = Path("/")) -> bool:
    """There may be ``size`` bytes in memory, ``held`` of which are there already, and enough is left."""
    return free_memory(root) >= max(0, size - held) + max(LEFT_FREE, size // 2)


def free_memory(root: Path = Path("/")) -> int:
    """The bytes that this process may take without anybody being killed or swapped out; 0 where nobody says so.

    root: where ``/proc`` and ``/sys`` are. The machine's, or less in a container: a cgroup may not have more than its
    own limit and those of all that it is in, and what it keeps of files counts, but makes room.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        said = dict(line.split(":", 1) for line in lines)
        free = int(said["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return 0
    return max(0, min([free, *_left_in_cgroups(root)]))


def _left_in_cgroups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            top, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container its own group may be mounted at the top, and called by the name that it has outside.
        inside = Path(*(part for part in Path(place).parts if part not in ("/", "..")))
        for group in (top / inside, *(top / parent for parent in inside.parents)):
            if (left := _left_in(group, limit, used)) is not None:
                yield left


def _left_in(group: Path, limit: str, used: str) -> int | None:
    """Of one cgroup; None if it has no limit of its own."""
    try:
        most = (group / limit).read_text().strip()
        if most == "max" or int(most) >= UNLIMITED:
            return None
        said = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        held = int((group / used).read_text())
    except (OSError, ValueError):
        return None

    def of_all(*names: str) -> int:
        # Version 1 counts what is in the groups inside under other names.
        return sum(int(said.get(f"total_{name}", said.get(name, 0))) for name in names)

    files = of_all("active_file", "inactive_file") - of_all("file_dirty", "file_writeback", "dirty", "writeback")
    return int(most) - held + max(0, files)


class Copies:
    """Copies of a state, each in the place of the one before.

    Memory that was used before takes them ten times as fast as what the system has yet to give, so it is kept.
    """

    def __init__(self, threads: int = AT_ONCE) -> None:
        self._threads, self._kept = threads, list[torch.Tensor]()

    @property
    def held(self) -> int:
        """Bytes that are kept for the next."""
        return sum(kept.nbytes for kept in self._kept)

    def of(self, state: Any) -> Any:
        """A copy with all tensors on the CPU, which nothing changes until the next is made."""
        spare, self._kept = self._kept, []
        pairs: list[tuple[Piece, torch.Tensor]] = []
        copied = self._copied(state, spare, pairs)
        wait_for_gpu(piece for piece, _ in pairs)
        in_threads(_copy, [part for pair in pairs for part in _in_parts(*pair)], self._threads)
        return copied

    def forget(self) -> None:
        """Keep no memory; a copy that is still in use keeps its own."""
        self._kept = []

    def _copied(self, content: Any, spare: list[torch.Tensor], pairs: list[tuple[Piece, torch.Tensor]]) -> Any:
        """``content`` with other tensors; what is to be copied, and where to, is put into ``pairs``."""
        match content:
            case torch.Tensor():
                size = content.numel() * content.element_size()
                before = spare.pop(0) if spare else None
                memory = before if before is not None and before.nbytes == size else _memory(size)
                self._kept.append(memory)
                flat = memory.view(content.dtype)
                pairs.append((Piece("", content.detach(), 0, content.numel()), flat))
                return flat.view(content.shape)
            case dict():
                return {key: self._copied(one, spare, pairs) for key, one in content.items()}
            case list():
                return [self._copied(one, spare, pairs) for one in content]
            case tuple():
                return tuple(self._copied(one, spare, pairs) for one in content)
            case _:
                return content


def _memory(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _in_parts(piece: Piece, flat: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Of CHUNK bytes at most, for different threads."""
    step = CHUNK // flat.element_size()
    for start in range(0, piece.stop, step):
        part = replace(piece, start=start, stop=min(piece.stop, start + step))
        yield part, flat[part.start : part.stop]


def _copy(pair: tuple[Piece, torch.Tensor]) -> None:
    piece, flat = pair
    (chunk,) = chunks_of([piece])
    # By one thread: torch would start a team of its own in each of ours.
    numpy.copyto(bytes_of(flat), bytes_of(chunk))
