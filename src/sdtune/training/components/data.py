"""Pictures as the UNet sees them: every one goes through the VAE once.

What the frozen VAE says of a picture is a normal distribution, so its mean and deviation are kept and each step
draws its own latents from them: the same mathematics as encoding anew at every step, without the work.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from sdtune.training.components.room import room_for
from sdtune.training.components.text import Captions
from sdtune.training.run import Run

PIXELS_AT_ONCE = 4 * 512 * 512
"""Of the pictures that go through the VAE together: it holds 768 numbers for each."""


@dataclass
class CachedImages:
    """Pictures as the VAE sees them, each in its shape.

    shapes: of each picture width and height in pixels; mean, std: of each [variants, 4, height / 8, width / 8] on the
    CPU or on its disk, float32, unscaled; variant 1, if there is one, is the mirrored picture. captions: int64
    [images], rows of the run's Captions.
    """

    pictures: Sequence[Picture]
    shapes: Sequence[Shape]
    mean: Sequence[torch.Tensor]
    std: Sequence[torch.Tensor]
    captions: torch.Tensor
    scaling_factor: float
    proportion_empty_prompts: float = 0.0

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


def cache_images(
    pictures: Sequence[Picture],
    captions: Captions,
    parts: Parts,
    method: TrainingFields,
    run: Run,
    proportion_empty_prompts: float = 0.0,
    shapes: Sequence[Shape] = (),
) -> CachedImages:
    """The pictures through the VAE.

    shapes: of each picture; not given: the buckets that are nearest to their own.
    """
    buckets = method.buckets(method.resolution or parts.resolution, parts.bucket_step)
    run.tell(events.Phase("cache", f"Encoding {len(pictures)} pictures at {buckets.resolution} px"))
    if not shapes:
        shapes = [buckets.shape_of(picture.size) for picture in pictures]
        if len(set(shapes)) > 1:
            run.tell(events.Note(f"The pictures' shapes: {bucket_table(shapes)}"))

    def read(number: int) -> torch.Tensor:
        return _variants(pictures[number].path, shapes[number], method.random_flip)

    entries, done = _room(shapes, parts, method, run), 0
    with parts.at_work(parts.vae), ThreadPoolExecutor() as pool:
        for numbers, pixels in _ahead(pool, read, _together(shapes)):
            encoded = _encode(parts, torch.cat(pixels))
            for number, one in zip(numbers, torch.split(encoded, len(pixels[0])), strict=True):
                entries[number].copy_(one)
            done += len(numbers)
            run.tell(events.Progress("cache", done, len(pictures)))
    return CachedImages(
        pictures=pictures,
        shapes=shapes,
        mean=[entry[:, 0] for entry in entries],
        std=[entry[:, 1] for entry in entries],
        captions=torch.tensor([captions.row(picture.caption) for picture in pictures]),
        scaling_factor=float(parts.vae.config.scaling_factor),
        proportion_empty_prompts=proportion_empty_prompts,
    )


def _room(shapes: Sequence[Shape], parts: Parts, method: TrainingFields, run: Run) -> list[torch.Tensor]:
    """Room for each picture: float32 [variants, 2, 4, height / 8, width / 8]. What is read together lies together."""
    variants, channels, scale = 2 if method.random_flip else 1, parts.vae.config.latent_channels, parts.vae_scale
    sizes = [(variants, 2, channels, height // scale, width // scale) for width, height in shapes]
    numbers = [math.prod(size) for size in sizes]
    all_of_them = room_for(f"latents of {len(shapes)} pictures", sum(numbers), torch.float32, run)
    return [flat.view(size) for flat, size in zip(torch.split(all_of_them, numbers), sizes, strict=True)]


def _together(shapes: Sequence[Shape]) -> Iterator[list[int]]:
    """The numbers of the pictures that go through the VAE together: of one shape, as many as its memory allows."""
    for shape in dict.fromkeys(shapes):
        same = [number for number, one in enumerate(shapes) if one == shape]
        at_once = max(1, PIXELS_AT_ONCE // (shape[0] * shape[1]))
        yield from (same[start : start + at_once] for start in range(0, len(same), at_once))


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[int], torch.Tensor], batches: Iterable[list[int]]
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Each batch of numbers with what is read for them; the next is read while one is in use."""
    waiting: list[tuple[list[int], list[Future[torch.Tensor]]]] = []
    for numbers in batches:
        waiting.append((numbers, [pool.submit(read, number) for number in numbers]))
        if len(waiting) > 1:
            ready, pixels = waiting.pop(0)
            yield ready, [one.result() for one in pixels]
    for ready, pixels in waiting:
        yield ready, [one.result() for one in pixels]


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


def _variants(path: Path, shape: Shape, flip: bool) -> torch.Tensor:
    """The picture as float32 [1, 3, height, width] in -1..1, and mirrored after it if asked."""
    pixels = torch.from_numpy(numpy.array(open_cut(path, shape))).permute(2, 0, 1).float() / 127.5 - 1.0
    return torch.stack([pixels, pixels.flip(-1)] if flip else [pixels])


@torch.no_grad()
def _encode(parts: Parts, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and deviation of the latents of ``pixels`` [batch, 3, height, width], unscaled: float32 [batch, 2, ...]."""
    posterior = parts.vae.encode(pixels.to(parts.vae.device, parts.vae.dtype)).latent_dist
    return torch.stack([posterior.mean, posterior.std], dim=1).float().cpu()
