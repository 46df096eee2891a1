"""PEFT's adapters: every kind learns, PEFT draws with what was saved, and web UIs get a file of what they know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from peft import PeftModel
from PIL import Image

from sdtune import events
from sdtune.errors import RecipeError, TrainingError
from sdtune.methods.peft import ADAPTERS, PeftDreamBoothLora
from sdtune.training.__main__ import run_training
from sdtune.training.components.adapters import Adapters
from sdtune.training.components.import_lora import read_lora
from sdtune.training.components.models import Parts
from sdtune.training.run import Run
from tests.conftest import BASE_MODEL


def wanting(settings: dict[str, Any], **more: Any) -> PeftDreamBoothLora:
    return PeftDreamBoothLora.from_settings({**settings, **more})


@pytest.mark.parametrize(
    "more",
    [
        {"adapter": "lora", "use_dora": True, "lora_alpha": 2, "text_encoder_alpha": 6},
        {"adapter": "lora", "bias": "all", "text_encoder_bias": "adapter_only"},
        {"adapter": "loha", "lora_alpha": 8, "lora_dropout": 0.1},
        {"adapter": "lokr", "conv_rank": 2},
        {"adapter": "oft", "rank": 8, "text_encoder_dropout": 0.1},
        {"adapter": "boft", "rank": 8, "bias": "adapter_only"},
        {"adapter": "hra"},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_peft_draws_what_the_run_drew(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
) -> None:  # fmt: skip
    output = tmp_path / "cat"
    # Far steps: LoHa and LoKr begin as products of zero and move slowly.
    method = wanting(settings, learning_rate=3e-2, train_text_encoder=True, text_encoder_rank=2, **more)
    run_training(method, pictures(), output)
    before, after = (sample(output, step) for step in (0, method.max_train_steps))
    assert numpy.abs(before - after).mean() > 3
    again = draw(output, method)
    assert numpy.abs(after - again).mean() < 0.5

    told = [event for line in capsys.readouterr().out.splitlines() if (event := events.parse(line))]
    losses = [event.value for event in told if isinstance(event, events.Measure)]
    assert losses[0] != losses[1]
    artifacts = {event.kind: event.path for event in told if isinstance(event, events.Artifact)}
    for_web_uis = more["adapter"] in ("lora", "loha", "lokr", "hra") and "bias" not in more
    assert ("kohya_lora" in artifacts) == for_web_uis == (output / "cat.safetensors").exists()
    assert ("lora" in artifacts) == (more["adapter"] == "lora" and for_web_uis)
    assert for_web_uis != any("PEFT's folders alone" in event.text for event in told if isinstance(event, events.Note))

    if more["adapter"] == "lora" and "bias" in more:
        with pytest.raises(TrainingError, match="a LoRA with trained biases of the base model"):
            read_lora(output)
    config = json.loads((output / "unet" / "adapter_config.json").read_text())
    assert config["peft_type"].lower() == more["adapter"]
    assert config["base_model_name_or_path"] == "base-model"
    assert sorted(path.name for path in (output / "unet").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def sample(output: Path, step: int) -> Any:
    picture = Image.open(output / "samples" / f"step-{step:06d}" / "prompt-0-sample-0.png")
    return numpy.asarray(picture, numpy.float64)


def draw(output: Path, method: PeftDreamBoothLora) -> Any:
    """The run's first sample, by diffusers with PEFT's own loader."""
    pipeline = StableDiffusionPipeline.from_pretrained(BASE_MODEL, dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for part in ("unet", "text_encoder"):
        PeftModel.from_pretrained(getattr(pipeline, part), output / part).eval()
    drawn = pipeline(
        method.instance_prompt, num_inference_steps=method.sample_steps, guidance_scale=method.guidance_scale,
        generator=torch.Generator().manual_seed(method.seed),
    )  # fmt: skip
    return numpy.asarray(drawn.images[0], numpy.float64)


def test_each_model_has_its_own_size(settings: dict[str, Any], parts: Parts, run: Run) -> None:
    method = wanting(
        settings, rank=6, lora_alpha=3, train_text_encoder=True, text_encoder_rank=2, text_encoder_alpha=5,
        lora_dropout=0.1, text_encoder_dropout=0.2, text_encoder_lr=1e-6, bias="adapter_only",
    )  # fmt: skip
    adapters = Adapters(parts, method, run)
    for model, rank, alpha, dropout in ((parts.unet, 6, 3.0, 0.1), (parts.text_encoders[0], 2, 5.0, 0.2)):
        layers = [module for module in model.modules() if hasattr(module, "lora_A") and module.r]
        assert layers
        for layer in layers:
            assert (layer.r["default"], layer.lora_alpha["default"]) == (rank, alpha)
            assert layer.lora_dropout["default"].p == dropout
    assert [group["lr"] for group in adapters.weights.groups(flat=True)] == [method.learning_rate, 1e-6]
    biases = [name for name, weight in parts.unet.named_parameters() if weight.requires_grad and name.endswith("bias")]
    # Of the attention only the way out has one.
    assert biases
    assert all(".to_out.0." in name for name in biases)


def test_the_text_encoder_has_the_scale_of_the_unet(settings: dict[str, Any], parts: Parts, run: Run) -> None:
    Adapters(parts, wanting(settings, rank=8, lora_alpha=4, train_text_encoder=True, text_encoder_rank=2), run)
    layer = next(module for module in parts.text_encoders[0].modules() if hasattr(module, "lora_A") and module.r)
    assert layer.lora_alpha["default"] / layer.r["default"] == 0.5


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"adapter": "oft", "rank": 3}, "oft with blocks of 3 .rank. does not divide the 80 inputs of .*use a rank"),
        ({"adapter": "boft", "rank": 3}, "boft with rank 3 cannot be put on"),
        ({"target_modules": ["nope"]}, "target_modules: nope match no layer"),
    ],
)
def test_what_does_not_fit_is_named(
    settings: dict[str, Any], parts: Parts, run: Run, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(TrainingError, match=words):
        Adapters(parts, wanting(settings, **more), run)


def test_a_text_encoder_that_is_not_trained_has_no_adapter(settings: dict[str, Any], parts: Parts, run: Run) -> None:
    assert len(Adapters(parts, wanting(settings), run).weights.masters) == 1
    assert not any(weight.requires_grad for weight in parts.text_encoders[0].parameters())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"adapter": "oft", "lora_alpha": 2}, "adapter: found oft, which has no lora_alpha; leave that out."),
        ({"adapter": "hra", "lora_dropout": 0.1, "use_dora": True}, "found hra, which has no lora_dropout and no use_"),
        ({"adapter": "loha", "bias": "all"}, "bias: found all, but loha leaves the biases as they are"),
        ({"adapter": "boft", "conv_rank": 2}, "found boft, which has no conv_rank"),
        ({"adapter": "lokr", "save_bin": True}, "found lokr, which has no save_bin"),
        ({"bias": "all", "save_bin": True}, "bias: found all with save_bin, a file that can hold no biases"),
        ({"adapter": "hra", "rank": 5}, "its reflections come in pairs: use an even number"),
        ({"text_encoder_rank": 2}, "text_encoder_rank: found 2, but the text encoder is not trained"),
        (
            {"adapter": "oft", "train_text_encoder": True, "text_encoder_alpha": 2},
            "text_encoder_alpha: found 2.0, which oft has no use for",
        ),
    ],
)
def test_what_a_kind_has_no_use_for_is_an_error(settings: dict[str, Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        wanting({"instance_prompt": "x", **more})
    assert words in str(caught.value)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_kind_begins_as_the_base_model(settings: dict[str, Any], parts: Parts, run: Run, adapter: str) -> None:
    latents, steps = torch.randn(1, 4, 16, 16), torch.tensor([500])
    states = torch.randn(1, 77, 128)
    with torch.no_grad():
        plain = parts.unet(latents, steps, states).sample
        Adapters(parts, wanting(settings, adapter=adapter), run)
        torch.testing.assert_close(parts.unet(latents, steps, states).sample, plain, rtol=1e-4, atol=1e-4)
