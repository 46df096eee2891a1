"""The contact sheet shows every picture it was given, where it belongs, in any number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdtune.training.components.contact_sheet import contact_sheet
from sdtune.training.components.data import CachedImages
from sdtune.training.components.dataset import Picture
from sdtune.training.components.models import Parts
from sdtune.training.components.sampling import Samples
from sdtune.training.run import Run


def plain(colour: str, count: int) -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), colour)] * count


@pytest.mark.parametrize("samples", [1, 2, 4, 6, 16])
@pytest.mark.parametrize("shown", [1, 3, 8, 30])
def test_every_sample_is_there(shown: int, samples: int) -> None:
    rows = [("before", plain("#ff0000", samples)), ("after", plain("#0000ff", samples))]
    sheet = contact_sheet("t", plain("#00ff00", shown), [("a prompt", rows), ("another", rows)])
    counts = {colour: number for number, colour in sheet.getcolors(maxcolors=1 << 20) or []}
    assert counts[255, 0, 0] == counts[0, 0, 255] == 2 * samples * 192**2
    tile = min(192, max(4, samples) * 200 // min(shown, 8) - 8)
    assert counts[0, 255, 0] == min(shown, 8) * tile**2


def test_before_stands_above_after_and_long_prompts_are_cut() -> None:
    rows = [("before", plain("#ff0000", 1)), ("after", plain("#0000ff", 1))]
    sheet = contact_sheet("x\ny" * 500, plain("#00ff00", 1), [("a “prompt” " * 100, rows)])
    column = [sheet.getpixel((100, y)) for y in range(sheet.height)]
    assert column.index((0, 255, 0)) < column.index((255, 0, 0)) < column.index((0, 0, 255))
    assert sheet.width < 1000


def test_no_more_pictures_are_opened_than_it_shows(
    parts: Parts, method: Any, run: Run, pictures: Callable[..., Path]
) -> None:
    """All pictures of a large dataset would not fit into memory: those that are not shown are not even there."""
    folder = pictures(8, name="shown")
    images = CachedImages(
        pictures=[Picture(folder / f"{number}.png", "x", (128, 128)) for number in range(20)],
        shapes=[(128, 128)] * 20, mean=[], std=[], captions=torch.zeros(20), scaling_factor=1.0,
    )  # fmt: skip
    samples = Samples(parts, method, run)
    samples.drawn = {step: [plain("#ff0000", 1)] for step in (0, 4)}
    samples.save_contact_sheet(images)
    assert (run.output / "contact_sheet.png").is_file()
