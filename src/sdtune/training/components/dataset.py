"""The pictures of a run, as the dataset's layout names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageOps

from sdtune.methods.buckets import Shape
from sdtune.methods.fields import TrainingFields
from sdtune.methods.images import open_image
from sdtune.methods.layouts import check_source
from sdtune.methods.ledger import Example
from sdtune.training.components.fetch import source_of
from sdtune.training.components.model_card import DataCounts
from sdtune.training.run import Run

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """One picture to train on; size: its width and height in pixels, upright."""

    path: Path
    caption: str
    size: Shape
    repeats: int = 1

    @classmethod
    def of(cls, folder: Path, example: Example, prompt: str) -> Picture:
        """The picture of a row of the dataset's ledger; prompt: its caption if it has none of its own."""
        size = (example.width, example.height)
        return cls(folder / example.image, example.caption or prompt, size, example.repeats)


def read_dataset(method: TrainingFields, run: Run, prompt: str = "") -> tuple[list[Picture], list[Picture]]:
    """Pictures to train on, and ``held_out_images`` pictures kept out of training to measure on.

    prompt: the caption of pictures that have none.
    """
    ledger = check_source(source_of(run.dataset), method.layout, decode=False)
    ledger.raise_for_errors()
    pictures = [Picture.of(run.dataset, example, prompt) for example in ledger.examples]
    method.check_examples(len(pictures))
    kept, apart = keep_apart(pictures, method.held_out_images)
    run.record.data = counted(kept, len(apart))
    run.record.trigger_words = [prompt] if prompt else []
    return kept, apart


def counted(pictures: Sequence[Picture], held_out: int) -> DataCounts:
    """What the model card says of the pictures that are trained on; held_out: how many are not."""
    return DataCounts(
        pictures=len(pictures),
        shown=sum(picture.repeats for picture in pictures),
        captions=len({picture.caption for picture in pictures}),
        held_out=held_out,
    )


def keep_apart(pictures: Sequence[T], count: int) -> tuple[list[T], list[T]]:
    """What is trained on, and ``count`` that are not: every so many-th in their order, so that it hangs on no seed."""
    apart = {round(number * len(pictures) / count) for number in range(count)}
    return (
        [picture for number, picture in enumerate(pictures) if number not in apart],
        [picture for number, picture in enumerate(pictures) if number in apart],
    )


def first_captions(pictures: list[Picture]) -> list[str]:
    """The first two distinct captions, to sample where no prompt was given."""
    return list(dict.fromkeys(picture.caption for picture in pictures))[:2]


def open_cut(path: Path, shape: Shape) -> Image.Image:
    """The picture's middle, as much of it as fits ``shape``, RGB and upright, in that size."""
    with path.open("rb") as file:
        return ImageOps.fit(open_image(file), shape, Image.Resampling.LANCZOS)
