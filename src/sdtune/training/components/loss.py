"""What the UNet is trained to say, and how wrong it is."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from sdtune.methods.fields import TrainingFields
from sdtune.training.components.batches import Noised
from sdtune.training.components.models import Parts
from sdtune.training.components.text import Captions, Conditioning


def diffusion_loss(parts: Parts, captions: Captions, method: TrainingFields, noised: Noised) -> torch.Tensor:
    """Mean squared error of the UNet's prediction on noised latents, a scalar.

    Where the batch ends with class pictures, their mean error is added, times ``prior_loss_weight``. Nothing here asks
    the host for anything where all tensors are on the GPU, so that it can be captured.
    """
    batch = noised.batch
    conditioning = captions.encode(batch.captions) if batch.conditioning is None else batch.conditioning
    error = errors(parts, batch.latents, conditioning, noised.noise, noised.timesteps)
    if method.snr_gamma is not None:
        error = error * snr_weights(parts, noised.timesteps.to(error.device), method.snr_gamma)
    if not batch.prior:
        return error.mean()
    prior_loss_weight: float = getattr(method, "prior_loss_weight", 1.0)
    return error[: -batch.prior].mean() + prior_loss_weight * error[-batch.prior :].mean()


def errors(
    parts: Parts, latents: torch.Tensor, conditioning: Conditioning, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The mean squared error of each picture's prediction, float32 [batch].

    latents, noise: float32 [batch, 4, height, width]; timesteps: int64 [batch].
    """
    device = parts.unet.device
    latents, noise, timesteps = latents.to(device), noise.to(device), timesteps.to(device)
    noisy_latents = parts.noise_scheduler.add_noise(latents, noise, timesteps)
    noise_pred = parts.unet(
        noisy_latents.to(parts.unet.dtype),
        timesteps,
        conditioning.encoder_hidden_states.to(parts.unet.dtype),
        added_cond_kwargs=added_conditions(parts, conditioning.pooled, latents),
        return_dict=False,
    )[0]
    wanted = target(parts, latents, noise, timesteps)
    return functional.mse_loss(noise_pred.float(), wanted.float(), reduction="none").mean(dim=(1, 2, 3))


def added_conditions(parts: Parts, pooled: torch.Tensor | None, latents: torch.Tensor) -> dict[str, Any] | None:
    """SDXL is told of each picture's size and crop: here that it was whole and of the size it is trained at."""
    if pooled is None:
        return None
    height, width = (side * parts.vae_scale for side in latents.shape[-2:])
    # Not from a list, which would be copied from the host at every step.
    told = [pooled.new_full((len(pooled), 1), value) for value in (height, width, 0, 0, height, width)]
    return {"text_embeds": pooled, "time_ids": torch.cat(told, dim=1)}


def target(parts: Parts, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the UNet should predict: the noise, or the velocity (Salimans & Ho 2022, arXiv:2202.00512)."""
    if parts.v_prediction:
        velocity: torch.Tensor = parts.noise_scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    return noise


def snr_weights(parts: Parts, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR weights of the loss, float [batch]: min(SNR, gamma) / SNR, with SNR + 1 below for v-prediction.

    timesteps: int64 [batch]; gamma: 5.0 in the paper.
    Source: Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv:2303.09556.
    """
    alphas_cumprod = parts.noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    below = snr + 1 if parts.v_prediction else snr
    weights: torch.Tensor = snr.clamp(max=gamma) / below
    return weights
