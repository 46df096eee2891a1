"""The state of a training as files: tensors as safetensors, one file for each part, and all else as JSON. No pickle.

A state is what ``state_dict`` gives: tensors, numbers, texts, truth values and None, in dictionaries, lists and tuples
of any depth. What is read is equal to it bit for bit, and of the same types.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sdtune.methods import places
from sdtune.methods.resuming import MANIFEST, Manifest, name_of
from sdtune.training.components.checkpoint_files import DISK, Disk

STRUCTURE = "state.json"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""As safetensors names them."""


def write_checkpoint(parent: Path, manifest: Manifest, state: Mapping[str, Any], disk: Disk = DISK) -> Path:
    """Write a checkpoint into ``parent``, whole or not at all; its folder.

    state: by the name of each part, of letters, figures and ``_``. OSError: it could not be written; those that lie
    there are as they were.
    """
    target = parent / name_of(manifest.step)
    # A mounted bucket (FUSE) neither renames at once nor takes what is written in pieces.
    mounted = parent.is_relative_to(places.MOUNT)
    staging = (Path(tempfile.gettempdir()) if mounted else parent) / f".{target.name}.partial-{os.getpid()}"
    try:
        disk.make(staging)
        structure, files = {}, {}
        for part, content in state.items():
            tensors: dict[str, torch.Tensor] = {}
            structure[part] = _apart(content, part, tensors)
            if tensors:
                name = f"{part}.safetensors"
                files[name] = disk.write(staging / name, _as_file(tensors))
        files[STRUCTURE] = disk.write(staging / STRUCTURE, [json.dumps(structure).encode()])
        disk.write(staging / MANIFEST, [replace(manifest, files=files).to_bytes()])
        _publish(staging, target, [*files, MANIFEST], disk, mounted)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _publish(staging: Path, target: Path, files: list[str], disk: Disk, mounted: bool) -> None:
    if mounted:
        for name in files:
            disk.copy(staging / name, target / name)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        disk.rename(target, old)
    disk.rename(staging, target)
    shutil.rmtree(old, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint whose files have been checked; tensors on the CPU."""
    structure = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
    return {part: _together(content, folder / f"{part}.safetensors") for part, content in structure.items()}


def _apart(content: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """``content`` as JSON; its tensors are put into ``tensors``."""
    match content:
        case torch.Tensor():
            tensors[name] = content
            return {"tensor": name}
        case dict():
            return {"dict": [[key, _apart(one, f"{name}.{key}", tensors)] for key, one in content.items()]}
        case list() | tuple():
            inside = [_apart(one, f"{name}.{number}", tensors) for number, one in enumerate(content)]
            return {"list" if isinstance(content, list) else "tuple": inside}
        case None | bool() | int() | float() | str():
            return content
        case _:
            raise TypeError(f"{name}: a {type(content).__name__} cannot be kept in a checkpoint")


def _together(content: Any, file: Path) -> Any:
    """The reverse of ``_apart``."""
    if not file.exists():
        return _joined(content, None)
    with safe_open(file, framework="pt") as tensors:
        return _joined(content, tensors)


def _joined(content: Any, tensors: Any) -> Any:
    match content:
        case {"tensor": name}:
            return tensors.get_tensor(name)
        case {"dict": items}:
            return {key: _joined(one, tensors) for key, one in items}
        case {"list": inside}:
            return [_joined(one, tensors) for one in inside]
        case {"tuple": inside}:
            return tuple(_joined(one, tensors) for one in inside)
        case _:
            return content


def _as_file(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, tensor by tensor: its own writer would hold all of them in memory twice over."""
    entries, end = {}, 0
    # Wide numbers first: a reader that maps the file needs them at multiples of their size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    for name, tensor in ordered.items():
        size = tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for tensor in ordered.values():
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def size_of(state: Any) -> int:
    """The bytes of all tensors of a state."""
    match state:
        case torch.Tensor():
            return state.numel() * state.element_size()
        case dict():
            return sum(size_of(one) for one in state.values())
        case list() | tuple():
            return sum(size_of(one) for one in state)
        case _:
            return 0
