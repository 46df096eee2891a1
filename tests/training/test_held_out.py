"""The held-out loss is the same figure whenever nothing has changed, and falls when something is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdtune import events
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.data import CachedImages, cache_images
from sdtune.training.components.dataset import read_dataset
from sdtune.training.components.held_out import HeldOutLoss
from sdtune.training.components.lora import attach_lora
from sdtune.training.components.models import Parts
from sdtune.training.components.text import Captions
from sdtune.training.run import Run


@pytest.fixture(autouse=True)
def few_draws() -> None:
    """All of them, here."""


@pytest.fixture
def cached(method: DreamBoothLora, run: Run, parts: Parts) -> tuple[CachedImages, Captions]:
    pictures, _ = read_dataset(method, run, "a photo of sks cat")
    captions = Captions(parts, method, pictures, run)
    return cache_images(pictures, captions, parts, method, run), captions


def test_it_hangs_on_the_weights_alone(
    method: DreamBoothLora, run: Run, parts: Parts, cached: tuple[CachedImages, Captions],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    images, captions = cached
    first = HeldOutLoss(parts, images, captions, method, run).measure(step=0)
    torch.manual_seed(123)
    another_seed = method.model_copy(update={"seed": 7})
    assert HeldOutLoss(parts, images, captions, another_seed, run).measure(step=0) == first
    with torch.no_grad():
        parts.unet.conv_out.weight.mul_(1.1)
    assert HeldOutLoss(parts, images, captions, method, run).measure(step=1) != first
    told = [events.parse(line) for line in capsys.readouterr().out.splitlines()]
    assert events.Measure("held_out_loss", 0, first) in told


def test_it_looks_at_every_picture_early_and_late(
    method: DreamBoothLora, run: Run, parts: Parts, cached: tuple[CachedImages, Captions]
) -> None:
    measured = HeldOutLoss(parts, *cached, method, run)
    assert len(set(measured._timesteps.tolist())) == 64
    for picture in range(5):
        timesteps = measured._timesteps[picture::5]
        assert timesteps.min() < 300
        assert timesteps.max() > 700


def test_it_is_measured_when_due(
    method: DreamBoothLora, run: Run, parts: Parts, cached: tuple[CachedImages, Captions],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    often = method.model_copy(update={"held_out_every": 3, "max_train_steps": 7})
    measured = HeldOutLoss(parts, *cached, often, run)
    capsys.readouterr()
    for step in range(1, 8):
        measured.measure_if_due(step)
    told = [events.parse(line) for line in capsys.readouterr().out.splitlines()]
    assert [event.step for event in told if isinstance(event, events.Measure)] == [3, 6, 7]


def test_dropout_of_a_trained_text_encoder_is_off(settings: dict[str, Any], run: Run, parts: Parts) -> None:
    trained = DreamBoothLora.from_settings({**settings, "train_text_encoder": True, "lora_dropout": 0.9})
    attach_lora(parts, trained, run)
    for encoder in parts.text_encoders:
        for name, weight in encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
    pictures, _ = read_dataset(trained, run, "a photo of sks cat")
    captions = Captions(parts, trained, pictures, run, trained=True)
    measured = HeldOutLoss(parts, cache_images(pictures, captions, parts, trained, run), captions, trained, run)
    for module in (parts.unet, *parts.text_encoders):
        module.train()
    assert measured.measure(step=0) == measured.measure(step=1)
    assert parts.text_encoders[0].training
