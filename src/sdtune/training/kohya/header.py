"""The header of a safetensors file: its metadata replaced, its tensors left as they are, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdtune.training.components.files import publish
from sdtune.training.components.kohya_metadata import file_hashes
from sdtune.training.components.tensor_file import joined, split


def read_metadata(file: Path) -> dict[str, str]:
    """The ``__metadata__`` of a safetensors file."""
    entries, _ = split(file.read_bytes())
    metadata: dict[str, str] = entries.get("__metadata__", {})
    return metadata


def copy_with_metadata(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """``target`` becomes ``source`` with other metadata, its hashes among them made anew."""
    entries, data = split(source.read_bytes())
    hashes = file_hashes(entries, data, metadata)
    if "modelspec.hash_sha256" not in metadata:
        del hashes["modelspec.hash_sha256"]
    with publish(target) as temporary:
        temporary.write_bytes(joined(entries, data, {**metadata, **hashes}))
