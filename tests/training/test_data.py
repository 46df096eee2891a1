"""Every picture is used, the right caption goes with it, and the cache keeps the mathematics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdtune import events
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.data import CachedImages, cache_images
from sdtune.training.components.models import Parts, encode_prompts, load_parts
from sdtune.training.run import Run


@pytest.fixture
def method(settings: dict[str, Any]) -> DreamBoothLora:
    return DreamBoothLora.from_settings(settings)


@pytest.fixture
def run(method: DreamBoothLora, pictures: Callable[..., Path], tmp_path: Path) -> Iterator[Run]:
    with Run.open(method, pictures(5), tmp_path / "out") as run:
        yield run


@pytest.fixture
def parts(method: DreamBoothLora, run: Run) -> Parts:
    return load_parts(method, run)


def numbered(repeats: list[int]) -> CachedImages:
    """A cache whose latents tell which picture they are of."""
    count = len(repeats)
    mean = torch.arange(count).float().view(count, 1, 1, 1, 1).expand(count, 1, 4, 2, 2).clone()
    return CachedImages(
        paths=[Path(f"{i}.png") for i in range(count)], captions=[str(i) for i in range(count)], resolution=16,
        mean=mean, std=torch.zeros_like(mean), text=torch.arange(count).float().view(count, 1, 1),
        caption=torch.arange(count), repeats=repeats, scaling_factor=1.0,
    )  # fmt: skip


def seen(images: CachedImages, size: int, batches: int, seed: int = 0) -> list[int]:
    drawn: list[int] = []
    for batch in islice(images.batches(size, torch.Generator().manual_seed(seed)), batches):
        assert batch.latents.shape[0] == size
        # The caption always goes with its picture.
        assert torch.equal(batch.latents[:, 0, 0, 0], batch.encoder_hidden_states[:, 0, 0])
        drawn += batch.latents[:, 0, 0, 0].int().tolist()
    return drawn


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 12])
def test_every_round_shows_every_picture_once(size: int) -> None:
    drawn = seen(numbered([1] * 5), size, batches=5)
    for start in range(0, len(drawn) - 4, 5):
        assert sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4]


def test_repeats_weigh_pictures() -> None:
    assert Counter(seen(numbered([3, 1]), 4, batches=10)) == {0: 30, 1: 10}


def test_the_seed_decides_the_order() -> None:
    images = numbered([1] * 9)
    assert seen(images, 3, 6, seed=1) == seen(images, 3, 6, seed=1) != seen(images, 3, 6, seed=2)


def test_cached_latents_are_what_the_vae_says(method: DreamBoothLora, run: Run, parts: Parts) -> None:
    """Mean and deviation of the cache against the posterior of the picture encoded alone."""
    # Not of one colour: there group norm divides by nothing, and rounding is all that is left.
    Image.effect_noise((128, 128), 80).convert("RGB").save(run.dataset / "3.png")
    images = cache_images(method, run, parts, prompt="a photo of sks cat")
    assert images.mean.shape == (5, 1, 4, 16, 16)
    pixels = torch.frombuffer(bytearray(Image.open(images.paths[3]).tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, 128, 128, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = parts.vae.encode(pixels).latent_dist
    torch.testing.assert_close(images.mean[3, 0], posterior.mean[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images.std[3, 0], posterior.std[0], rtol=1e-4, atol=1e-6)


def test_latents_are_drawn_anew_around_the_mean() -> None:
    images = numbered([1])
    images.mean, images.std = torch.full((1, 1, 4, 8, 8), 2.0), torch.full((1, 1, 4, 8, 8), 0.5)
    images.scaling_factor = 0.1
    drawn = torch.cat([b.latents for b in islice(images.batches(4, torch.Generator().manual_seed(0)), 100)])
    assert drawn.mean().item() == pytest.approx(0.2, abs=1e-3)
    assert drawn.std().item() == pytest.approx(0.05, abs=1e-3)
    assert not torch.equal(drawn[0], drawn[1])


def test_captions_beside_the_pictures_are_used(method: DreamBoothLora, run: Run, parts: Parts) -> None:
    for number in range(5):
        (run.dataset / f"{number}.txt").write_text("a photo of sks cat asleep" if number == 2 else "a photo of sks cat")
    images = cache_images(method, run, parts, prompt="unused")
    assert images.captions[2] == "a photo of sks cat asleep"
    expected = encode_prompts(parts, ["a photo of sks cat asleep"])[0]
    torch.testing.assert_close(images.text[images.caption[2]], expected)
    assert images.caption[0] == images.caption[4] != images.caption[2]


def test_flipped_pictures_are_entries_of_their_own(method: DreamBoothLora, run: Run, parts: Parts) -> None:
    left_right = Image.new("RGB", (128, 128), "white")
    left_right.paste("black", (0, 0, 64, 128))
    left_right.save(run.dataset / "0.png")
    images = cache_images(method.model_copy(update={"random_flip": True}), run, parts, prompt="x")
    assert images.mean.shape[1] == 2
    assert not torch.allclose(images.mean[0, 0], images.mean[0, 1], atol=0.1)
    drawn = torch.cat([b.latents for b in islice(images.batches(5, torch.Generator().manual_seed(0)), 20)])
    assert len({round(float(x), 1) for x in drawn[:, 0, :, 0].mean(-1)}) > 5


def test_a_long_prompt_is_warned_of(
    method: DreamBoothLora, run: Run, parts: Parts, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_images(method, run, parts, prompt="a photo of sks cat, " * 40)
    told = [events.parse(line) for line in capsys.readouterr().out.splitlines()]
    notes = [event for event in told if isinstance(event, events.Note)]
    assert len(notes) == 1
    assert notes[0].level == "warning"
    assert "the text encoder reads the first 77" in notes[0].text
