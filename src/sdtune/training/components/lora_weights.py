"""A LoRA in the neutral form that every file format is written from and read into.

``{"unet": {module path: LoraModule}, "text_encoder": {...}, "text_encoder_2": {...}}``; a component without
adapters is absent. UNet paths are diffusers' module names. Text-encoder paths are the classic ones that begin with
``text_model.``, whatever the installed transformers calls its modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sdtune.errors import TrainingError
from sdtune.training.components.lora_names import Family as Family
from sdtune.training.components.lora_names import classic_clip_path


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The adapter of one layer: ``W + alpha / rank * up @ down``.

    down: [rank, in] of a linear layer, [rank, in, kh, kw] of a convolution; up: [out, rank] or [out, rank, 1, 1].
    magnitude: [out], DoRA's learned norm of each output row (Liu et al. 2024, arXiv:2402.09353), else None.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, without a magnitude if there is none."""
        held = {"down": self.down, "up": self.up, "magnitude": self.magnitude}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def to(self, dtype: torch.dtype | None) -> LoraModule:
        """The same in ``dtype``; None: each tensor in its own."""
        down, up = self.down.to(dtype or self.down.dtype), self.up.to(dtype or self.up.dtype)
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype or self.magnitude.dtype)
        return replace(self, down=down, up=up, magnitude=magnitude)

    def delta(self) -> Tensor:
        """What is added to the layer's weight (before DoRA's normalisation), in its shape, float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.reshape(self.up.shape[0], *self.down.shape[1:])


LoraWeights: TypeAlias = dict[str, dict[str, LoraModule]]


def collect_lora(
    unet: nn.Module,
    text_encoder: nn.Module | None = None,
    text_encoder_2: nn.Module | None = None,
    adapter_name: str = "default",
) -> LoraWeights:
    """Float32 copies on the CPU of the adapters that peft put into the models.

    ``alpha`` is the configured one, not the strength a layer may be scaled to at the moment; rank-stabilised LoRA
    (scale alpha / sqrt(rank)), which no file format knows, becomes the alpha of the same scale.
    TrainingError: no adapter of that name anywhere, or one that LoRA files cannot carry (bias, embedding, aLoRA...).
    """
    models = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    weights: LoraWeights = {}
    for component, model in models.items():
        modules = {} if model is None else _modules(model, adapter_name)
        if component != "unet":
            modules = {classic_clip_path(path): module for path, module in modules.items()}
        if modules:
            weights[component] = modules
    if not weights:
        given = ", ".join(component for component, model in models.items() if model is not None)
        raise TrainingError(f"No LoRA adapter named {adapter_name!r} in {given}: there is nothing to export.")
    return weights


def _modules(model: nn.Module, adapter_name: str) -> dict[str, LoraModule]:
    from peft.tuners.lora import LoraLayer

    modules = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in {*layer.lora_A, *layer.lora_embedding_A}:
            # get_peft_model() and torch.compile() wrap a model and prefix the names of its modules
            path = name.replace("_orig_mod.", "").removeprefix("base_model.model.")
            modules[path] = _module(layer, adapter_name, path)
    return modules


def _module(layer: Any, adapter_name: str, path: str) -> LoraModule:
    magnitude = None
    if adapter_name in layer.lora_magnitude_vector:
        magnitude = _copy(layer.lora_magnitude_vector[adapter_name].weight).flatten()
    elif adapter_name in layer.lora_variant or adapter_name in layer.lora_embedding_A:
        kind = type(layer.lora_variant.get(adapter_name, layer)).__name__
        raise TrainingError(f"{path}: LoRA files carry linear and convolution LoRA and DoRA, not {kind}.")
    if layer.lora_bias.get(adapter_name, False):
        raise TrainingError(f"{path}: LoRA files cannot carry lora_bias=True; train with lora_bias=False.")
    down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    alpha = float(layer.lora_alpha[adapter_name])
    if layer.use_rslora.get(adapter_name, False):
        alpha *= math.sqrt(layer.r[adapter_name])
    return LoraModule(_copy(down), _copy(up), alpha, magnitude)


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True).contiguous()


def lora_change(weights: LoraWeights) -> float:
    """The largest change of any one weight of the base model; 0.0 means that nothing was learned.

    DoRA's magnitudes start at the norms of the base model, which are not known here, and do not count.
    TrainingError: a weight is NaN or infinite.
    """
    largest = 0.0
    for component, modules in weights.items():
        for path, module in modules.items():
            change = float(module.delta().abs().max())
            if module.magnitude is not None and not bool(module.magnitude.isfinite().all()):
                change = math.nan
            if not math.isfinite(change):
                raise TrainingError(
                    f"The LoRA of {component} {path} is not finite (NaN or infinity). "
                    "Train with a lower learning rate, or in bf16 or fp32 instead of fp16."
                )
            largest = max(largest, change)
    return largest
