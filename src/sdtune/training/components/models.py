"""The parts of a Stable Diffusion model, loaded for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from sdtune.errors import TrainingError
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.lora_weights import Family
from sdtune.training.run import Run


@dataclass
class Parts:
    """The model in its parts, all on the run's device; frozen unless a trainer thaws a part.

    unet, vae and text_encoder compute in the run's weight type.
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    noise_scheduler: Any

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures the model was made for."""
        return int(self.unet.config.sample_size * self.vae_scale)

    @property
    def family(self) -> Family:
        """SD 2.x reads OpenCLIP's text encoder, 1024 wide; 1.x reads CLIP's."""
        return Family.SD2 if self.unet.config.cross_attention_dim == 1024 else Family.SD1

    @property
    def v_prediction(self) -> bool:
        """The UNet predicts the velocity instead of the noise."""
        return bool(self.noise_scheduler.config.prediction_type == "v_prediction")

    @property
    def vae_scale(self) -> int:
        """Pixels per latent: 8 for Stable Diffusion."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


def load_parts(method: TrainingFields, run: Run) -> Parts:
    """Load the base model. TrainingError says what is missing or of which family sdtune has no trainer."""
    base = method.base_model
    try:
        config = DiffusionPipeline.load_config(base)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"base_model: {base} cannot be loaded ({error}). Check the name; a gated model needs a Hugging Face token, "
            "and a machine without the network a diffusers folder."
        ) from None
    if config.get("_class_name") != "StableDiffusionPipeline":
        raise TrainingError(
            f"base_model: {base} is a {config.get('_class_name')}; "
            f"{method.name} trains Stable Diffusion 1.x and 2.x (StableDiffusionPipeline)."
        )
    try:
        parts = Parts(
            tokenizer=CLIPTokenizer.from_pretrained(base, subfolder="tokenizer"),
            text_encoder=CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=run.weight_dtype),
            vae=AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=run.weight_dtype),
            unet=UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=run.weight_dtype),
            noise_scheduler=DDPMScheduler.from_pretrained(base, subfolder="scheduler"),
        )
    except (OSError, ValueError) as error:
        raise TrainingError(f"base_model: {base} is not whole: {error}") from None
    for part in (parts.text_encoder, parts.vae, parts.unet):
        part.requires_grad_(False)
        part.eval()
        part.to(run.device)
    if method.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
    return parts


@torch.no_grad()
def encode_prompts(parts: Parts, prompts: list[str]) -> torch.Tensor:
    """The text encoder's last hidden states, [len(prompts), 77, hidden size]; longer prompts are cut at 77 tokens."""
    tokens = parts.tokenizer(
        prompts,
        padding="max_length",
        max_length=parts.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    states: torch.Tensor = parts.text_encoder(tokens.input_ids.to(parts.text_encoder.device), return_dict=False)[0]
    return states


def count_tokens(parts: Parts, prompt: str) -> int:
    """Tokens of ``prompt``, its start and end included."""
    return len(parts.tokenizer(prompt).input_ids)
