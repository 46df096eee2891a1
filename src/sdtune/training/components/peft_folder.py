"""A LoRA in PEFT's own form: folders ``unet``, ``text_encoder``, ``text_encoder_2``, as save_pretrained writes them.

Each holds ``adapter_config.json`` and ``adapter_model.safetensors``; ``PeftModel.from_pretrained(unet, folder/"unet")``
loads it into a plain diffusers UNet or CLIP text encoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtune.errors import TrainingError
from sdtune.training.components.export import peft_config, peft_magnitude
from sdtune.training.components.files import publish
from sdtune.training.components.lora_names import COMPONENTS
from sdtune.training.components.lora_weights import LoraWeights
from sdtune.training.components.tensor_file import finite, read_tensors, write_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Of every key: PEFT's wrapper, and the model inside it."""


def write_peft_lora(
    weights: LoraWeights,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    base_model: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A PEFT adapter per component in ``folder``; those of other components that were there are taken away. Its path.

    dtype: of the weights; None: each in its own. Ranks and alphas stand in the configuration as they are.
    The keys are those of the installed transformers: PEFT loads by exact name, and 5.6 took the level ``text_model``
    out of CLIPTextModel. ``read_lora`` reads both.
    """
    from peft import LoraConfig

    files: dict[Path, dict[str, Tensor]] = {}
    configs: dict[Path, str] = {}
    for component, modules in weights.items():
        config = LoraConfig(
            **peft_config(component, modules), base_model_name_or_path=base_model or None, inference_mode=True
        ).to_dict()
        entries = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        configs[folder / component / CONFIG_FILE] = json.dumps(entries, indent=2, sort_keys=True) + "\n"
        tensors = files[folder / component / WEIGHTS_FILE] = {}
        for path, module in modules.items():
            name = f"{component}.{path}"
            key = PREFIX + (path.removeprefix("text_model.") if component == "text_encoder" and _is_flat() else path)
            tensors[f"{key}.lora_A.weight"] = finite(module.down, dtype, name)
            tensors[f"{key}.lora_B.weight"] = finite(module.up, dtype, name)
            if module.magnitude is not None:
                tensors[f"{key}.lora_magnitude_vector"] = finite(peft_magnitude(module), dtype, name)
    for component in COMPONENTS:  # without its configuration an adapter is none
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (folder / component / name).unlink(missing_ok=True)
    for file, content in files.items():
        write_tensors(file, content, {**(metadata or {}), "format": "pt"})
    for file, text in configs.items():
        with publish(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder


@cache
def _is_flat() -> bool:
    """The installed transformers has no level ``text_model`` in CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tiny = {"hidden_size": 2, "intermediate_size": 2, "num_attention_heads": 1, "num_hidden_layers": 1}
    with torch.device("meta"):
        return not hasattr(CLIPTextModel(CLIPTextConfig(**tiny)), "text_model")


def adapters_in(folder: Path) -> dict[str, Path]:
    """The sub-folders that hold an adapter, by component."""
    return {one: folder / one for one in COMPONENTS if (folder / one / CONFIG_FILE).is_file()}


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """One component's tensors without PEFT's prefix, its configuration, and the metadata of its file.

    TrainingError: not a LoRA, or one with parts that only PEFT knows.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TrainingError(f"{folder / CONFIG_FILE}: not a configuration of PEFT ({error}).") from None
    if kind != "LORA":
        raise TrainingError(
            f"{folder}: a PEFT adapter of the kind {kind}; only LoRA, with DoRA or without, is read: "
            "the other kinds have no form that diffusers, kohya's tools and PEFT share."
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise TrainingError(
            f"{folder}: has no {WEIGHTS_FILE}. Is the folder complete? Weights in pickle formats (.bin) are not "
            "opened, because they can run code."
        )
    tensors, metadata = read_tensors(folder / WEIGHTS_FILE)
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}, config, metadata
