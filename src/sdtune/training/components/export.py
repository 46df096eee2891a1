"""Writes a LoRA from the neutral form: diffusers' file, and kohya's file that the web UIs read.

Both are safetensors, whole or absent, and the same bytes for the same weights and metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sdtune.errors import TrainingError
from sdtune.training.components.files import publish
from sdtune.training.components.lora_names import LoraPart, diffusers_layer, kohya_name
from sdtune.training.components.lora_weights import Family, LoraModule, LoraWeights

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name that ``pipe.load_lora_weights(folder)`` looks for."""
ADAPTER_METADATA_KEY = "lora_adapter_metadata"
"""diffusers' entry of the header: peft's LoraConfig of every component, as JSON."""
TRAINED_ALPHA_KEY = "sdtune_trained_alpha"
"""Our entry beside it: the alpha of every component before it was multiplied into the weights, as JSON."""


def write_diffusers_lora(
    weights: LoraWeights,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """``<folder>/pytorch_lora_weights.safetensors``, for ``pipe.load_lora_weights(folder)``; returns its path.

    Of the names that diffusers reads, those that ComfyUI reads as well: the UNet's attention as
    ``attn1.processor.to_q_lora.down`` (ComfyUI skips ``attn1.to_q.lora.down``, and draws with the rest), other layers
    ``lora.down``, text encoders ``text_model....lora_linear_layer.down``. diffusers 0.42 strips ``text_model.`` itself
    where transformers has flattened its modules; names without it load there only. Seen with diffusers 0.32 and 0.42.

    The scale alpha / rank is multiplied into ``up``, and the header says alpha = rank: diffusers 0.42 reads an alpha
    from the header, 0.32 and ComfyUI do not and would apply scale 1 without a word.
    """
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    trained_alpha: dict[str, float] = {}
    for component, modules in weights.items():
        for path, module in modules.items():
            name = f"{component}.{path}"
            layer = diffusers_layer(component, path)
            tensors[f"{layer}.down.weight"] = _cast(module.down, dtype, name)
            tensors[f"{layer}.up.weight"] = _cast(module.up.float() * module.scale, dtype, name)
            if module.magnitude is not None:
                like_peft = module.magnitude if module.down.dim() == 2 else module.magnitude.reshape(1, -1, 1, 1)
                # peft leaves out .weight, and transformers 5 then finds no place for it in a text encoder.
                suffix = "lora_magnitude_vector" if component == "unet" else "lora_magnitude_vector.weight"
                tensors[f"{name}.{suffix}"] = _cast(like_peft, dtype, name)
        header |= {f"{component}.{name}": value for name, value in _peft_config(modules).items()}
        if len(alphas := {module.alpha for module in modules.values()}) == 1:
            trained_alpha[component] = alphas.pop()
    everything = dict(metadata or {}) | {
        "format": "pt",
        ADAPTER_METADATA_KEY: json.dumps(header, indent=2, sort_keys=True),
        TRAINED_ALPHA_KEY: json.dumps(trained_alpha, sort_keys=True),
    }
    return _write_whole(folder / DIFFUSERS_FILE, _serialized(tensors, everything))


def _peft_config(modules: Mapping[str, LoraModule]) -> dict[str, Any]:
    """The fields of peft's LoraConfig, of versions since 0.9, that describe the file's weights.

    Names of text-encoder modules go without ``text_model.``: peft matches the end of a module's path, so that they
    fit a flattened CLIPTextModel as well as a classic one.
    """
    ranks = {path.removeprefix("text_model."): module.rank for path, module in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: other for path, other in ranks.items() if other != rank}
    config: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks)}
    config |= {"rank_pattern": others, "alpha_pattern": others}
    return config | {"use_dora": any(module.magnitude is not None for module in modules.values())}


def write_kohya_lora(
    weights: LoraWeights,
    path: Path,
    family: Family,
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """A file for A1111, Forge, SD.Next, ComfyUI, kohya's tools and diffusers; returns its path.

    ``lora_unet_``, ``lora_te_`` (SDXL: ``lora_te1_``, ``lora_te2_``, and the block names of its original UNet), each
    module with its ``.alpha``. Half precision is what kohya's users expect of such a file: it is for drawing.
    metadata: of ``kohya_metadata``; the hashes are added here.
    """
    sdxl = family is Family.SDXL
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if sdxl else "lora_te", "text_encoder_2": "lora_te2"}
    if "text_encoder_2" in weights and not sdxl:
        raise TrainingError(f"A LoRA of two text encoders cannot be written for {family}: only SDXL has two.")
    tensors: dict[str, Tensor] = {}
    for component, modules in weights.items():
        for module_path, module in _loadable(component, modules).items():
            name = kohya_name(prefixes[component], module_path, sgm=sdxl and component == "unet")
            tensors[f"{name}.{LoraPart.DOWN}"] = _cast(module.down, dtype, name)
            tensors[f"{name}.{LoraPart.UP}"] = _cast(module.up, dtype, name)
            tensors[f"{name}.{LoraPart.ALPHA}"] = torch.tensor(module.alpha, dtype=torch.float32)
            if module.magnitude is not None:  # as a column, to multiply the rows of a weight
                column = module.magnitude.reshape(-1, *[1] * (module.down.dim() - 1))
                tensors[f"{name}.{LoraPart.MAGNITUDE}"] = _cast(column, dtype, name)
    return _write_whole(path, _serialized(tensors, {**metadata, **_hashes(tensors, metadata)}))


def _loadable(component: str, modules: Mapping[str, LoraModule]) -> Mapping[str, LoraModule]:
    """modules of the same effect, in a form that diffusers reads right.

    It applies one alpha to all modules of a component (to 0.42 it looks for others under names that do not exist):
    where they differ, the most common one is kept and the rest of the scale multiplied into ``up``. And it tells the
    form of a text encoder's part by the presence of out_proj: without any, it refuses the whole file or silently
    skips the attention. So attention trained without it gets one of zeros.
    """
    alpha = Counter(module.alpha for module in modules.values()).most_common(1)[0][0]
    loadable = {
        path: module if module.alpha == alpha else replace(module, up=module.up * (module.alpha / alpha), alpha=alpha)
        for path, module in modules.items()
    }
    attention = [path for path in loadable if ".self_attn." in path]
    if component != "unet" and attention and not any(path.endswith(".out_proj") for path in attention):
        like = loadable[attention[0]]
        zeros = LoraModule(torch.zeros_like(like.down), torch.zeros_like(like.up), alpha)
        loadable[f"{attention[0].rpartition('.')[0]}.out_proj"] = zeros
    return loadable


def _cast(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = weight.to(dtype, copy=True).contiguous()
    if not bool(cast.isfinite().all()):
        raise TrainingError(f"{name}: not finite in {dtype}; nothing was written.")
    return cast


# --- metadata of kohya's form ----------------------------------------------------------------------------------------

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
    started_at: float,
    finished_at: float,
    seed: int | None = None,
    v_prediction: bool = False,
    captions: Iterable[str] = (),
    dataset_name: str = "images",
    trigger_words: Sequence[str] = (),
    more: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """The header of a kohya-form file: the ``ss_*`` entries that UIs show and filter by, and ``modelspec.*``.

    resolution: a side or (width, height); batch_size: per device; started_at, finished_at: seconds since 1970.
    captions: one per training image, for ss_tag_frequency. more: further ss_ entries under kohya's names without the
    prefix, e.g. ``{"lr_scheduler": "cosine"}``. An entry that is None is left out.
    Folders of this machine are not told: of a local base model, only the name of its file or folder.
    Source: train_network.py and library/sai_model_spec.py of kohya-ss/sd-scripts; Stability-AI/ModelSpec 1.0.0.
    """
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    frequency = Counter(tag.strip().lower() for caption in captions for tag in caption.split(",") if tag.strip())
    ss: dict[str, object] = {
        "output_name": title,
        "sd_model_name": _public_name(base_model),
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
        "training_started_at": float(started_at),
        "training_finished_at": float(finished_at),
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
        "date": datetime.fromtimestamp(int(finished_at), UTC).isoformat(),
        "prediction_type": "v" if v_prediction else "epsilon",
        "trigger_phrase": ", ".join(trigger_words) or None,
    }
    entries = {f"ss_{name}": value for name, value in ss.items()}
    entries |= {f"modelspec.{name}": value for name, value in modelspec.items()}
    return {key: str(value) for key, value in entries.items() if value is not None}


def _public_name(base_model: str) -> str:
    """A repository id (``owner/name``) as it is; of a path or gs:// address its last part."""
    is_repository = base_model.count("/") == 1 and base_model[0] not in "./~\\" and "\\" not in base_model
    return base_model if is_repository and not Path(base_model).exists() else PureWindowsPath(base_model).name


def _hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_* as kohya computes them: over the file as it would be with its ss_ entries alone."""
    file = _serialized(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(file[:8], "little")
    model_hash = hashlib.sha256(memoryview(file)[start:]).hexdigest()
    legacy_hash = hashlib.sha256(memoryview(file)[0x100000:0x110000]).hexdigest()[:8]
    return {
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy_hash,
        "modelspec.hash_sha256": f"0x{model_hash}",
    }


# --- bytes -----------------------------------------------------------------------------------------------------------


def _serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. Its writer shuffles the metadata on every call, so the header is written anew, sorted."""
    file = safetensors.torch.save(dict(tensors))
    start = 8 + int.from_bytes(file[:8], "little")
    entries = json.loads(file[8:start])
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + file[start:]


def _write_whole(path: Path, content: bytes) -> Path:
    with publish(path) as temporary:
        temporary.write_bytes(content)
    return path
