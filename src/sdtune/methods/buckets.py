"""Aspect-ratio buckets: the few shapes that pictures are trained in, so that little of each is cut away.

The table is that of kohya's sd-scripts (library/model_util.py, make_bucket_resolutions), after NovelAI's improvements
on Stable Diffusion (2022): sides in steps, no shape of more pixels than the square of the resolution.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

Shape: TypeAlias = tuple[int, int]
"""Width and height in pixels."""
STEP = 64
"""Sides are multiples of so many pixels, in models for 512 pixels and more."""


def bucket_step(resolution: int, smallest: int) -> int:
    """What sides of pictures are multiples of: 64 where that is custom, else ``smallest``, which the UNet can halve."""
    return STEP if resolution >= 512 and STEP % smallest == 0 else smallest


@dataclass(frozen=True)
class Buckets:
    """The shapes for pictures at ``resolution``.

    step: what sides are multiples of. shortest, longest: bounds of a side. no_upscale: a picture smaller than its
    shape keeps its own, cut to whole steps.
    """

    resolution: int
    step: int
    shortest: int
    longest: int
    no_upscale: bool = False

    @cached_property
    def shapes(self) -> list[Shape]:
        """Every shape, the widest last."""
        found = {(self.resolution, self.resolution)}
        for side in range(self.shortest, self.longest + 1, self.step):
            other = min(self.longest, self.resolution**2 // side // self.step * self.step)
            if other >= self.shortest:
                found |= {(side, other), (other, side)}
        return sorted(found, key=lambda shape: (shape[0] / shape[1], shape))

    def shape_of(self, picture: Shape) -> Shape:
        """The shape of the nearest aspect ratio, of several the largest."""
        width, height = picture

        def distance(shape: Shape) -> tuple[float, int]:
            # Ratios, so that twice as wide is as far away as twice as high.
            return round(abs(math.log(shape[0] * height / (shape[1] * width))), 9), -shape[0] * shape[1]

        nearest = min(self.shapes, key=distance)
        if self.no_upscale and (nearest[0] > width or nearest[1] > height):
            return self._within(nearest[0], width), self._within(nearest[1], height)
        return nearest

    def _within(self, side: int, picture: int) -> int:
        return min(side, max(self.step, picture // self.step * self.step))


def bucket_table(shapes: Iterable[Shape]) -> str:
    """How many pictures have which shape, the most first: ``512 x 512: 12, 448 x 576: 3``."""
    counts = sorted(Counter(shapes).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{width} x {height}: {count}" for (width, height), count in counts)
