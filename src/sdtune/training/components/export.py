"""Writes a LoRA from the neutral form: diffusers' file, and kohya's file that the web UIs read.

Both are safetensors, whole or absent, and the same bytes for the same weights and metadata.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtune.errors import TrainingError
from sdtune.training.components.kohya_metadata import hashes
from sdtune.training.components.kohya_metadata import kohya_metadata as kohya_metadata
from sdtune.training.components.lora_names import Family, LoraPart, diffusers_layer, kohya_layer
from sdtune.training.components.lora_weights import LoraModule, LoraWeights
from sdtune.training.components.scale import multiply_in
from sdtune.training.components.tensor_file import finite, write_tensors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name that ``pipe.load_lora_weights(folder)`` looks for."""
ADAPTER_METADATA_KEY = "lora_adapter_metadata"
"""diffusers' entry of the header: peft's LoraConfig of every component, as JSON."""


def write_diffusers_lora(
    weights: LoraWeights,
    folder: Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """``<folder>/pytorch_lora_weights.safetensors``, for ``pipe.load_lora_weights(folder)``; returns its path.

    Of the names that diffusers reads, those that ComfyUI reads as well: the UNet's attention as
    ``attn1.processor.to_q_lora.down`` (ComfyUI skips ``attn1.to_q.lora.down``, and draws with the rest), other layers
    ``lora.down``, text encoders ``text_model....lora_linear_layer.down``. diffusers 0.42 strips ``text_model.`` itself
    where transformers has flattened its modules; names without it load there only. Seen with diffusers 0.32 and 0.42.

    The scale alpha / rank is multiplied into ``up``, and the header says alpha = rank: diffusers 0.42 reads an alpha
    from the header, 0.32 and ComfyUI do not and would apply scale 1 without a word. ``read_lora`` takes it out again.

    dtype: of all tensors; None: as ``multiply_in`` says, so that the LoRA comes back bit for bit.
    """
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    multiplied, undo = multiply_in(weights, dtype)
    for component, modules in multiplied.items():
        for path, module in modules.items():
            name = f"{component}.{path}"
            layer = diffusers_layer(component, path)
            tensors[f"{layer}.down.weight"] = finite(module.down, dtype, name)
            tensors[f"{layer}.up.weight"] = finite(module.up, dtype, name)
            if module.magnitude is not None:
                # peft leaves out .weight, and transformers 5 then finds no place for it in a text encoder.
                suffix = "lora_magnitude_vector" if component == "unet" else "lora_magnitude_vector.weight"
                tensors[f"{name}.{suffix}"] = finite(peft_magnitude(module), dtype, name)
        header |= {f"{component}.{name}": value for name, value in peft_config(component, modules).items()}
    everything = dict(metadata or {}) | {
        "format": "pt",
        ADAPTER_METADATA_KEY: json.dumps(header, indent=2, sort_keys=True),
        **undo,
    }
    return write_tensors(folder / DIFFUSERS_FILE, tensors, everything)


def peft_config(component: str, modules: Mapping[str, LoraModule]) -> dict[str, Any]:
    """The fields of peft's LoraConfig, of versions since 0.9, that describe the modules of one component.

    Names of text-encoder modules go without ``text_model.``: peft matches the end of a module's path, so that they
    fit a flattened CLIPTextModel as well as a classic one.
    TrainingError: DoRA on some modules only, which one LoraConfig cannot say.
    """
    paths = {path.removeprefix("text_model."): module for path, module in modules.items()}
    rank = Counter(module.rank for module in paths.values()).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in paths.values()).most_common(1)[0][0]
    dora = {module.magnitude is not None for module in paths.values()}
    if len(dora) > 1:
        plain = next(path for path, module in modules.items() if module.magnitude is None)
        raise TrainingError(
            f"{component}: some modules have DoRA's magnitude and others, such as {plain}, have not. PEFT and "
            "diffusers know DoRA on all modules of a component or on none; only kohya's form can hold this LoRA."
        )
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "target_modules": sorted(paths),
        "rank_pattern": {path: module.rank for path, module in paths.items() if module.rank != rank},
        "alpha_pattern": {path: _number(module.alpha) for path, module in paths.items() if module.alpha != alpha},
        "use_dora": True in dora,
    }


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha


def peft_magnitude(module: LoraModule) -> Tensor:
    """In the shape that PEFT gives it: [out], of a convolution [1, out, 1, 1]."""
    assert module.magnitude is not None
    return module.magnitude if module.down.dim() == 2 else module.magnitude.reshape(1, -1, 1, 1)


def write_kohya_lora(
    weights: LoraWeights,
    path: Path,
    family: Family,
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = torch.float16,
    one_alpha: bool = True,
) -> Path:
    """A file for A1111, Forge, SD.Next, ComfyUI, kohya's tools and diffusers; returns its path.

    ``lora_unet_``, ``lora_te_`` (SDXL: ``lora_te1_``, ``lora_te2_``, and the block names of its original UNet), each
    module with its ``.alpha``. Half precision is what kohya's users expect of such a file: it is for drawing.
    dtype: of the weights; None: each in its own. metadata: of ``kohya_metadata``; the hashes are added here.
    one_alpha: of modules that differ in alpha, make it one and multiply the difference into ``up``: of this form
    diffusers (to 0.42) applies one alpha to all modules of a component. Every other reader applies each module's own.
    """
    tensors: dict[str, Tensor] = {}
    for component, modules in weights.items():
        loadable = _with_out_proj(component, _with_one_alpha(modules) if one_alpha else modules)
        for module_path, module in loadable.items():
            name = kohya_layer(component, module_path, family)
            tensors[f"{name}.{LoraPart.DOWN}"] = finite(module.down, dtype, name)
            tensors[f"{name}.{LoraPart.UP}"] = finite(module.up, dtype, name)
            tensors[f"{name}.{LoraPart.ALPHA}"] = alpha_tensor(module.alpha)
            if module.magnitude is not None:  # as a column, to multiply the rows of a weight
                column = module.magnitude.reshape(-1, *[1] * (module.down.dim() - 1))
                tensors[f"{name}.{LoraPart.MAGNITUDE}"] = finite(column, dtype, name)
    return write_tensors(path, tensors, {**metadata, **hashes(tensors, metadata)})


def alpha_tensor(alpha: float) -> Tensor:
    """float32 as is usual, unless only float64 holds it (rank-stabilised LoRA: alpha * sqrt(rank))."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)


def _with_one_alpha(modules: Mapping[str, LoraModule]) -> Mapping[str, LoraModule]:
    """modules of the same effect, all with the most common alpha."""
    alpha = Counter(module.alpha for module in modules.values()).most_common(1)[0][0]
    return {
        path: module if module.alpha == alpha else replace(module, up=module.up * (module.alpha / alpha), alpha=alpha)
        for path, module in modules.items()
    }


def _with_out_proj(component: str, modules: Mapping[str, LoraModule]) -> Mapping[str, LoraModule]:
    """modules, and an out_proj of zeros if a text encoder's attention was trained without any.

    diffusers tells the form of a text encoder's part by the presence of out_proj: without it, it refuses the whole
    file or silently skips the attention. ``read_lora`` leaves it out again.
    """
    attention = [path for path in modules if ".self_attn." in path]
    if component == "unet" or not attention or any(path.endswith(".out_proj") for path in attention):
        return modules
    like = modules[attention[0]]
    zeros = LoraModule(torch.zeros_like(like.down), torch.zeros_like(like.up), like.alpha)
    return {**modules, f"{attention[0].rpartition('.')[0]}.out_proj": zeros}
