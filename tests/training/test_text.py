"""Captions as the UNet reads them, against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdtune import events
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.dataset import Picture
from sdtune.training.components.models import Parts
from sdtune.training.components.text import Captions, encode
from sdtune.training.run import Run
from tests.conftest import BASE_MODEL

PROMPTS = ["a photo of sks cat", "a red ball on a blue background", ""]


def test_prompts_are_encoded_as_diffusers_does(method: DreamBoothLora, parts: Parts) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(BASE_MODEL, dtype=torch.float32)
    for prompt in PROMPTS:
        expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        torch.testing.assert_close(encode(parts, method, [prompt]).encoder_hidden_states, expected)


def test_clip_skip_leaves_out_the_last_layers(method: DreamBoothLora, parts: Parts) -> None:
    """As the last layer would have been, had the encoder one layer less."""
    skipped = encode(parts, method.model_copy(update={"clip_skip": 1}), ["a red ball"]).encoder_hidden_states
    encoder = getattr(parts.text_encoders[0], "text_model", parts.text_encoders[0])
    last = encoder.encoder.layers[-1]
    encoder.encoder.layers = encoder.encoder.layers[:-1]
    expected = encode(parts, method, ["a red ball"]).encoder_hidden_states
    encoder.encoder.layers.append(last)
    torch.testing.assert_close(skipped, expected)
    assert not torch.allclose(skipped, encode(parts, method, ["a red ball"]).encoder_hidden_states)


def test_a_long_caption_is_read_in_windows(method: DreamBoothLora, parts: Parts) -> None:
    long = method.model_copy(update={"max_token_length": 150})
    words = "a red ball on a blue background and "
    short, much = encode(parts, long, ["a red ball"]), encode(parts, long, [words * 12])
    assert short.encoder_hidden_states.shape[1] == much.encoder_hidden_states.shape[1] == 154
    # The second window of the long caption has something to say, that of the short one has not.
    empty = encode(parts, method, [""]).encoder_hidden_states
    torch.testing.assert_close(short.encoder_hidden_states[:, 77:], empty)
    assert not torch.allclose(much.encoder_hidden_states[:, 77:], empty)


def test_a_caption_that_is_cut_is_warned_of(
    method: DreamBoothLora, parts: Parts, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Captions(parts, method, [Picture(Path("a.png"), "a photo of sks cat, " * 40, (128, 128))], run)
    told = [events.parse(line) for line in capsys.readouterr().out.splitlines()]
    notes = [event for event in told if isinstance(event, events.Note)]
    assert len(notes) == 1
    assert notes[0].level == "warning"
    assert "1 of 1 captions are longer than 75 tokens" in notes[0].text


def test_captions_are_found_again(method: DreamBoothLora, parts: Parts, run: Run) -> None:
    pictures = [Picture(Path(f"{i}.png"), text, (128, 128)) for i, text in enumerate(PROMPTS)]
    captions = Captions(parts, method, pictures, run)
    assert captions.row("") == 0
    rows = torch.tensor([captions.row(text) for text in PROMPTS])
    found = captions.encode(rows).encoder_hidden_states
    torch.testing.assert_close(found, encode(parts, method, PROMPTS).encoder_hidden_states)


def test_a_trained_encoder_gets_a_gradient(method: DreamBoothLora, parts: Parts, run: Run) -> None:
    picture = Picture(Path("a.png"), PROMPTS[0], (128, 128))
    parts.text_encoders[0].requires_grad_(True)
    frozen = Captions(parts, method, [picture], run).encode(torch.tensor([1])).encoder_hidden_states
    trained = Captions(parts, method, [picture], run, trained=True).encode(torch.tensor([1])).encoder_hidden_states
    torch.testing.assert_close(frozen, trained)
    assert not frozen.requires_grad
    assert trained.requires_grad
