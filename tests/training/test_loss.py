"""The loss against the formulas of the papers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.batches import Batch, noised
from sdtune.training.components.lora_weights import Family
from sdtune.training.components.loss import diffusion_loss, snr_weights
from sdtune.training.components.models import Parts
from sdtune.training.components.text import Conditioning

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


class Recorder(torch.nn.Module):
    """A UNet that predicts zeros and remembers what it was asked."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, **rest: Any) -> Any:
        self.sample, self.timesteps, self.rest = sample, timesteps, rest
        return (torch.zeros_like(sample),)


class Silence:
    """Captions that say nothing."""

    pooled: torch.Tensor | None = None

    def encode(self, rows: torch.Tensor) -> Conditioning:
        return Conditioning(torch.zeros(len(rows), 77, 8), self.pooled)


def parts(prediction_type: str = "epsilon") -> Parts:
    scheduler = DDPMScheduler(**SD15, prediction_type=prediction_type)
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=[1, 1, 1, 1]))
    return Parts([], [], vae, Recorder(), scheduler, Family.SD1)


def method(**settings: Any) -> DreamBoothLora:
    return DreamBoothLora.from_settings({"instance_prompt": "x", **settings})


def loss_of(
    the_parts: Parts, the_method: DreamBoothLora, latents: torch.Tensor, seed: int = 0, prior: int = 0,
    captions: Any = None,
) -> float:  # fmt: skip
    batch = Batch(latents, torch.zeros(len(latents), dtype=torch.int64), prior)
    drawn = noised(batch, 1000, the_method.noise_offset, torch.Generator().manual_seed(seed))
    return diffusion_loss(the_parts, captions or Silence(), the_method, drawn).item()


def test_a_unet_that_says_nothing_is_wrong_by_the_variance_of_the_noise() -> None:
    assert loss_of(parts(), method(), torch.randn(64, 4, 16, 16)) == pytest.approx(1.0, abs=0.02)


def test_the_velocity_is_the_target_of_a_v_prediction_model() -> None:
    """v = sqrt(a) noise - sqrt(1 - a) latents, Salimans & Ho 2022, appendix D."""
    the_parts, latents = parts("v_prediction"), torch.randn(8, 4, 16, 16)
    loss = loss_of(the_parts, method(), latents)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (8,), generator=generator)
    alpha = the_parts.noise_scheduler.alphas_cumprod[timesteps].view(8, 1, 1, 1)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    assert loss == pytest.approx(velocity.square().mean().item(), rel=1e-5)


def test_latents_are_noised_by_the_schedule() -> None:
    the_parts, latents = parts(), torch.ones(4, 4, 8, 8)
    loss_of(the_parts, method(), latents)
    alpha = the_parts.noise_scheduler.alphas_cumprod[the_parts.unet.timesteps].view(4, 1, 1, 1)
    noise = (the_parts.unet.sample - alpha.sqrt() * latents) / (1 - alpha).sqrt()
    assert noise.mean().item() == pytest.approx(0, abs=0.1)
    assert noise.std().item() == pytest.approx(1, abs=0.1)


def test_the_seed_decides_noise_and_timesteps() -> None:
    latents = torch.randn(2, 4, 8, 8)
    assert loss_of(parts(), method(), latents, 3) == loss_of(parts(), method(), latents, 3)
    assert loss_of(parts(), method(), latents, 3) != loss_of(parts(), method(), latents, 4)


def test_min_snr_weights_are_the_papers() -> None:
    the_parts = parts()
    timesteps = torch.tensor([0, 100, 500, 999])
    alphas = the_parts.noise_scheduler.alphas_cumprod[timesteps].double()
    snr = alphas / (1 - alphas)
    expected = snr.clamp(max=5.0) / snr
    torch.testing.assert_close(snr_weights(the_parts, timesteps, 5.0).double(), expected, rtol=1e-5, atol=1e-7)
    expected_v = snr.clamp(max=5.0) / (snr + 1)
    weights_v = snr_weights(parts("v_prediction"), timesteps, 5.0)
    torch.testing.assert_close(weights_v.double(), expected_v, rtol=1e-5, atol=1e-7)


def test_snr_gamma_weighs_the_loss() -> None:
    latents = torch.randn(16, 4, 8, 8)
    assert loss_of(parts(), method(snr_gamma=1.0), latents) < 0.8 * loss_of(parts(), method(), latents)


def test_noise_offset_shifts_whole_channels() -> None:
    """The mean of a channel's noise varies by the offset, where plain noise's hardly does."""
    the_parts, latents = parts(), torch.zeros(256, 4, 16, 16)
    spread = []
    for offset in (0.0, 0.5):
        loss_of(the_parts, method(noise_offset=offset), latents)
        alpha = the_parts.noise_scheduler.alphas_cumprod[the_parts.unet.timesteps].view(-1, 1, 1, 1)
        spread.append((the_parts.unet.sample / (1 - alpha).sqrt()).mean(dim=(2, 3)).std().item())
    assert spread[0] == pytest.approx(1 / 16, rel=0.1)
    assert spread[1] == pytest.approx((0.5**2 + 1 / 256) ** 0.5, rel=0.1)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_prior_is_added_with_its_weight(weight: float) -> None:
    """The error of subject and class apart, then weighed: with zeros predicted, each is its noise's square."""
    latents = torch.randn(6, 4, 8, 8)
    prior = method(with_prior_preservation=True, class_prompt="a cat", prior_loss_weight=weight)
    loss = loss_of(parts(), prior, latents, prior=2)
    squares = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).square().mean(dim=(1, 2, 3))
    assert loss == pytest.approx((squares[:4].mean() + weight * squares[4:].mean()).item(), rel=1e-5)


def test_sdxl_is_told_the_size_of_its_pictures() -> None:
    the_parts, captions = parts(), Silence()
    captions.pooled = torch.randn(3, 16)
    loss_of(the_parts, method(), torch.randn(3, 4, 8, 16), captions=captions)
    added = the_parts.unet.rest["added_cond_kwargs"]
    assert added["time_ids"].tolist() == [[64, 128, 0, 0, 64, 128]] * 3
    torch.testing.assert_close(added["text_embeds"], captions.pooled)
