"""LoRA files -> the neutral form: diffusers', kohya's and PEFT's, of Stable Diffusion 1, 2 and SDXL."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtune.errors import TrainingError
from sdtune.training.components.export import ADAPTER_METADATA_KEY, DIFFUSERS_FILE
from sdtune.training.components.kohya_metadata import public_name
from sdtune.training.components.lora_names import COMPONENTS, Form, LoraPart, classic_clip_path, path_of
from sdtune.training.components.lora_weights import LoraModule, LoraWeights
from sdtune.training.components.peft_folder import CONFIG_FILE, WEIGHTS_FILE, adapters_in, read_adapter
from sdtune.training.components.scale import HEADER_KEYS, SPOILT, take_out
from sdtune.training.components.tensor_file import read_tensors

_KOHYA_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_MODULE_KEY = re.compile(
    r"(?P<path>.+?)(?:"
    r"\.lora_(?P<ab>A|B)(?:\.default)?\.weight"
    r"|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<direction>down|up)\.weight"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|\.(?P<alpha>alpha))"
)
# The attention processors of diffusers before 0.20 named their own layers.
_OLD_NAMES = {
    "unet": {"to_out": "to_out.0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
_DESCRIBES_TENSORS = ("format", ADAPTER_METADATA_KEY, *HEADER_KEYS)
_TYPES = (torch.float16, torch.bfloat16, torch.float32)

Parts = dict[tuple[str, str], dict[LoraPart, Tensor]]
"""The tensors of every module, by (component, path)."""
Alpha = Callable[[str, str, int], float]
"""(component, path, rank) -> alpha, of a module that has none beside its tensors."""


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What a file or folder held. metadata: the header's entries, without those that describe the tensors."""

    form: Form
    weights: LoraWeights
    metadata: dict[str, str]


def read_lora(path: Path) -> LoraWeights:
    """The LoRA in a file or folder; ``read_lora_file`` says which."""
    return read_lora_file(path).weights


def read_lora_file(path: Path) -> LoraFile:
    """The LoRA in a .safetensors file, in a folder's ``pytorch_lora_weights.safetensors``, or in a folder of PEFT's.

    diffusers' form: ``lora_A``/``lora_B``, ``lora.down``/``lora.up`` and the older attention processors, with the
    scale in its header if it has one. kohya's form: both ways to name SDXL's blocks. PEFT's form: ``peft_folder``.
    Tensors keep their type; of types other than float16, bfloat16 and float32 they become float32.
    TrainingError: not a safetensors file (others can run code when opened), or not a LoRA of these forms.
    """
    if path.is_dir() and not (path / DIFFUSERS_FILE).exists():
        return _read_peft(path)
    file = path / DIFFUSERS_FILE if path.is_dir() else path
    tensors, header = read_tensors(file)
    metadata = {key: value for key, value in header.items() if key not in _DESCRIBES_TENSORS}
    if tensors and all(key.startswith(tuple(_KOHYA_COMPONENTS)) for key in tensors):
        weights = _assembled(file, _kohya_parts(file, tensors), lambda component, path, rank: float(rank))
        return LoraFile(Form.KOHYA, _without_filling(weights), metadata)
    try:
        alpha = _configured_alpha(json.loads(header.get(ADAPTER_METADATA_KEY, "{}")))
        weights = take_out(_assembled(file, _diffusers_parts(file, tensors), alpha), header)
    except SPOILT as error:
        raise TrainingError(f"{file}: its header's entries about the LoRA are spoilt ({error}).") from None
    return LoraFile(Form.DIFFUSERS, weights, metadata)


def lora_files(path: Path) -> list[Path]:
    """The .safetensors files that ``read_lora_file`` reads there."""
    if not path.is_dir():
        return [path]
    if (path / DIFFUSERS_FILE).exists():
        return [path / DIFFUSERS_FILE]
    return [adapter / WEIGHTS_FILE for adapter in adapters_in(path).values()]


def _read_peft(folder: Path) -> LoraFile:
    adapters = adapters_in(folder)
    if not adapters:
        hint = (
            "This is the adapter of one model: put it into a folder under that model's name and give the outer folder."
            if (folder / CONFIG_FILE).is_file()
            else f"It holds {', '.join(sorted(entry.name for entry in folder.iterdir())[:3]) or 'nothing'}."
        )
        raise TrainingError(
            f"{folder}: no LoRA found; wanted {DIFFUSERS_FILE}, or PEFT's {CONFIG_FILE} in {', '.join(COMPONENTS)}. "
            f"{hint}"
        )
    parts: Parts = defaultdict(dict)
    configs: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for component, adapter in adapters.items():
        tensors, config, header = read_adapter(adapter)
        _add_parts(adapter, component, tensors, parts)
        configs |= {f"{component}.{name}": value for name, value in config.items()}
        metadata |= {key: value for key, value in header.items() if key not in _DESCRIBES_TENSORS}
        if base_model := config.get("base_model_name_or_path"):
            metadata.setdefault("ss_sd_model_name", public_name(str(base_model)))
    try:
        weights = _assembled(folder, parts, _configured_alpha(configs))
    except SPOILT as error:
        raise TrainingError(f"{folder}: the configuration of its adapters is spoilt ({error}).") from None
    return LoraFile(Form.PEFT, weights, metadata)


def _kohya_parts(file: Path, tensors: Mapping[str, Tensor]) -> Parts:
    parts: Parts = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        prefix = next(prefix for prefix in _KOHYA_COMPONENTS if name.startswith(prefix))
        try:
            part, path = LoraPart(suffix), path_of(name.removeprefix(prefix))
        except ValueError:
            raise _unknown(file, [key]) from None
        except TrainingError as error:
            raise TrainingError(f"{file}: {error}") from None
        parts[_KOHYA_COMPONENTS[prefix], path][part] = tensor
    return parts


def _diffusers_parts(file: Path, tensors: Mapping[str, Tensor]) -> Parts:
    by_component: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        if component not in COMPONENTS:  # attention processors saved by the UNet alone
            component, rest = "unet", key
        by_component[component][rest.removeprefix("base_model.model.")] = tensor
    if not by_component:
        raise _unknown(file, [])
    parts: Parts = defaultdict(dict)
    for component, of_component in by_component.items():
        _add_parts(file, component, of_component, parts)
    return parts


def _add_parts(file: Path, component: str, tensors: Mapping[str, Tensor], parts: Parts) -> None:
    """Put tensors under diffusers' and PEFT's names for them to ``parts``."""
    unknown = []
    for key, tensor in tensors.items():
        match = _MODULE_KEY.fullmatch(key.replace(".processor.", "."))
        if match is None:
            unknown.append(key)
            continue
        path = match["path"]
        head, _, last = path.rpartition(".")
        if (new := _OLD_NAMES[component.removesuffix("_2")].get(last)) is not None:
            path = f"{head}.{new}"
        if component != "unet":
            path = classic_clip_path(path)
        if match["magnitude"]:
            part = LoraPart.MAGNITUDE
        elif match["alpha"]:
            part = LoraPart.ALPHA
        else:
            part = LoraPart.DOWN if (match["ab"] or match["direction"]) in ("A", "down") else LoraPart.UP
        parts[component, path][part] = tensor
    if unknown:
        raise _unknown(file, unknown)


def _unknown(file: Path, keys: Sequence[str]) -> TrainingError:
    shown = ", ".join(keys[:3]) or "no tensors"
    if keys and all(key.endswith(".bias") for key in keys):
        return TrainingError(
            f"{file}: a LoRA with trained biases of the base model (such as {keys[0]}), which only PEFT's own form can "
            "hold. Train with --bias none for the other forms."
        )
    return TrainingError(
        f"{file}: not a LoRA of Stable Diffusion in diffusers', kohya's or PEFT's form (found {shown}). "
        "LyCORIS types other than LoRA and DoRA (LoHa, LoKr, Tucker...) are not read."
    )


def _assembled(file: Path, parts: Parts, alpha: Alpha) -> LoraWeights:
    weights: LoraWeights = {}
    for (component, path), tensors in sorted(parts.items()):
        if LoraPart.DOWN not in tensors or LoraPart.UP not in tensors:
            raise TrainingError(f"{file}: {component} {path} has only one half of its LoRA. Is the file complete?")
        down, up = _readable(tensors[LoraPart.DOWN]), _readable(tensors[LoraPart.UP])
        stored = tensors.get(LoraPart.ALPHA)
        own_alpha = alpha(component, path, int(down.shape[0])) if stored is None else float(stored)
        magnitude = tensors.get(LoraPart.MAGNITUDE)
        if magnitude is not None and magnitude.numel() != up.shape[0]:
            raise TrainingError(f"{file}: {component} {path} has a dora_scale per input, not per output: not read.")
        module = LoraModule(down, up, own_alpha, None if magnitude is None else _readable(magnitude).flatten())
        weights.setdefault(component, {})[path] = module
    return weights


def _readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in _TYPES else tensor.float()


def _without_filling(weights: LoraWeights) -> LoraWeights:
    """Without an out_proj of zeros, which write_kohya_lora fills in for a reader's sake."""
    kept: LoraWeights = {}
    for component, modules in weights.items():
        for path, module in modules.items():
            filling = component != "unet" and path.endswith(".out_proj") and module.magnitude is None
            if not filling or bool(module.down.any() or module.up.any()):
                kept.setdefault(component, {})[path] = module
    return kept


def _configured_alpha(configs: Mapping[str, Any]) -> Alpha:
    """From PEFT's LoraConfig of every component, its fields named ``component.field``; without one, alpha = rank."""

    def alpha(component: str, path: str, rank: int) -> float:
        value = configs.get(f"{component}.lora_alpha", rank)
        names = (path, path.removeprefix("text_model."))
        for pattern, special in (configs.get(f"{component}.alpha_pattern") or {}).items():
            if any(re.match(rf"(?:.*\.)?(?:{pattern})$", name) for name in names):
                value = special
                break  # PEFT takes the first that fits
        return float(value) * (math.sqrt(rank) if configs.get(f"{component}.use_rslora") else 1.0)

    return alpha
