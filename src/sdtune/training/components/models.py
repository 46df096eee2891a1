"""The parts of a Stable Diffusion model, loaded for training."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdtune.errors import TrainingError
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.lora_weights import Family
from sdtune.training.run import Run

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass
class Parts:
    """The model in its parts, all on the run's device; frozen but for what a trainer trains.

    tokenizers, text_encoders: one of each, two for SDXL. Frozen parts compute in the run's weight type, trained ones
    are float32; SDXL's VAE is float32 always, because half precision overflows in it.
    """

    tokenizers: list[Any]
    text_encoders: list[Any]
    vae: Any
    unet: Any
    noise_scheduler: Any
    family: Family

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures the model was made for."""
        return int(self.unet.config.sample_size * self.vae_scale)

    @property
    def v_prediction(self) -> bool:
        """The UNet predicts the velocity instead of the noise."""
        return bool(self.noise_scheduler.config.prediction_type == "v_prediction")

    @property
    def vae_scale(self) -> int:
        """Pixels per latent: 8 for Stable Diffusion."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def modules(self) -> list[Any]:
        """Everything with weights."""
        return [*self.text_encoders, self.vae, self.unet]


def load_parts(method: TrainingFields, run: Run, trained: Collection[str] = ()) -> Parts:
    """Load the base model. TrainingError says what is missing or of which family sdtune has no trainer.

    trained: ``unet``, ``text_encoder`` where all of its weights are to be trained, which must be float32 then.
    """
    base = method.base_model
    try:
        config = DiffusionPipeline.load_config(base)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"base_model: {base} cannot be loaded ({error}). Check the name; a gated model needs a Hugging Face token, "
            "and a machine without the network a diffusers folder."
        ) from None
    pipeline = config.get("_class_name")
    if pipeline not in PIPELINES:
        raise TrainingError(
            f"base_model: {base} is a {pipeline}; {method.name} trains Stable Diffusion 1.x, 2.x and XL "
            f"({' or '.join(PIPELINES)})."
        )
    xl = pipeline == "StableDiffusionXLPipeline"

    def dtype(part: str) -> torch.dtype:
        return torch.float32 if part in trained or (xl and part == "vae") else run.weight_dtype

    text_dtype = dtype("text_encoder")
    try:
        tokenizers = [CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")]
        text_encoders = [CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=text_dtype)]
        if xl:
            second = CLIPTextModelWithProjection.from_pretrained(base, subfolder="text_encoder_2", dtype=text_dtype)
            tokenizers.append(CLIPTokenizer.from_pretrained(base, subfolder="tokenizer_2"))
            text_encoders.append(second)
        vae = AutoencoderKL.from_pretrained(base, subfolder="vae", dtype=dtype("vae"))
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", dtype=dtype("unet"))
        noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise TrainingError(f"base_model: {base} is not whole: {error}") from None
    parts = Parts(tokenizers, text_encoders, vae, unet, noise_scheduler, _family(xl, unet))
    for module in parts.modules:
        module.requires_grad_(False)
        module.eval()
        module.to(run.device)
    if method.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
    return parts


def _family(xl: bool, unet: Any) -> Family:
    """SD 2.x reads OpenCLIP's text encoder, 1024 wide; 1.x reads CLIP's."""
    if xl:
        return Family.SDXL
    return Family.SD2 if unet.config.cross_attention_dim == 1024 else Family.SD1
