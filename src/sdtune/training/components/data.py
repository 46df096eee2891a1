"""From pictures to batches: every picture goes through the VAE once.

What the frozen VAE says of a picture is a normal distribution, so its mean and deviation are kept and each step
draws its own latents from them: the same mathematics as encoding anew at every step, without the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from sdtune import events
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.dataset import Picture, open_square
from sdtune.training.components.models import Parts
from sdtune.training.components.text import Captions
from sdtune.training.run import Run

VAE_BATCH = 8


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    latents: scaled, [batch, 4, height / 8, width / 8]; captions: int64 [batch], rows of the run's Captions.
    prior: so many of the last rows are class pictures, whose loss keeps the model's prior.
    """

    latents: torch.Tensor
    captions: torch.Tensor
    prior: int = 0


@dataclass
class CachedImages:
    """Pictures as the VAE sees them.

    mean, std: [images, variants, 4, height / 8, width / 8], unscaled; variant 1, if there is one, is the mirrored
    picture. captions: int64 [images], rows of the run's Captions.
    """

    pictures: Sequence[Picture]
    resolution: int
    mean: torch.Tensor
    std: torch.Tensor
    captions: torch.Tensor
    scaling_factor: float
    proportion_empty_prompts: float = 0.0

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Endless batches, every picture once in each round; a batch may reach into the next round, so all are full."""
        device = self.mean.device
        for indices in _endless([picture.repeats for picture in self.pictures], size, generator):
            variant = torch.randint(self.mean.shape[1], (size,), generator=generator)
            mean, std = self.mean[indices, variant], self.std[indices, variant]
            noise = torch.randn(mean.shape, generator=generator).to(device, mean.dtype)
            captions = self.captions[indices]
            if self.proportion_empty_prompts:
                dropped = torch.rand(size, generator=generator) < self.proportion_empty_prompts
                captions = captions.masked_fill(dropped, 0)
            yield Batch((mean + std * noise) * self.scaling_factor, captions)


def cache_images(
    pictures: Sequence[Picture],
    captions: Captions,
    parts: Parts,
    method: TrainingFields,
    run: Run,
    proportion_empty_prompts: float = 0.0,
) -> CachedImages:
    """The pictures through the VAE, on the run's device."""
    resolution = method.resolution or parts.resolution
    run.tell(events.Phase("cache", f"Encoding {len(pictures)} pictures at {resolution} px"))
    means, stds = [], []
    for start in range(0, len(pictures), VAE_BATCH):
        pixels = [
            variant
            for picture in pictures[start : start + VAE_BATCH]
            for variant in _variants(picture.path, resolution, method.random_flip)
        ]
        mean, std = _encode(parts, torch.stack(pixels))
        means.append(mean)
        stds.append(std)
        run.tell(events.Progress("cache", min(start + VAE_BATCH, len(pictures)), len(pictures)))
    variants = 2 if method.random_flip else 1
    return CachedImages(
        pictures=pictures,
        resolution=resolution,
        mean=torch.cat(means).reshape(len(pictures), variants, *means[0].shape[1:]),
        std=torch.cat(stds).reshape(len(pictures), variants, *stds[0].shape[1:]),
        captions=torch.tensor([captions.row(picture.caption) for picture in pictures]),
        scaling_factor=float(parts.vae.config.scaling_factor),
        proportion_empty_prompts=proportion_empty_prompts,
    )


def with_prior(instances: Iterator[Batch], classes: Iterator[Batch]) -> Iterator[Batch]:
    """Each batch of the subject followed by one of its class, to go through the UNet together."""
    for instance, prior in zip(instances, classes, strict=False):
        yield Batch(
            torch.cat([instance.latents, prior.latents]),
            torch.cat([instance.captions, prior.captions]),
            prior=len(prior.latents),
        )


def _variants(path: Path, resolution: int, flip: bool) -> list[torch.Tensor]:
    """The picture as float32 [3, resolution, resolution] in -1..1, and mirrored if asked."""
    pixels = torch.from_numpy(numpy.array(open_square(path, resolution))).permute(2, 0, 1).float() / 127.5 - 1.0
    return [pixels, pixels.flip(-1)] if flip else [pixels]


@torch.no_grad()
def _encode(parts: Parts, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of ``pixels`` [batch, 3, height, width], unscaled, float32."""
    posterior = parts.vae.encode(pixels.to(parts.vae.device, parts.vae.dtype)).latent_dist
    return posterior.mean.float(), posterior.std.float()


def _endless(repeats: list[int], size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices of endless shuffled rounds, int64 [size] at a time."""
    one_round = torch.repeat_interleave(torch.arange(len(repeats)), torch.tensor(repeats))
    waiting = one_round[:0]
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, one_round[torch.randperm(len(one_round), generator=generator)]])
        yield waiting[:size]
        waiting = waiting[size:]
