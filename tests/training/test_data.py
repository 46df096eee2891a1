"""Every picture is used, the right caption goes with it, and the cache keeps the mathematics."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdtune.errors import DatasetError
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.batches import Batch, Batches, WithPrior
from sdtune.training.components.data import CachedImages, cache_classes, cache_images
from sdtune.training.components.dataset import Picture, read_dataset
from sdtune.training.components.models import Parts
from sdtune.training.components.text import Captions
from sdtune.training.run import Run


def numbered(repeats: list[int], empty: float = 0.0, shapes: str = "") -> CachedImages:
    """A cache whose latents and captions tell which picture they are of, beginning with 1.

    shapes: of each picture s (square), w (wide) or h (high); not given: all square.
    """
    sides = {"s": (16, 16), "w": (24, 8), "h": (8, 24)}
    chosen = [sides[letter] for letter in shapes or "s" * len(repeats)]
    mean = [torch.full((1, 4, h // 8, w // 8), float(i)) for i, (w, h) in enumerate(chosen, 1)]
    return CachedImages(
        pictures=[Picture(Path(f"{i}.png"), str(i), (16, 16), times) for i, times in enumerate(repeats)],
        shapes=chosen, mean=mean, std=[torch.zeros_like(one) for one in mean],
        captions=torch.arange(1, len(repeats) + 1), scaling_factor=1.0, proportion_empty_prompts=empty,
    )  # fmt: skip


def take(images: CachedImages, size: int, batches: int, seed: int = 0) -> list[Batch]:
    return list(islice(Batches(images, size, torch.Generator().manual_seed(seed)), batches))


def with_prior(subject: CachedImages, klass: CachedImages, size: int) -> WithPrior:
    generator = torch.Generator().manual_seed(0)
    of_shape = {shape: Batches(same, size, generator) for shape, same in klass.by_shape().items()}
    return WithPrior(Batches(subject, size, generator), of_shape)


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
    for batch in islice(with_prior(subject, klass, 2), 10):
        assert batch.prior == 2
        assert batch.names == tuple(f"{number - 1}.png" for number in batch.captions.tolist())
        assert sorted(batch.captions[:2].tolist()) == [1, 2]
        assert batch.latents[:, 0, 0, 0].int().tolist() == batch.captions.tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_batches_are_of_one_shape_and_no_picture_is_left_out(size: int) -> None:
    images = numbered([1] * 6 + [2], shapes="swsshws")
    counts: Counter[int] = Counter()
    for batch in take(images, size, 8 * 12):
        assert len(batch.captions) == size
        assert len({images.shapes[number - 1] for number in batch.captions.tolist()}) == 1
        counts.update(batch.captions.tolist())
    rounds = size * 12
    # A picture waits for others of its shape, so it may be one batch behind or ahead.
    assert all(abs(counts[number] - rounds) <= size for number in range(1, 7)), counts
    assert abs(counts[7] - 2 * rounds) <= size


def test_class_pictures_have_the_shapes_of_the_subject() -> None:
    subject, klass = numbered([1] * 4, shapes="sswh"), numbered([1] * 5, shapes="swshw")
    used = set()
    for batch in islice(with_prior(subject, klass, 2), 40):
        shapes = {subject.shapes[number - 1] for number in batch.captions[:2].tolist()}
        assert {klass.shapes[number - 1] for number in batch.captions[2:].tolist()} == shapes
        used |= set(batch.captions[2:].tolist())
    assert used == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_go_on_where_another_process_was(size: int) -> None:
    images = numbered([1] * 6 + [2], empty=0.2, shapes="swsshws")
    generators = [torch.Generator().manual_seed(3), torch.Generator()]
    before, after = (Batches(images, size, generator) for generator in generators)
    list(islice(before, 7))
    generators[1].set_state(generators[0].get_state())
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for _ in range(30):
        one, other = next(before), next(after)
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.captions, other.captions)


def test_latents_are_drawn_anew_around_the_mean() -> None:
    images = numbered([1])
    images.mean, images.std = [torch.full((1, 4, 8, 8), 2.0)], [torch.full((1, 4, 8, 8), 0.5)]
    images.scaling_factor = 0.1
    drawn = torch.cat([batch.latents for batch in take(images, 4, 100)])
    assert drawn.mean().item() == pytest.approx(0.2, abs=1e-3)
    assert drawn.std().item() == pytest.approx(0.05, abs=1e-3)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    """At the base model's own resolution."""
    return {**settings, "resolution": 128}


def cached(method: DreamBoothLora, run: Run, parts: Parts) -> CachedImages:
    pictures, _ = read_dataset(method, run, method.instance_prompt)
    captions = Captions(parts, method, pictures, run)
    return cache_images(pictures, captions, parts, method, run)


def test_cached_latents_are_what_the_vae_says(method: DreamBoothLora, run: Run, parts: Parts) -> None:
    """Mean and deviation of the cache against the posterior of the picture encoded alone."""
    # Not of one colour: there group norm divides by nothing, and rounding is all that is left.
    Image.effect_noise((128, 128), 80).convert("RGB").save(run.dataset / "3.png")
    images = cached(method, run, parts)
    assert [mean.shape for mean in images.mean] == [(1, 4, 16, 16)] * 5
    pixels = torch.frombuffer(bytearray(Image.open(images.pictures[3].path).tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, 128, 128, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = parts.vae.encode(pixels).latent_dist
    torch.testing.assert_close(images.mean[3][0], posterior.mean[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images.std[3][0], posterior.std[0], rtol=1e-4, atol=1e-6)


def test_pictures_are_cut_to_the_nearest_shape(
    method: DreamBoothLora, run: Run, parts: Parts, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (300, 200), "red").save(run.dataset / "0.png")
    Image.new("RGB", (100, 260), "blue").save(run.dataset / "1.png")
    images = cached(method, run, parts)
    # The tiny model halves once: sides in steps of 16, no more pixels than 128 x 128.
    assert images.shapes == [(160, 96), (80, 192), (128, 128), (128, 128), (128, 128)]
    assert images.mean[0].shape == (1, 4, 12, 20)
    assert "The pictures' shapes: 128 x 128: 3, 80 x 192: 1, 160 x 96: 1" in capsys.readouterr().out
    square = cached(method.model_copy(update={"enable_bucket": False}), run, parts)
    assert set(square.shapes) == {(128, 128)}

    pictures, _ = read_dataset(method, run, method.instance_prompt)
    captions = Captions(parts, method, pictures, run)
    few = cache_classes(pictures[:2], images, captions, parts, method, run)
    assert set(few.shapes) == set(images.shapes)
    many = cache_classes([*pictures, *pictures], images, captions, parts, method, run)
    assert Counter(many.shapes) == {(128, 128): 6, (160, 96): 2, (80, 192): 2}


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
    assert {len(mean) for mean in images.mean} == {2}
    assert not torch.allclose(images.mean[0][0], images.mean[0][1], atol=0.1)
    for std in images.std:
        std.zero_()
    drawn = {tuple(latents.flatten().tolist()) for batch in take(images, 5, 20) for latents in batch.latents}
    # The other four are of one colour, and their own mirror image.
    assert len(drawn) == 6


def test_pictures_are_kept_out_of_training(method: DreamBoothLora, run: Run) -> None:
    pictures, apart = read_dataset(method.model_copy(update={"held_out_images": 2}), run, "x")
    assert [picture.path.name for picture in apart] == ["0.png", "2.png"]
    assert [picture.path.name for picture in pictures] == ["1.png", "3.png", "4.png"]
    with pytest.raises(DatasetError, match="held_out_images: 5 of 5 pictures would leave none"):
        read_dataset(method.model_copy(update={"held_out_images": 5}), run, "x")
