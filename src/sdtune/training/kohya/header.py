"""The header of a safetensors file: its metadata replaced, its tensors left as they are, byte for byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from sdtune.training.components.files import publish


def read_metadata(file: Path) -> dict[str, str]:
    """The ``__metadata__`` of a safetensors file."""
    entries, _ = _split(file.read_bytes())
    metadata: dict[str, str] = entries.get("__metadata__", {})
    return metadata


def copy_with_metadata(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """``target`` becomes ``source`` with other metadata, its hashes among them made anew."""
    entries, data = _split(source.read_bytes())
    entries.pop("__metadata__", None)
    everything = {**metadata, **_hashes(entries, data, metadata)}
    with publish(target) as temporary:
        temporary.write_bytes(_joined(entries, data, everything))


def _hashes(entries: Mapping[str, object], data: bytes, metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_* as kohya computes them: over the file as it would be with its ss_ entries alone."""
    legacy = _joined(entries, data, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    model_hash = hashlib.sha256(data).hexdigest()
    hashes = {
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": hashlib.sha256(legacy[0x100000:0x110000]).hexdigest()[:8],
    }
    return hashes | ({"modelspec.hash_sha256": f"0x{model_hash}"} if "modelspec.hash_sha256" in metadata else {})


def _split(content: bytes) -> tuple[dict[str, dict[str, str]], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _joined(entries: Mapping[str, object], data: bytes, metadata: Mapping[str, str]) -> bytes:
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + data
