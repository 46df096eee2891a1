"""Safetensors files: read with their header, written whole and the same for the same content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdtune.errors import TrainingError
from sdtune.training.components.files import publish


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in the types of the file, and the header's metadata. TrainingError if it is no safetensors file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise TrainingError(
            f"{file}: not a safetensors file ({error}). LoRA files in pickle formats (.bin, .pt, .ckpt) are not "
            "opened, because they can run code; convert it with a tool you trust."
        ) from error
    except OSError as error:
        raise TrainingError(f"{file}: cannot be read: {error.strerror or error}.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write the file, whole or not at all; its path."""
    content = serialized(tensors, metadata)
    with publish(path) as temporary:
        temporary.write_bytes(content)
    return path


def serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. Its writer shuffles the metadata on every call, so the header is written anew, sorted."""
    return joined(*split(safetensors.torch.save(dict(tensors))), metadata)


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header's entries and the data of a safetensors file."""
    start = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:start]), file[start:]


def joined(entries: Mapping[str, Any], data: bytes, metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of these tensors with this metadata, sorted."""
    tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **tensors}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + data


def finite(weight: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """A contiguous copy in ``dtype`` (None: in its own). TrainingError if a value is not finite there."""
    cast = weight.to(dtype or weight.dtype, copy=True).contiguous()
    if not bool(cast.isfinite().all()):
        raise TrainingError(f"{name}: not finite in {cast.dtype}; nothing was written.")
    return cast
