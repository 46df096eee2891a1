"""What the UNet is trained to say, and how wrong it is."""

from __future__ import annotations

import torch
from torch.nn import functional

from sdtune.methods.fields import TrainingFields
from sdtune.training.components.data import Batch
from sdtune.training.components.models import Parts


def diffusion_loss(parts: Parts, batch: Batch, method: TrainingFields, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the UNet's prediction on freshly noised latents, a scalar.

    Noise and timesteps come from ``generator`` on the CPU, so that a run draws the same on every device.
    """
    latents = batch.latents
    size = latents.shape[0]
    noise = torch.randn(latents.shape, generator=generator)
    if method.noise_offset:
        # https://www.crosslabs.org/blog/diffusion-with-offset-noise
        noise += method.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    noise = noise.to(latents.device, latents.dtype)
    steps = parts.noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (size,), generator=generator).to(latents.device)
    noisy_latents = parts.noise_scheduler.add_noise(latents, noise, timesteps)
    noise_pred = parts.unet(noisy_latents, timesteps, batch.encoder_hidden_states, return_dict=False)[0]
    error = functional.mse_loss(noise_pred.float(), target(parts, latents, noise, timesteps).float(), reduction="none")
    error = error.mean(dim=(1, 2, 3))
    if method.snr_gamma is not None:
        error = error * snr_weights(parts, timesteps, method.snr_gamma)
    return error.mean()


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
