"""Every picture is used, the right caption goes with it, and the cache keeps the mathematics."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdtune.errors import DatasetError
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.data import Batch, CachedImages, cache_images, with_prior
from sdtune.training.components.dataset import Picture, read_dataset
from sdtune.training.components.models import Parts
from sdtune.training.components.text import Captions
from sdtune.training.run import Run


def numbered(repeats: list[int], empty: float = 0.0) -> CachedImages:
    """A cache whose latents and captions tell which picture they are of, beginning with 1."""
    count = len(repeats)
    mean = torch.arange(1, count + 1).float().view(count, 1, 1, 1, 1).expand(count, 1, 4, 2, 2).clone()
    return CachedImages(
        pictures=[Picture(Path(f"{i}.png"), str(i), repeats[i]) for i in range(count)], resolution=16,
        mean=mean, std=torch.zeros_like(mean), captions=torch.arange(1, count + 1), scaling_factor=1.0,
        proportion_empty_prompts=empty,
    )  # fmt: skip


def take(images: CachedImages, size: int, batches: int, seed: int = 0) -> list[Batch]:
    return list(islice(images.batches(size, torch.Generator().manual_seed(seed)), batches))


def seen(images: CachedImages, size: int, batches: int, seed: int = 0) -> list[int]:
    drawn: list[int] = []
    for batch in take(images, size, batches, seed):
        assert batch.latents.shape[0] == size
        assert batch.latents[:, 0, 0, 0].int().tolist() == batch.captions.tolist()
        drawn += batch.captions.tolist()
    return drawn


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 12])
def test_every_round_shows_every_picture_once(size: int) -> None:
    drawn = seen(numbered([1] * 5), size, batches=5)
    for start in range(0, len(drawn) - 4, 5):
        assert sorted(drawn[start : start + 5]) == [1, 2, 3, 4, 5]


def test_repeats_weigh_pictures() -> None:
    assert Counter(seen(numbered([3, 1]), 4, batches=10)) == {1: 30, 2: 10}


def test_the_seed_decides_the_order() -> None:
    images = numbered([1] * 9)
    assert seen(images, 3, 6, seed=1) == seen(images, 3, 6, seed=1) != seen(images, 3, 6, seed=2)


def test_some_captions_are_dropped() -> None:
    rows = torch.cat([batch.captions for batch in take(numbered([1] * 5, empty=0.25), 5, 400)])
    assert (rows == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_class_pictures_follow_the_subject() -> None:
    subject, klass = numbered([1, 1]), numbered([1] * 7)
    generator = torch.Generator().manual_seed(0)
    for batch in islice(with_prior(subject.batches(2, generator), klass.batches(2, generator)), 10):
        assert batch.prior == 2
        assert sorted(batch.captions[:2].tolist()) == [1, 2]
        assert batch.latents[:, 0, 0, 0].int().tolist() == batch.captions.tolist()


def test_latents_are_drawn_anew_around_the_mean() -> None:
    images = numbered([1])
    images.mean, images.std = torch.full((1, 1, 4, 8, 8), 2.0), torch.full((1, 1, 4, 8, 8), 0.5)
    images.scaling_factor = 0.1
    drawn = torch.cat([batch.latents for batch in take(images, 4, 100)])
    assert drawn.mean().item() == pytest.approx(0.2, abs=1e-3)
    assert drawn.std().item() == pytest.approx(0.05, abs=1e-3)
    assert not torch.equal(drawn[0], drawn[1])


def cached(method: DreamBoothLora, run: Run, parts: Parts) -> CachedImages:
    pictures, _ = read_dataset(method, run, method.instance_prompt)
    captions = Captions(parts, method, pictures, run)
    return cache_images(pictures, captions, parts, method, run)


def test_cached_latents_are_what_the_vae_says(method: DreamBoothLora, run: Run, parts: Parts) -> None:
    """Mean and deviation of the cache against the posterior of the picture encoded alone."""
    # Not of one colour: there group norm divides by nothing, and rounding is all that is left.
    Image.effect_noise((128, 128), 80).convert("RGB").save(run.dataset / "3.png")
    images = cached(method, run, parts)
    assert images.mean.shape == (5, 1, 4, 16, 16)
    pixels = torch.frombuffer(bytearray(Image.open(images.pictures[3].path).tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, 128, 128, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = parts.vae.encode(pixels).latent_dist
    torch.testing.assert_close(images.mean[3, 0], posterior.mean[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images.std[3, 0], posterior.std[0], rtol=1e-4, atol=1e-6)


def test_captions_beside_the_pictures_are_used(method: DreamBoothLora, run: Run) -> None:
    for number in range(5):
        (run.dataset / f"{number}.txt").write_text("a photo of sks cat asleep" if number == 2 else "a photo of sks cat")
    pictures, _ = read_dataset(method, run, "unused")
    assert [picture.caption for picture in pictures].index("a photo of sks cat asleep") == 2


def test_flipped_pictures_are_entries_of_their_own(method: DreamBoothLora, run: Run, parts: Parts) -> None:
    left_right = Image.new("RGB", (128, 128), "white")
    left_right.paste("black", (0, 0, 64, 128))
    left_right.save(run.dataset / "0.png")
    images = cached(method.model_copy(update={"random_flip": True}), run, parts)
    assert images.mean.shape[1] == 2
    assert not torch.allclose(images.mean[0, 0], images.mean[0, 1], atol=0.1)
    images.std.zero_()
    drawn = {tuple(latents.flatten().tolist()) for batch in take(images, 5, 20) for latents in batch.latents}
    # The other four are of one colour, and their own mirror image.
    assert len(drawn) == 6


def test_pictures_are_kept_out_of_training(method: DreamBoothLora, run: Run) -> None:
    pictures, apart = read_dataset(method.model_copy(update={"held_out_images": 2}), run, "x")
    assert [picture.path.name for picture in apart] == ["0.png", "2.png"]
    assert [picture.path.name for picture in pictures] == ["1.png", "3.png", "4.png"]
    with pytest.raises(DatasetError, match="held_out_images: 5 of 5 pictures would leave none"):
        read_dataset(method.model_copy(update={"held_out_images": 5}), run, "x")
