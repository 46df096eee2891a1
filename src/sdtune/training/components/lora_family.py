"""Of which family a LoRA is: Stable Diffusion 1, 2 or XL, by the names and shapes of its modules."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sdtune.training.components.lora_names import Family
from sdtune.training.components.lora_weights import LoraModule, LoraWeights

_BY_CROSS_ATTENTION = {768: Family.SD1, 1024: Family.SD2, 2048: Family.SDXL}
"""By the width of what the UNet's cross-attention reads: the text encoders' hidden states."""
_BY_TEXT_ENCODER = {768: {Family.SD1, Family.SDXL}, 1024: {Family.SD2}}
"""By the width of the first text encoder; SDXL's first is that of SD 1."""
_ONLY_SDXL = re.compile(r"add_embedding\..+|.+\.transformer_blocks\.[1-9]\d*\..+")
"""The others have one transformer block per attention."""
_NEVER_SDXL = re.compile(r"(down_blocks\.(0\.attentions|3)|up_blocks\.(2\.attentions|3))\..+")
"""SDXL has three blocks, and no attention in the outermost."""


def possible_families(weights: LoraWeights) -> set[Family]:
    """The families that every module fits; several if too few kinds of layers were trained, none if they contradict."""
    possible = set(Family)
    for hint in _hints(weights):
        possible &= hint
    return possible


def _hints(weights: LoraWeights) -> Iterator[set[Family]]:
    if "text_encoder_2" in weights:
        yield {Family.SDXL}
    for path, module in weights.get("unet", {}).items():
        if _ONLY_SDXL.fullmatch(path):
            yield {Family.SDXL}
        elif _NEVER_SDXL.fullmatch(path):
            yield {Family.SD1, Family.SD2}
        yield from _by_shape(path, module)
    for path, module in weights.get("text_encoder", {}).items():
        if path.endswith(("_proj", "fc1")) and (width := int(module.down.shape[1])) in _BY_TEXT_ENCODER:
            yield _BY_TEXT_ENCODER[width]


def _by_shape(path: str, module: LoraModule) -> Iterator[set[Family]]:
    if path.endswith((".attn2.to_k", ".attn2.to_v")):
        if (width := int(module.down.shape[1])) in _BY_CROSS_ATTENTION:
            yield {_BY_CROSS_ATTENTION[width]}
    elif path.endswith((".proj_in", ".proj_out")) and module.down.dim() == 4:  # a convolution of one pixel
        yield {Family.SD1}
