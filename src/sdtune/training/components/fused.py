"""Puts the fused kernels into a diffusers UNet."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn


def can_fuse(device: torch.device) -> bool:
    """The fused kernels run on this device; or the tests interpret them on the CPU."""
    return _are_for(device) and obstacle(device) is None


def _are_for(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    # Before compute capability 8 there is no bfloat16, and Triton's support has ended.
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def obstacle(device: torch.device) -> str | None:
    """Why not even a small kernel runs on a device that they are for; None if it does.

    Triton compiles kernels for the GPU, and with a C compiler a library of its own for Python, which the images have
    ready made.
    """
    from sdtune.training.kernels.residual import add_bias

    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    x = torch.zeros(1, 320, 8, 8, **like).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            add_bias(x, x, torch.zeros(320, **like))
    except Exception as error:  # noqa: BLE001
        # Of Triton, of a compiler, or of the driver: whatever it is, torch's own kernels do without.
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def fuse(unet: Any, warn: Callable[[str], None]) -> bool:
    """Let the UNet compute with the fused kernels, in channels_last from end to end; whether it does.

    In place: names, parameters and state_dict stay. Call it once, when the model is on its device: before its weights
    are put into flat tensors, which the change of their layout would part; adapters may come later. What a kernel does
    not know stays as it is, layer by layer. The first step of each shape compiles kernels: take one before a CUDA graph
    is captured. warn: is told why they do not run where they should.
    """
    if not _are_for(unet.device):
        return False
    if reason := obstacle(unet.device):
        warn(
            "The fused kernels do not run here, so training takes longer, with the same result. Triton needs a C "
            f"compiler (apt install gcc) and Python's headers (python3-dev) to start them. It said: {reason}"
        )
        return False
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    from sdtune.training.kernels import modules
    from sdtune.training.kernels.processor import FusedAttnProcessor, Renewal

    fused: dict[type, Any] = {
        ResnetBlock2D: modules.FusedResnetBlock2D,
        Transformer2DModel: modules.FusedTransformer2DModel,
        BasicTransformerBlock: modules.FusedBasicTransformerBlock,
        GEGLU: modules.FusedGEGLU,
    }
    unet.to(memory_format=torch.channels_last)
    attentions = []
    for module in unet.modules():
        kind = fused.get(type(module))
        if kind is not None and kind.fits(module):
            module.__class__ = kind
        known = type(module) is Attention and type(module.processor) is AttnProcessor2_0
        if known and FusedAttnProcessor.fits(module):
            module.processor = FusedAttnProcessor()
            attentions.append(module)
    if modules.FusedNormSilu.fits(unet.conv_norm_out, unet.conv_act):
        unet.conv_norm_out.__class__ = modules.FusedNormSilu
        unet.conv_act = nn.Identity()
    if attentions:
        unet.register_forward_pre_hook(Renewal(attentions))
    return True
