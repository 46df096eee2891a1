"""Whole models: trained in float32, averaged, saved as a folder that opens anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from sdtune.errors import TrainingError
from sdtune.methods.dreambooth import DreamBooth
from sdtune.training.components.models import Parts, load_parts
from sdtune.training.components.single_file import read_single_file
from sdtune.training.components.whole_model import WholeModel
from sdtune.training.run import Run
from tests.conftest import BASE_MODEL


def whole(settings: dict[str, Any], **more: Any) -> DreamBooth:
    wanted = {name: value for name, value in settings.items() if name != "rank"}
    return DreamBooth.from_settings({**wanted, **more})


def move(parts: Parts, by: float) -> None:
    with torch.no_grad():
        for weight in parts.unet.parameters():
            weight.add_(by)


def test_what_is_saved_opens_and_draws_the_same(settings: dict[str, Any], parts: Parts, run: Run) -> None:
    weights = WholeModel(parts, whole(settings), ["unet"], run)
    move(parts, 1e-2)
    assert weights.save(run) == pytest.approx(1e-2, rel=1e-4)
    opened = StableDiffusionPipeline.from_pretrained(run.output, dtype=torch.float32)
    for name, weight in parts.unet.state_dict().items():
        torch.testing.assert_close(opened.unet.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(parts.text_encoders[0].parameters(), opened.text_encoder.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    pictures = opened("a red ball", num_inference_steps=1, output_type="np", generator=torch.manual_seed(0)).images
    assert pictures.shape == (1, 128, 128, 3)


def test_every_version_of_transformers_finds_the_text_encoder(settings: dict[str, Any], parts: Parts, run: Run) -> None:
    weights = WholeModel(parts, whole(settings), ["unet"], run)
    move(parts, 1e-2)
    weights.save(run)
    with safe_open(run.output / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
        assert file.get_tensor("text_model.final_layer_norm.weight").dtype is torch.float16


def test_the_single_file_is_the_same_model(settings: dict[str, Any], parts: Parts, run: Run) -> None:
    weights = WholeModel(parts, whole(settings), ["unet"], run)
    move(parts, 1e-2)
    weights.save(run)
    read = read_single_file(run.output / f"{run.output.name}.safetensors", torch.float32, config=BASE_MODEL)
    for name, weight in parts.unet.state_dict().items():
        torch.testing.assert_close(read["unet"].state_dict()[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("precision", "dtype"), [("float", torch.float32), ("bf16", torch.bfloat16)])
def test_files_have_the_type_that_was_asked_for(
    settings: dict[str, Any], parts: Parts, run: Run, precision: str, dtype: torch.dtype
) -> None:
    weights = WholeModel(parts, whole(settings, save_precision=precision), ["unet"], run)
    move(parts, 1e-2)
    weights.save(run)
    for name in (f"{run.output.name}.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        with safe_open(run.output / name, "pt") as file:
            found = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        assert found - {torch.int64} == {dtype}, name


def test_nothing_learned_is_nothing_saved(settings: dict[str, Any], parts: Parts, run: Run) -> None:
    with pytest.raises(TrainingError, match="the model is what it was: nothing was learned"):
        WholeModel(parts, whole(settings), ["unet"], run).save(run)
    assert not (run.output / "model_index.json").exists()


def test_the_moving_average_is_what_is_saved(settings: dict[str, Any], parts: Parts, run: Run) -> None:
    """diffusers' EMAModel: its decay begins at (1 + step) / (10 + step) and ends at ema_decay."""
    weights = WholeModel(parts, whole(settings, use_ema=True, ema_decay=0.999), ["unet"], run)
    average = parts.unet.conv_out.bias.detach().clone()
    for step in range(1, 4):
        move(parts, 0.1)
        assert weights.average
        weights.average.step(weights.weights.masters)
        decay = 0.0 if step == 1 else min(0.999, step / (9 + step))
        average = decay * average + (1 - decay) * parts.unet.conv_out.bias.detach()
    weights.save(run)
    torch.testing.assert_close(parts.unet.conv_out.bias.detach(), average, rtol=1e-4, atol=1e-5)


def test_trained_parts_are_float32_and_frozen_ones_are_not(settings: dict[str, Any], tmp_path: Path) -> None:
    method = whole(settings, train_text_encoder=True, text_encoder_lr=1e-7, mixed_precision="bf16")
    with Run.open(method, tmp_path, tmp_path / "out") as run:
        parts = load_parts(method, run, trained=["unet", "text_encoder"])
        weights = WholeModel(parts, method, ["unet", "text_encoder"], run).weights
    assert [group["lr"] for group in weights.groups(flat=True)] == [method.learning_rate, 1e-7]
    assert [master.dtype for master in weights.masters] == [torch.float32] * 2
    assert parts.unet.dtype is parts.text_encoders[0].dtype is parts.vae.dtype is torch.bfloat16
    with weights.full_precision():
        assert parts.unet.dtype is parts.text_encoders[0].dtype is torch.float32
