"""The state of a training as files: tensors as safetensors, at least one file for each part, and all else as JSON.

A state is what ``state_dict`` gives: tensors, numbers, texts, truth values and None, in dictionaries, lists and tuples
of any depth. What is read is equal to it bit for bit, and of the same types. No pickle.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from sdtune.methods import places
from sdtune.methods.resuming import MANIFEST, Manifest, name_of
from sdtune.training.components.checkpoint_files import AT_ONCE, DISK, Disk, StoppedError, in_threads
from sdtune.training.components.checkpoint_shards import (
    DTYPES,
    Piece,
    content_of,
    cut,
    index_of,
    read_tensors,
    wait_for_gpu,
)
from sdtune.training.components.nested import apart, together

STRUCTURE = "state.json"
"""Its ``state`` is the state with the names of tensors in their places, its ``tensors`` says where these are."""


def write_checkpoint(
    parent: Path,
    manifest: Manifest,
    state: Mapping[str, Any],
    disk: Disk = DISK,
    threads: int = AT_ONCE,
    stopped: Callable[[], bool] = bool,
) -> Path:
    """Write a checkpoint into ``parent``, whole or not at all; its folder.

    state: by the name of each part, of letters, figures and ``_``. threads: files at once. OSError: it could not be
    written; those that lie there are as they were. StoppedError: ``stopped``, which is asked often, has said so; as
    after an error, nothing of it is left.
    """
    structure, shards = _taken_apart(state)
    wait_for_gpu(piece for pieces in shards.values() for piece in pieces)
    target = parent / name_of(manifest.step)
    # A mounted bucket (FUSE) neither renames at once nor takes what is written in pieces.
    mounted = parent.is_relative_to(places.MOUNT)
    staging = (Path(tempfile.gettempdir()) if mounted else parent) / f".{target.name}.partial-{os.getpid()}"
    failed = Event()

    def write(name: str) -> tuple[int, str]:
        return disk.write(staging / name, content_of(shards[name], lambda: failed.is_set() or stopped()))

    try:
        disk.make(staging)
        # The largest first, so that none is left alone at the end.
        names = sorted(shards, key=lambda name: -sum(piece.size for piece in shards[name]))
        files = dict(zip(names, in_threads(write, names, threads, failed.set), strict=True))
        files[STRUCTURE] = disk.write(staging / STRUCTURE, [json.dumps(structure).encode()])
        disk.write(staging / MANIFEST, [replace(manifest, files=files).to_bytes()])
        if stopped():
            raise StoppedError
        if mounted:
            in_threads(lambda name: disk.copy(staging / name, target / name), list(files), threads)
            disk.copy(staging / MANIFEST, target / MANIFEST)
        else:
            _publish(staging, target, disk)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _publish(staging: Path, target: Path, disk: Disk) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        disk.rename(target, old)
    try:
        disk.rename(staging, target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_state(folder: Path, threads: int = AT_ONCE) -> dict[str, Any]:
    """The state in a checkpoint whose files have been checked; tensors on the CPU."""
    said = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
    tensors = read_tensors(folder, said["tensors"], threads)
    return {part: together(content, tensors.__getitem__) for part, content in said["state"].items()}


def _taken_apart(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Piece]]]:
    """What STRUCTURE says, and the files of tensors by their names."""
    parts, files = {}, {}
    for part, content in state.items():
        tensors: dict[str, torch.Tensor] = {}
        parts[part] = apart(content, part, tensors)
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                raise TypeError(f"{name}: {tensor.dtype} cannot be kept in a checkpoint")
        files.update(cut(part, tensors) if tensors else {})
    return {"state": parts, "tensors": index_of(files)}, files


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
