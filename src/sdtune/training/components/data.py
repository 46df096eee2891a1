"""From pictures to batches: every picture goes through the VAE once.

What the frozen VAE says of a picture is a normal distribution, so its mean and deviation are kept and each step
draws its own latents from them: the same mathematics as encoding anew at every step, without the work.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy
import torch

from sdtune import events
from sdtune.methods.buckets import Shape, bucket_table
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.dataset import Picture, open_cut
from sdtune.training.components.models import Parts
from sdtune.training.components.processes import ALL, Share
from sdtune.training.components.text import Captions
from sdtune.training.run import Run

PIXELS_AT_ONCE = 8 * 512 * 512
"""Of the pictures that go through the VAE together: it holds 768 numbers for each."""


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one step.

    latents: scaled, [batch, 4, height / 8, width / 8]; captions: int64 [batch], rows of the run's Captions.
    prior: so many of the last rows are class pictures, whose loss keeps the model's prior.
    share: of a batch that is spread over several processes, which part this is.
    """

    latents: torch.Tensor
    captions: torch.Tensor
    prior: int = 0
    share: Share = ALL

    @property
    def shape(self) -> torch.Size:
        """[height / 8, width / 8], the same for all its pictures."""
        return self.latents.shape[-2:]


@dataclass
class CachedImages:
    """Pictures as the VAE sees them, each in its shape.

    shapes: of each picture width and height in pixels; mean, std: of each [variants, 4, height / 8, width / 8],
    unscaled; variant 1, if there is one, is the mirrored picture. captions: int64 [images], rows of the run's Captions.
    """

    pictures: Sequence[Picture]
    shapes: Sequence[Shape]
    mean: Sequence[torch.Tensor]
    std: Sequence[torch.Tensor]
    captions: torch.Tensor
    scaling_factor: float
    proportion_empty_prompts: float = 0.0

    def batches(self, size: int, generator: torch.Generator, share: Share = ALL) -> Iterator[Batch]:
        """Endless full batches of pictures of one shape each; every picture is shown as often as its repeats say.

        Several processes with one seed draw the same, as one process would whose batches are ``size`` for each of
        them together, and each keeps its share.
        """
        variants = self.mean[0].shape[0]
        for indices in self._indices(size * share.of, generator):
            variant = torch.randint(variants, (size * share.of,), generator=generator).tolist()
            mean = torch.stack([self.mean[index][one] for index, one in zip(indices, variant, strict=True)])
            std = torch.stack([self.std[index][one] for index, one in zip(indices, variant, strict=True)])
            noise = torch.randn(mean.shape, generator=generator).to(mean.device, mean.dtype)
            captions = self.captions[indices]
            if self.proportion_empty_prompts:
                dropped = torch.rand(size * share.of, generator=generator) < self.proportion_empty_prompts
                captions = captions.masked_fill(dropped, 0)
            yield Batch(share.rows((mean + std * noise) * self.scaling_factor), share.rows(captions), share=share)

    def by_shape(self) -> dict[torch.Size, CachedImages]:
        """The pictures of each shape apart; under [height / 8, width / 8]."""
        numbers: dict[torch.Size, list[int]] = defaultdict(list)
        for number, mean in enumerate(self.mean):
            numbers[mean.shape[-2:]].append(number)
        return {shape: self._of(chosen) for shape, chosen in numbers.items()}

    def _of(self, numbers: list[int]) -> CachedImages:
        def chosen(rows: Sequence[Any]) -> list[Any]:
            return [rows[number] for number in numbers]

        return replace(
            self, pictures=chosen(self.pictures), shapes=chosen(self.shapes), mean=chosen(self.mean),
            std=chosen(self.std), captions=self.captions[numbers],
        )  # fmt: skip

    def _indices(self, size: int, generator: torch.Generator) -> Iterator[list[int]]:
        """``size`` pictures of one shape at a time, of endless shuffled rounds.

        What a round leaves over of a shape waits for the next round, so that no picture is left out.
        """
        repeats = torch.tensor([picture.repeats for picture in self.pictures])
        one_round = torch.repeat_interleave(torch.arange(len(repeats)), repeats)
        waiting: dict[Shape, list[int]] = defaultdict(list)
        while True:
            for index in one_round[torch.randperm(len(one_round), generator=generator)].tolist():
                same = waiting[self.shapes[index]]
                same.append(index)
                if len(same) == size:
                    yield list(same)
                    same.clear()


def cache_images(
    pictures: Sequence[Picture],
    captions: Captions,
    parts: Parts,
    method: TrainingFields,
    run: Run,
    proportion_empty_prompts: float = 0.0,
    shapes: Sequence[Shape] = (),
) -> CachedImages:
    """The pictures through the VAE, on the run's device.

    shapes: of each picture; not given: the buckets that are nearest to their own.
    """
    buckets = method.buckets(method.resolution or parts.resolution, parts.bucket_step)
    run.tell(events.Phase("cache", f"Encoding {len(pictures)} pictures at {buckets.resolution} px"))
    if not shapes:
        shapes = [buckets.shape_of(picture.size) for picture in pictures]
        if len(set(shapes)) > 1:
            run.tell(events.Note(f"The pictures' shapes: {bucket_table(shapes)}"))
    encoded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for shape in dict.fromkeys(shapes):
        same = [number for number, one in enumerate(shapes) if one == shape]
        at_once = max(1, PIXELS_AT_ONCE // (shape[0] * shape[1]))
        for start in range(0, len(same), at_once):
            numbers = same[start : start + at_once]
            pixels = [_variants(pictures[number].path, shape, method.random_flip) for number in numbers]
            mean, std = _encode(parts, torch.cat(pixels))
            variants = pixels[0].shape[0]
            encoded |= dict(
                zip(numbers, zip(torch.split(mean, variants), torch.split(std, variants), strict=True), strict=True)
            )
            run.tell(events.Progress("cache", len(encoded), len(pictures)))
    return CachedImages(
        pictures=pictures,
        shapes=shapes,
        mean=[encoded[number][0] for number in range(len(pictures))],
        std=[encoded[number][1] for number in range(len(pictures))],
        captions=torch.tensor([captions.row(picture.caption) for picture in pictures]),
        scaling_factor=float(parts.vae.config.scaling_factor),
        proportion_empty_prompts=proportion_empty_prompts,
    )


def cache_classes(
    classes: Sequence[Picture], images: CachedImages, captions: Captions, parts: Parts, method: TrainingFields, run: Run
) -> CachedImages:
    """Class pictures, dealt out among the shapes of the subject's pictures, beside which they are trained."""
    every = list(dict.fromkeys(images.shapes))
    # One of each first, then in the proportions of the subject's.
    order = [*every, *(Counter(images.shapes) - Counter(every)).elements()]
    shapes = list(islice(cycle(order), max(len(classes), len(every))))
    dealt = list(islice(cycle(classes), len(shapes)))
    return cache_images(dealt, captions, parts, method, run, shapes=shapes)


def with_prior(
    instances: Iterator[Batch], classes: CachedImages, size: int, generator: torch.Generator, share: Share = ALL
) -> Iterator[Batch]:
    """Each batch of the subject followed by one of ``size`` class pictures, to go through the UNet together."""
    of_shape = {shape: part.batches(size, generator, share) for shape, part in classes.by_shape().items()}
    for instance in instances:
        prior = next(of_shape[instance.shape])
        yield Batch(
            torch.cat([instance.latents, prior.latents]),
            torch.cat([instance.captions, prior.captions]),
            prior=len(prior.latents),
            share=share,
        )


def _variants(path: Path, shape: Shape, flip: bool) -> torch.Tensor:
    """The picture as float32 [1, 3, height, width] in -1..1, and mirrored after it if asked."""
    pixels = torch.from_numpy(numpy.array(open_cut(path, shape))).permute(2, 0, 1).float() / 127.5 - 1.0
    return torch.stack([pixels, pixels.flip(-1)] if flip else [pixels])


@torch.no_grad()
def _encode(parts: Parts, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of ``pixels`` [batch, 3, height, width], unscaled, float32."""
    posterior = parts.vae.encode(pixels.to(parts.vae.device, parts.vae.dtype)).latent_dist
    return posterior.mean.float(), posterior.std.float()
