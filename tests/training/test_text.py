"""Captions as the UNet reads them, against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdtune import events
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components import room, text
from sdtune.training.components.dataset import Picture
from sdtune.training.components.models import Parts
from sdtune.training.components.text import Captions, Conditioning, encode
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


@pytest.mark.parametrize("filled", [False, True])
def test_a_caption_is_encoded_alike_in_any_company(
    method: DreamBoothLora, parts: Parts, monkeypatch: pytest.MonkeyPatch, filled: bool
) -> None:
    """filled: as for a GPU; in batches of one size it is bit for bit."""
    monkeypatch.setattr(text, "fills_batches", lambda device: filled)
    monkeypatch.setattr(text, "AT_ONCE", 4)
    prompts = [f"a photo of {number} cats" for number in range(9)]
    together = encode(parts, method, prompts).encoder_hidden_states
    assert together.shape[0] == 9
    backwards = encode(parts, method, prompts[::-1]).encoder_hidden_states.flip(0)
    alone = torch.cat([encode(parts, method, [prompt]).encoder_hidden_states for prompt in prompts])
    tolerance = 0 if filled else 1e-5
    torch.testing.assert_close(together, backwards, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)


def test_a_gpu_gets_batches_of_one_size(method: DreamBoothLora, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    parts.text_encoders[0].register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr(text, "AT_ONCE", 4)
    encode(parts, method, PROMPTS * 3)
    assert sizes == [4, 4, 1]
    sizes.clear()
    monkeypatch.setattr(text, "fills_batches", lambda device: True)
    encode(parts, method, PROMPTS * 3)
    encode(parts, method, PROMPTS[:1])
    assert sizes == [4, 4, 4, 4]
    assert text.fills_batches(torch.device("cuda"))


def many(count: int) -> list[Picture]:
    return [Picture(Path(f"{number}.png"), f"a photo of {number} cats", (128, 128)) for number in range(count)]


@pytest.mark.parametrize("on_disk", [False, True])
def test_captions_that_are_too_many_travel_with_their_batch(
    method: DreamBoothLora, parts: Parts, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_disk: bool
) -> None:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    rows = torch.tensor([3, 0, 41, 3])
    few = Captions(parts, method, many(40), run)
    assert few.travelling(rows) is None
    size = few.encode(torch.tensor([0])).encoder_hidden_states.nbytes
    monkeypatch.setattr(text, "ON_DEVICE", 41 * size)
    if on_disk:
        monkeypatch.setattr(room, "SHARE_OF_MEMORY", 0.0)
    assert Captions(parts, method, many(40), run).travelling(rows) is None
    more = Captions(parts, method, many(41), run)
    expected = encode(parts, method, [more.texts[row] for row in rows])
    travelling = more.travelling(rows)
    assert travelling is not None
    assert torch.equal(travelling.encoder_hidden_states, expected.encoder_hidden_states)
    assert torch.equal(more.encode(rows).encoder_hidden_states, expected.encoder_hidden_states)
    assert (tmp_path / "cache" / "spilled").exists() == on_disk


def test_both_of_sdxls_tensors_travel() -> None:
    conditioning = Conditioning(torch.arange(12.0).view(3, 2, 2), torch.arange(3.0).view(3, 1))
    chosen = conditioning[torch.tensor([2, 0])].to(torch.device("cpu"))
    assert [one.tolist() for one in chosen.tensors] == [[[[8, 9], [10, 11]], [[0, 1], [2, 3]]], [[2], [0]]]


def test_many_captions_are_told_of(
    method: DreamBoothLora, parts: Parts, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(count: int) -> list[events.Event]:
        capsys.readouterr()
        Captions(parts, method, many(count), run)
        return [event for line in capsys.readouterr().out.splitlines() if (event := events.parse(line))]

    assert told(63) == []
    assert told(64) == [
        events.Phase("cache", "Encoding 64 captions"),
        *[events.Progress("cache", done, 65) for done in (32, 64, 65)],
    ]


def test_a_trained_encoder_gets_a_gradient(method: DreamBoothLora, parts: Parts, run: Run) -> None:
    picture = Picture(Path("a.png"), PROMPTS[0], (128, 128))
    parts.text_encoders[0].requires_grad_(True)
    frozen = Captions(parts, method, [picture], run).encode(torch.tensor([1])).encoder_hidden_states
    trained = Captions(parts, method, [picture], run, trained=True).encode(torch.tensor([1])).encoder_hidden_states
    torch.testing.assert_close(frozen, trained)
    assert not frozen.requires_grad
    assert trained.requires_grad
