"""The header of a kohya-form file: what UIs show and filter by."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import safetensors.torch
from torch import Tensor

from sdtune.training.components.lora_names import Family
from sdtune.training.components.lora_weights import LoraWeights
from sdtune.training.components.tensor_file import joined, split

HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Entries that ``hashes`` makes, of the file they stand in."""
_BASE_VERSION = {Family.SD1: "sd_v1", Family.SD2: "sd_v2", Family.SDXL: "sdxl_base_v1-0"}
_ARCHITECTURE = {
    Family.SD1: "stable-diffusion-v1",
    Family.SD2: "stable-diffusion-v2-512",
    Family.SDXL: "stable-diffusion-xl-v1-base",
}


def kohya_metadata(
    *,
    family: Family,
    title: str,
    base_model: str,
    rank: int,
    alpha: float,
    resolution: int | tuple[int, int],
    steps: int,
    epochs: int,
    learning_rate: float,
    optimizer: str,
    batch_size: int,
    num_train_images: int,
    seed: int | None = None,
    v_prediction: bool = False,
    captions: Iterable[str] = (),
    dataset_name: str = "images",
    trigger_words: Sequence[str] = (),
    more: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """The header of a kohya-form file: the ``ss_*`` entries that UIs show and filter by, and ``modelspec.*``.

    resolution: a side or (width, height); batch_size: per device.
    captions: one per training image, for ss_tag_frequency. more: further ss_ entries under kohya's names without the
    prefix, e.g. ``{"lr_scheduler": "cosine"}``. An entry that is None is left out.
    Folders of this machine are not told (of a local base model, only the name of its file or folder), nor is the
    time: the same run gives the same file.
    Source: train_network.py and library/sai_model_spec.py of kohya-ss/sd-scripts; Stability-AI/ModelSpec 1.0.0.
    """
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    frequency = Counter(tag.strip().lower() for caption in captions for tag in caption.split(",") if tag.strip())
    ss: dict[str, object] = {
        "output_name": title,
        "sd_model_name": public_name(base_model),
        "base_model_version": _BASE_VERSION[family] + ("_v" if v_prediction and family is not Family.SDXL else ""),
        "v2": family is Family.SD2,
        "network_module": "networks.lora",
        "network_dim": rank,
        "network_alpha": float(alpha),
        "network_args": "{}",
        "resolution": (width, height),
        "max_train_steps": steps,
        "steps": steps,
        "num_epochs": epochs,
        "epoch": epochs,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "batch_size_per_device": batch_size,
        "num_train_images": num_train_images,
        "seed": seed,
        "tag_frequency": json.dumps({dataset_name: dict(frequency.most_common())}) if frequency else None,
        **(more or {}),
    }
    architecture = _ARCHITECTURE[family]
    if family is Family.SD2 and v_prediction:
        architecture = "stable-diffusion-v2-768-v"
    modelspec: dict[str, object] = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/lora",
        "implementation": (
            "https://github.com/Stability-AI/generative-models" if family is Family.SDXL else "diffusers"
        ),
        "title": title,
        "resolution": f"{width}x{height}",
        "prediction_type": "v" if v_prediction else "epsilon",
        "trigger_phrase": ", ".join(trigger_words) or None,
    }
    entries = {f"ss_{name}": value for name, value in ss.items()}
    entries |= {f"modelspec.{name}": value for name, value in modelspec.items()}
    return {key: str(value) for key, value in entries.items() if value is not None}


def known_metadata(weights: LoraWeights, family: Family, title: str) -> dict[str, str]:
    """What a LoRA's header can say when nothing is known of its training.

    Of SD 2 not which of its two predictions it was trained for, and so neither version nor architecture.
    """
    modules = [module for of_component in weights.values() for module in of_component.values()]
    ranks, alphas = {module.rank for module in modules}, {module.alpha for module in modules}
    entries = {"ss_v2": str(family is Family.SD2), "ss_network_module": "networks.lora", "ss_output_name": title}
    if len(ranks) == 1:
        entries["ss_network_dim"] = str(ranks.pop())
    if len(alphas) == 1:
        entries["ss_network_alpha"] = str(alphas.pop())
    if family is not Family.SD2:
        entries |= {
            "ss_base_model_version": _BASE_VERSION[family],
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{_ARCHITECTURE[family]}/lora",
            "modelspec.title": title,
        }
    return entries


def told_family(metadata: Mapping[str, str]) -> Family | None:
    """The family that a header tells, in ``ss_base_model_version``, ``modelspec.architecture`` or ``ss_v2``."""
    version, architecture = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    for family, starts in (
        (Family.SDXL, ("sdxl_", "stable-diffusion-xl-v1")),
        (Family.SD2, ("sd_v2", "stable-diffusion-v2")),
        (Family.SD1, ("sd_v1", "stable-diffusion-v1")),
    ):
        if version.startswith(starts[0]) or architecture.startswith(starts[1]):
            return family
    return Family.SD2 if metadata.get("ss_v2") == "True" else None


def public_name(base_model: str) -> str:
    """A repository id (``owner/name``) as it is; of a path or gs:// address its last part."""
    is_repository = base_model.count("/") == 1 and base_model[0] not in "./~\\" and "\\" not in base_model
    return base_model if is_repository and not Path(base_model).exists() else PureWindowsPath(base_model).name


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """HASHES of the file of these tensors with this metadata."""
    return file_hashes(*split(safetensors.torch.save(dict(tensors))), metadata)


def file_hashes(entries: Mapping[str, Any], data: bytes, metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_* as kohya computes them: over the file as it would be with its ss_ entries alone."""
    legacy = joined(entries, data, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    model_hash = hashlib.sha256(data).hexdigest()
    legacy_hash = hashlib.sha256(memoryview(legacy)[0x100000:0x110000]).hexdigest()[:8]
    return dict(zip(HASHES, (model_hash, legacy_hash, f"0x{model_hash}"), strict=True))
