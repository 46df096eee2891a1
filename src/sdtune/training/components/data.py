"""From a checked dataset to batches: every picture through the VAE and every caption through the text encoder once.

What the frozen VAE says of a picture is a normal distribution, so its mean and deviation are kept and each step
draws its own latents from them: the same mathematics as encoding anew at every step, without the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps

from sdtune import events
from sdtune.methods.fields import TrainingFields
from sdtune.methods.images import open_image
from sdtune.methods.layouts import check
from sdtune.training.components.models import Parts, count_tokens, encode_prompts
from sdtune.training.run import Run

VAE_BATCH = 8


@dataclass(frozen=True)
class Batch:
    """latents: scaled, [batch, 4, height / 8, width / 8]; encoder_hidden_states: [batch, 77, hidden size]."""

    latents: torch.Tensor
    encoder_hidden_states: torch.Tensor


@dataclass
class CachedImages:
    """The dataset as the VAE and the text encoder see it.

    mean, std: [images, variants, 4, height / 8, width / 8]; variant 1, if there is one, is the mirrored picture.
    text: [distinct captions, 77, hidden size]; caption: int64 [images], each picture's row of ``text``.
    repeats: how often one round over the dataset shows each picture; paths: the pictures themselves.
    """

    paths: list[Path]
    captions: list[str]
    resolution: int
    mean: torch.Tensor
    std: torch.Tensor
    text: torch.Tensor
    caption: torch.Tensor
    repeats: list[int]
    scaling_factor: float

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Endless batches, every picture once in each round; a batch may reach into the next round, so all are full."""
        device = self.mean.device
        for indices in _endless(self.repeats, size, generator):
            variant = torch.randint(self.mean.shape[1], (size,), generator=generator)
            mean, std = self.mean[indices, variant], self.std[indices, variant]
            noise = torch.randn(mean.shape, generator=generator).to(device, mean.dtype)
            yield Batch(
                latents=(mean + std * noise) * self.scaling_factor,
                encoder_hidden_states=self.text[self.caption[indices]],
            )


def cache_images(method: TrainingFields, run: Run, parts: Parts, prompt: str) -> CachedImages:
    """Read the run's dataset and cache it on the device. ``prompt`` is the caption of pictures that have none."""
    ledger = check(run.dataset, method.layout, decode=False)
    ledger.raise_for_errors()
    examples = ledger.examples
    resolution = method.resolution or parts.resolution
    captions = [example.caption or prompt for example in examples]
    texts = sorted(set(captions))
    _warn_of_long_captions(parts, texts, run)
    run.tell(events.Phase("cache", f"Encoding {len(examples)} pictures at {resolution} px"))
    means, stds = [], []
    for start in range(0, len(examples), VAE_BATCH):
        pixels = [
            variant
            for example in examples[start : start + VAE_BATCH]
            for variant in _variants(run.dataset / example.image, resolution, method.random_flip)
        ]
        mean, std = _encode(parts, torch.stack(pixels))
        means.append(mean)
        stds.append(std)
        run.tell(events.Progress("cache", min(start + VAE_BATCH, len(examples)), len(examples)))
    variants = 2 if method.random_flip else 1
    return CachedImages(
        paths=[run.dataset / example.image for example in examples],
        captions=captions,
        resolution=resolution,
        mean=torch.cat(means).reshape(len(examples), variants, *means[0].shape[1:]),
        std=torch.cat(stds).reshape(len(examples), variants, *stds[0].shape[1:]),
        text=torch.cat([encode_prompts(parts, [text]) for text in texts]),
        caption=torch.tensor([texts.index(caption) for caption in captions]),
        repeats=[example.repeats for example in examples],
        scaling_factor=float(parts.vae.config.scaling_factor),
    )


def open_square(path: Path, side: int) -> Image.Image:
    """The picture's centre square, RGB, upright, ``side`` pixels wide."""
    with path.open("rb") as file:
        return ImageOps.fit(open_image(file), (side, side), Image.Resampling.LANCZOS)


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


def _warn_of_long_captions(parts: Parts, texts: list[str], run: Run) -> None:
    limit = parts.tokenizer.model_max_length
    for text in texts:
        tokens = count_tokens(parts, text)
        if tokens > limit:
            run.tell(
                events.Note(
                    f"a prompt has {tokens} tokens; the text encoder reads the first {limit}: {text[:60]!r} ...",
                    level="warning",
                )
            )
