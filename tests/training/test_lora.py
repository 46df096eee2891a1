"""Adapters as the settings ask: where they sit, how large; and a fresh pipeline draws with them what the run drew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.__main__ import run_training
from sdtune.training.components.import_lora import read_lora
from sdtune.training.components.lora import CONVOLUTIONS, attach_lora
from sdtune.training.components.lora_weights import collect_lora
from sdtune.training.components.models import Parts
from sdtune.training.run import Run
from tests.conftest import BASE_MODEL


def test_convolutions_have_their_own_rank_and_alpha(settings: dict[str, Any], parts: Parts, run: Run) -> None:
    method = DreamBoothLora.from_settings({**settings, "lora_alpha": 2, "conv_rank": 3, "conv_alpha": 1.5})
    attach_lora(parts, method, run)
    weights = collect_lora(parts.unet)["unet"]
    convolutions = {path for path, module in parts.unet.named_modules() if path.endswith(CONVOLUTIONS)}
    # Two in each ResNet of the two blocks down, the middle and the two blocks up, one down, one up.
    assert len([path for path in weights if weights[path].rank == 3]) == 2 * (2 + 2 + 4) + 2
    for path, module in weights.items():
        is_convolution = module.down.dim() == 4 and module.down.shape[-1] == 3
        assert (module.rank, module.alpha) == ((3, 1.5) if is_convolution else (4, 2.0)), path
        assert is_convolution == any(path == name or name.startswith(f"{path}.") for name in convolutions)


@pytest.mark.parametrize(
    "more",
    [
        {"conv_rank": 2, "conv_alpha": 4, "lora_alpha": 2},
        {"use_dora": True, "lora_alpha": 2},
        {"use_dora": True, "conv_rank": 2, "train_text_encoder": True},
        {"target_modules": ["to_q", "to_v", "proj_in", "ff.net.0.proj"], "lora_dropout": 0.1},
    ],
    ids=lambda more: "-".join(more),
)
def test_every_form_of_the_result_draws_what_the_run_drew(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path, more: dict[str, Any]
) -> None:
    output = tmp_path / "cat"
    method = DreamBoothLora.from_settings({**settings, "learning_rate": 1e-2, "save_bin": True, **more})
    run_training(method, pictures(), output)
    drawn = [
        numpy.asarray(Image.open(output / "samples" / f"step-{step:06d}" / "prompt-0-sample-0.png"), numpy.float64)
        for step in (0, method.max_train_steps)
    ]
    assert numpy.abs(drawn[0] - drawn[1]).mean() > 3
    # Of kohya's form diffusers leaves DoRA's norms out, and says so.
    for file in ("pytorch_lora_weights.safetensors", *([] if method.use_dora else ["cat.safetensors"])):
        again = draw(output / file, method)
        assert numpy.abs(drawn[1] - again).mean() < 1.5, file

    kept = load_file(output / "pytorch_lora_weights.safetensors")
    old = torch.load(output / "pytorch_lora_weights.bin", weights_only=True)
    assert {name: tensor.tolist() for name, tensor in old.items()} == {name: t.tolist() for name, t in kept.items()}

    with safe_open(output / "cat.safetensors", "pt") as kohya:
        told = json.loads(kohya.metadata()["ss_network_args"])
    assert told.get("conv_dim") == (str(more["conv_rank"]) if "conv_rank" in more else None)
    ours, kohyas = read_lora(output), read_lora(output / "cat.safetensors")
    assert ours.keys() == kohyas.keys()
    for component, modules in ours.items():
        assert modules.keys() == kohyas[component].keys()
        for path, module in modules.items():
            other = kohyas[component][path]
            torch.testing.assert_close(other.delta(), module.delta(), rtol=3e-3, atol=1e-4)
            assert (module.magnitude is not None) == (other.magnitude is not None) == method.use_dora
            if module.magnitude is not None and other.magnitude is not None:
                torch.testing.assert_close(other.magnitude.float(), module.magnitude, rtol=1e-3, atol=1e-5)


def draw(file: Path, method: DreamBoothLora) -> Any:
    """The run's first sample, by a pipeline that knows nothing of sdtune."""
    pipeline = StableDiffusionPipeline.from_pretrained(BASE_MODEL, dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(file)
    drawn = pipeline(
        method.instance_prompt, num_inference_steps=method.sample_steps, guidance_scale=method.guidance_scale,
        generator=torch.Generator().manual_seed(method.seed),
    )  # fmt: skip
    return numpy.asarray(drawn.images[0], numpy.float64)
