"""Tensors as safetensors files of bounded size, so that many files are written and read at once.

What is trained are a few tensors of gigabytes. Those of a part are laid end to end and cut every ``SHARD`` bytes; each
cut begins a file. A tensor that was cut has a piece in several files, under its own name in each: of its entries, in
the order of its rows, so many, flat. An index says which files, and how many entries are in each.

Anybody who has safetensors can put them together:
``torch.cat([load_file(name)[tensor].flatten() for name in index[tensor]["files"]]).view(index[tensor]["shape"])``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any

import numpy
import numpy.typing
import torch

from sdtune.training.components.checkpoint_files import AT_ONCE, StoppedError, in_threads

SHARD = 64 * 2**20
"""Bytes of a file at most, beside its header. Four times as many files as threads is enough to keep all of them busy,
and one that is being waited for, or has to be sent again, is soon done."""
CHUNK = 16 * 2**20
"""Bytes that go from the GPU at once: each thread has a buffer of this size, and no more of a state is in memory."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""As safetensors names them."""


@dataclass(frozen=True)
class Piece:
    """The entries ``start`` to ``stop`` of a tensor, in the order of its rows."""

    name: str
    tensor: torch.Tensor
    start: int
    stop: int

    @property
    def size(self) -> int:
        """In bytes."""
        return (self.stop - self.start) * self.tensor.element_size()

    @property
    def shape(self) -> list[int]:
        """Its tensor's own, if it is all of it."""
        whole = self.stop - self.start == self.tensor.numel()
        return list(self.tensor.shape) if whole else [self.stop - self.start]


def cut(part: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Piece]]:
    """The files of a part by their names, and what is in each; one file if it holds everything."""
    shards: list[list[Piece]] = [[]]
    room = SHARD
    # Wide numbers first: a reader that maps the file needs them at multiples of their size.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        width, end, start = tensor.element_size(), tensor.numel(), 0
        while True:
            piece = Piece(name, tensor.detach(), start, min(end, start + room // width))
            if piece.size or not end:
                shards[-1].append(piece)
            start, room = piece.stop, room - piece.size
            if start == end:
                break
            shards.append([])
            room = SHARD
    if len(shards) == 1:
        return {f"{part}.safetensors": shards[0]}
    return {f"{part}-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def index_of(files: Mapping[str, Sequence[Piece]]) -> dict[str, dict[str, Any]]:
    """By the name of each tensor its type, its shape, and how many entries are in which files."""
    index: dict[str, dict[str, Any]] = {}
    for file, pieces in files.items():
        for piece in pieces:
            new = {"dtype": DTYPES[piece.tensor.dtype], "shape": list(piece.tensor.shape), "files": {}}
            index.setdefault(piece.name, new)["files"][file] = piece.stop - piece.start
    return index


def content_of(pieces: Sequence[Piece], stopped: Callable[[], bool] = bool) -> Iterator[bytes | memoryview]:
    """A safetensors file, chunk by chunk: its own writer would hold all of it in memory.

    Each chunk may be gone when the next is asked for. StoppedError: ``stopped`` has said so.
    """
    entries, end = {}, 0
    for piece in pieces:
        offsets = [end, end := end + piece.size]
        entries[piece.name] = {"dtype": DTYPES[piece.tensor.dtype], "shape": piece.shape, "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for chunk in chunks_of(pieces):
        if stopped():
            raise StoppedError
        yield bytes_of(chunk).data
    if stopped():
        raise StoppedError


def chunks_of(pieces: Iterable[Piece]) -> Iterator[torch.Tensor]:
    """Their entries on the CPU, flat, at most CHUNK bytes at once.

    What is on a GPU, or does not lie in memory as it will in the file, comes through the one buffer of this thread,
    which each chunk overwrites.
    """
    for piece in pieces:
        tensor, step = piece.tensor, CHUNK // piece.tensor.element_size()
        for start in range(piece.start, piece.stop, step):
            stop = min(piece.stop, start + step)
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                yield tensor.view(-1)[start:stop]
                continue
            chunk = _buffer(tensor.device.type == "cuda")[: (stop - start) * tensor.element_size()].view(tensor.dtype)
            copy_entries(tensor, start, stop, chunk)
            yield chunk


_of_thread = local()


def _buffer(pinned: bool) -> torch.Tensor:
    """CHUNK bytes, the same for as long as the thread lives: of blocks that come and go, malloc would keep many.

    pinned: the driver would take what comes from a GPU through a small buffer of its own, at a fraction of the speed.
    """
    kind = CHUNK, pinned
    if getattr(_of_thread, "kind", None) != kind:
        _of_thread.buffer, _of_thread.kind = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned), kind
    buffer: torch.Tensor = _of_thread.buffer
    return buffer


def bytes_of(flat: torch.Tensor) -> numpy.typing.NDArray[numpy.uint8]:
    """The bytes of a flat tensor on the CPU, where they are."""
    # Of one entry, or none, torch takes any stride for contiguous, and then does not see bytes in it.
    found: numpy.typing.NDArray[numpy.uint8] = flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()
    return found


def wait_for_gpu(pieces: Iterable[Piece]) -> None:
    """Until the tensors are what they are to be; other threads may look at them then."""
    for device in {piece.tensor.device for piece in pieces}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def copy_entries(tensor: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
    """Copy the entries ``start`` to ``stop`` of a tensor, in the order of its rows, to ``out``, which is flat.

    However the tensor lies in memory, and without having more of it twice, there or here, than what is copied.
    """
    if tensor.is_contiguous():
        out.copy_(tensor.view(-1)[start:stop])
        return
    row = tensor[0].numel()
    first, last = -(-start // row), stop // row
    if first > last:
        copy_entries(tensor[last], start - last * row, stop - last * row, out)
        return
    head, tail = first * row - start, stop - last * row
    if head:
        copy_entries(tensor[first - 1], row - head, row, out[:head])
    if first < last:
        rows = tensor[first:last]
        out[head : head + rows.numel()].view(rows.shape).copy_(rows)
    if tail:
        copy_entries(tensor[last], 0, tail, out[out.numel() - tail :])


def read_tensors(folder: Path, index: Mapping[str, Mapping[str, Any]], threads: int = AT_ONCE) -> dict[str, Any]:
    """All tensors of an index, on the CPU. ValueError: the files are not as it says."""
    types = {name: dtype for dtype, name in DTYPES.items()}
    tensors: dict[str, torch.Tensor] = {}
    wanted: dict[str, dict[str, torch.Tensor]] = {}
    for name, said in index.items():
        flat = torch.empty(math.prod(said["shape"]), dtype=types[said["dtype"]])
        tensors[name], end = flat.view(said["shape"]), 0
        for file, entries in said["files"].items():
            wanted.setdefault(file, {})[name] = flat[end : (end := end + entries)]
        if end != flat.numel():
            raise ValueError(f"{name}: {flat.numel()} entries, and its files have {end}")
    in_threads(lambda file: _read_into(folder / file, wanted[file]), list(wanted), threads)
    return tensors


def _read_into(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Straight into the tensors: safetensors maps the file, and threads that map wait for each other."""
    with file.open("rb") as stream:
        entries = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        start = stream.tell()
        for name, tensor in tensors.items():
            entry = entries[name]
            begin, end = entry["data_offsets"]
            if (DTYPES[tensor.dtype], tensor.nbytes) != (entry["dtype"], end - begin):
                raise ValueError(f"{file.name}: {name} is {entry['dtype']} of {end - begin:,} bytes")
            stream.seek(start + begin)
            if stream.readinto(bytes_of(tensor).data) != tensor.nbytes:
                raise ValueError(f"{file.name} ends too soon")
