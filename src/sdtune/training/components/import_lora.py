"""LoRA files -> the neutral form: diffusers' and kohya's, of Stable Diffusion 1, 2 and SDXL."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdtune.errors import TrainingError
from sdtune.training.components.export import (
    ADAPTER_METADATA_KEY,
    DIFFUSERS_FILE,
    TRAINED_ALPHA_KEY,
)
from sdtune.training.components.lora_names import LoraPart, classic_clip_path, path_of
from sdtune.training.components.lora_weights import LoraModule, LoraWeights

_KOHYA_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_DIFFUSERS_KEY = re.compile(
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


def read_lora(path: Path) -> LoraWeights:
    """The LoRA in a file, or in the ``pytorch_lora_weights.safetensors`` of a folder, in float32.

    diffusers' form: ``lora_A``/``lora_B``, ``lora.down``/``lora.up`` and the older attention processors, with the
    scale in its header if it has one. kohya's form: both ways to name SDXL's blocks.
    TrainingError: not a safetensors file (others can run code when opened), or not a LoRA of these two forms.
    """
    file = path / DIFFUSERS_FILE if path.is_dir() else path
    tensors, metadata = _open(file)
    if tensors and all(key.startswith(tuple(_KOHYA_COMPONENTS)) for key in tensors):
        return _assembled(file, _kohya_parts(file, tensors), {})
    return _assembled(file, _diffusers_parts(file, tensors), metadata)


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
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


Parts = dict[tuple[str, str], dict[LoraPart, Tensor]]
"""The tensors of every module, by (component, path)."""


def _kohya_parts(file: Path, tensors: Mapping[str, Tensor]) -> Parts:
    parts: Parts = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        prefix = next(prefix for prefix in _KOHYA_COMPONENTS if name.startswith(prefix))
        try:
            part = LoraPart(suffix)
        except ValueError:
            raise _unknown(file, [key]) from None
        parts[_KOHYA_COMPONENTS[prefix], path_of(name.removeprefix(prefix))][part] = tensor
    return parts


def _diffusers_parts(file: Path, tensors: Mapping[str, Tensor]) -> Parts:
    parts: Parts = defaultdict(dict)
    unknown = []
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        if component not in ("unet", "text_encoder", "text_encoder_2"):  # attention processors saved by the UNet alone
            component, rest = "unet", key
        match = _DIFFUSERS_KEY.fullmatch(rest.removeprefix("base_model.model.").replace(".processor.", "."))
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
    if unknown or not parts:
        raise _unknown(file, unknown)
    return parts


def _unknown(file: Path, keys: Iterable[str]) -> TrainingError:
    shown = ", ".join(list(keys)[:3]) or "no tensors"
    return TrainingError(
        f"{file}: not a LoRA of Stable Diffusion in diffusers' or kohya's form (found {shown}). "
        "LyCORIS types other than LoRA and DoRA (LoHa, LoKr, Tucker...) are not read."
    )


def _assembled(file: Path, parts: Parts, metadata: Mapping[str, str]) -> LoraWeights:
    weights: LoraWeights = {}
    alphas = _header_alphas(metadata)
    trained: dict[str, float] = json.loads(metadata.get(TRAINED_ALPHA_KEY, "{}"))
    for (component, path), tensors in sorted(parts.items()):
        if LoraPart.DOWN not in tensors or LoraPart.UP not in tensors:
            raise TrainingError(f"{file}: {component} {path} has only one half of its LoRA. Is the file complete?")
        down, up = tensors[LoraPart.DOWN].float(), tensors[LoraPart.UP].float()
        if not bool(down.any() or up.any()):
            continue  # filled in by write_kohya_lora for a reader's sake
        stored = tensors.get(LoraPart.ALPHA)
        alpha = alphas(component, path, int(down.shape[0])) if stored is None else float(stored)
        if component in trained:  # write_diffusers_lora multiplied the scale into up
            up = up * (alpha / trained[component])
            alpha = trained[component]
        magnitude = tensors.get(LoraPart.MAGNITUDE)
        if magnitude is not None and magnitude.numel() != up.shape[0]:
            raise TrainingError(f"{file}: {component} {path} has a dora_scale per input, not per output: not read.")
        module = LoraModule(down, up, alpha, None if magnitude is None else magnitude.float().flatten())
        weights.setdefault(component, {})[path] = module
    return weights


def _header_alphas(metadata: Mapping[str, str]) -> Callable[[str, str, int], float]:
    """(component, path, rank) -> alpha, from the peft configuration that diffusers keeps in a file's header."""
    header: dict[str, Any] = json.loads(metadata.get(ADAPTER_METADATA_KEY, "{}"))

    def alpha(component: str, path: str, rank: int) -> float:
        value = header.get(f"{component}.lora_alpha", rank)
        for pattern, special in (header.get(f"{component}.alpha_pattern") or {}).items():
            if re.match(rf"(?:.*\.)?(?:{pattern})$", path):
                value = special
        return float(value) * (math.sqrt(rank) if header.get(f"{component}.use_rslora") else 1.0)

    return alpha
