"""Pictures to measure on: smooth noise, the same every time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
from PIL import Image

SIDE = 1024
"""In pixels."""


def make_pictures(folder: Path, count: int, *, copies: int = 1) -> None:
    """So many square JPEGs, each ``copies`` times under names of its own."""
    numbers = numpy.random.default_rng(0)
    folder.mkdir(parents=True)
    for picture in range(count):
        noise = Image.fromarray(numbers.integers(0, 255, (24, 24, 3), dtype=numpy.uint8))
        first = folder / f"{picture}-0.jpg"
        noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(first, quality=92)
        for copy in range(1, copies):
            shutil.copyfile(first, folder / f"{picture}-{copy}.jpg")
