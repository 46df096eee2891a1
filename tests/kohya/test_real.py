"""Both methods for real, on the CPU: on the shipped base model, and on random weights in Stable Diffusion 1.5's shape.

Runs with SDTUNE_SD_SCRIPTS=<a copy of kohya-ss/sd-scripts> and, if its requirements are in a Python of their own,
SDTUNE_SD_SCRIPTS_PYTHON=<that Python>. Takes ten minutes, 4 GB of disk and 8 GB of memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from sdtune import events
from sdtune.jobs.spec import plan_training
from sdtune.methods.catalog import METHODS
from tests.kohya.make_base_model import make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SDTUNE_SD_SCRIPTS" not in os.environ, reason="SDTUNE_SD_SCRIPTS names no copy of sd-scripts"),
    pytest.mark.timeout(1800),
]
STEPS = 20
EXAMPLES = Path(__file__).parents[2] / "examples"
SHIPPED = EXAMPLES / "base-model"


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("model") / "random-sd15"
    make(folder)
    yield folder
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def noise(path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(len(path.name)).integers(0, 255, (96, 128, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(path, **options)


def kohya_dataset(folder: Path) -> dict[str, Any]:
    turned = Image.Exif()
    turned[274] = 6
    noise(folder / "data" / "2_sks cat" / "a.png")
    noise(folder / "data" / "2_sks cat" / "ünï (1).jpg", exif=turned)
    noise(folder / "data" / "1_sks dog" / "b.webp")
    (folder / "data" / "1_sks dog" / "b.txt").write_text("a photo of sks dog, outside", encoding="utf-8")
    noise(folder / "class" / "1_cat" / "c.png")
    return {"class_data_dir": str(folder / "class"), "prior_loss_weight": 0.5}


def captioned_dataset(folder: Path) -> dict[str, Any]:
    rows = []
    for number in range(4):
        noise(folder / "data" / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"a drawing, number {number}"}))
    (folder / "data" / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return {"sample_prompt": ["a drawing"], "shuffle_caption": True, "train_text_encoder": False, "conv_dim": 2}


def train(name: str, settings: dict[str, Any], dataset: Path, output: Path) -> list[events.Event]:
    job = plan_training(METHODS[name].from_settings(settings), str(dataset), str(output))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "sdtune.training", *job.args], capture_output=True, text=True, env=environment
    )
    print(ran.stdout)  # noqa: T201  shown by -s, and where a test fails
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [event for line in ran.stdout.splitlines() if (event := events.parse(line))]


@pytest.mark.parametrize(
    ("name", "lay_out", "beginnings"),
    [
        ("kohya-dreambooth-lora", kohya_dataset, {"lora_unet", "lora_te"}),
        ("kohya-native-lora", captioned_dataset, {"lora_unet"}),
    ],
)
def test_twenty_steps(name: str, lay_out: Any, beginnings: set[str], base_model: Path, tmp_path: Path) -> None:
    settings = lay_out(tmp_path) | {
        "base_model": str(base_model),
        "resolution": 64,
        "max_train_steps": STEPS,
        "learning_rate": 1e-3,
        "network_dim": 4,
        "network_alpha": 2,
        "num_samples": 1,
        "sample_steps": 4,
        "sample_every": 12,
    }
    output = tmp_path / "my cat"
    told = train(name, settings, tmp_path / "data", output)

    steps = [event for event in told if isinstance(event, events.Step)]
    assert steps[-1].step == STEPS
    assert {event.learning_rate for event in steps} == {1e-3}
    assert isinstance(told[-1], events.Finished)
    assert told[-1].change > 1e-5

    with safe_open(output / "my cat.safetensors", "pt") as lora:
        names, metadata = list(lora.keys()), lora.metadata()
        assert {key[: key.index("_", 5)] for key in names} == beginnings
        assert {float(lora.get_tensor(key)) for key in names if key.endswith(".alpha")} == {2.0}
    assert (metadata["ss_network_dim"], metadata["ss_steps"]) == ("4", str(STEPS))
    assert metadata["ss_sd_model_name"] == base_model.name
    assert not [value for value in metadata.values() if str(tmp_path) in value or "sdtune-kohya" in value]
    content = (output / "my cat.safetensors").read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    with safe_open(output / "pytorch_lora_weights.safetensors", "pt") as lora:
        components = {key.partition(".")[0] for key in lora.keys()}  # noqa: SIM118
    assert components == {"unet", "text_encoder"} if "lora_te" in beginnings else {"unet"}

    assert sorted(path.name for path in (output / "samples").iterdir()) == [
        "step-000000", "step-000012", "step-000020",
    ]  # fmt: skip
    for step in (0, 12, 20):
        drawn = Image.open(output / "samples" / f"step-{step:06d}" / "prompt-0-sample-0.png")
        assert max(high - low for low, high in drawn.getextrema()) > 50
    assert (output / "contact_sheet.png").is_file()
    recipe = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    assert METHODS[recipe.pop("method")].from_settings(recipe).recipe() == recipe
    assert {path.name for path in output.iterdir()} == {
        "my cat.safetensors", "pytorch_lora_weights.safetensors", "samples", "contact_sheet.png", "recipe.yaml", "logs",
        "README.md", ".sdtune",
    }  # fmt: skip


def owls(folder: Path) -> dict[str, Any]:
    """The shipped drawings, whose captions sd-scripts reads from text files."""
    shutil.copytree(EXAMPLES / "datasets" / "toy", folder / "data" / "10_sks owl")
    for picture in list((folder / "data" / "10_sks owl").iterdir()):
        picture.with_suffix(".txt").write_text("a drawing of sks owl", encoding="utf-8")
    return {"sample_prompt": ["a drawing of sks owl"]}


def cats(folder: Path) -> dict[str, Any]:
    shutil.copytree(EXAMPLES / "datasets" / "captioned", folder / "data")
    return {"sample_prompt": ["a photo of sks cat"], "held_out_every": 100}


def held_out(told: list[events.Event]) -> dict[int, float]:
    return {event.step: event.value for event in told if isinstance(event, events.Measure)}


def grey_levels(first: Any, second: Any) -> Any:
    return numpy.abs(numpy.asarray(first, dtype=int) - numpy.asarray(second, dtype=int))


@pytest.mark.parametrize(
    ("name", "like", "lay_out"),
    [
        ("kohya-dreambooth-lora", {"method": "dreambooth-lora", "instance_prompt": "a drawing of sks owl"}, owls),
        ("kohya-native-lora", {"method": "text-to-image-lora"}, cats),
    ],
)
def test_the_shipped_model_learns(name: str, like: dict[str, str], lay_out: Any, tmp_path: Path) -> None:
    asked = {"sample_prompt": [], **lay_out(tmp_path)}
    settings = {"base_model": str(SHIPPED), "learning_rate": 1e-3, "num_samples": 1, **asked}
    output = tmp_path / "learned"
    told = train(name, {**settings, "max_train_steps": 200, "network_dim": 8}, tmp_path / "data", output)
    loss = held_out(told)
    assert loss[200] < 0.6 * loss[0]
    assert list(loss) == ([0, 100, 200] if "held_out_every" in asked else [0, 200])

    samples = [Image.open(output / "samples" / f"step-{step:06d}" / "prompt-0-sample-0.png") for step in (0, 200)]
    assert grey_levels(*samples).mean() > 15
    # Both forms of the LoRA draw in diffusers what sd-scripts drew, with the same solver and the same noise.
    for file in ("learned.safetensors", "pytorch_lora_weights.safetensors"):
        assert grey_levels(draw(asked["sample_prompt"][0], output, file), samples[1]).max() <= 4

    # The same figure as of the method that trains with diffusers, before either has trained.
    other = {**settings, "max_train_steps": 1, "num_samples": 0, **like}
    method = other.pop("method")
    pictures = tmp_path / "data" / "10_sks owl" if method == "dreambooth-lora" else tmp_path / "data"
    assert held_out(train(method, other, pictures, tmp_path / "other"))[0] == pytest.approx(loss[0], abs=2e-5)


def draw(prompt: str, folder: Path, file: str) -> Image.Image:
    """Picture 0 of the shipped model with a LoRA, by diffusers, with sd-scripts' words for the solver."""
    pipeline = StableDiffusionPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline.load_lora_weights(folder, weight_name=file)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(42))
    drawn: Image.Image = pipeline(prompt, num_inference_steps=25, guidance_scale=7.5, latents=noise).images[0]
    return drawn


def test_the_same_settings_give_the_same_files(tmp_path: Path) -> None:
    settings = kohya_dataset(tmp_path) | {"base_model": str(SHIPPED), "max_train_steps": 10, "num_samples": 0}
    files = []
    for run in ("first", "second"):
        train("kohya-dreambooth-lora", {**settings, "network_dropout": 0.1}, tmp_path / "data", tmp_path / run / "lora")
        files.append({path.name: path.read_bytes() for path in (tmp_path / run / "lora").glob("*.safetensors")})
    assert sorted(files[0]) == ["lora.safetensors", "pytorch_lora_weights.safetensors"]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("optimizer", "learning_rate"), [("AdamW", 1e-3), ("Lion", 1e-4), ("Prodigy", 1.0), ("AdaFactor", 1e-3)]
)
def test_every_optimizer_trains(optimizer: str, learning_rate: float, tmp_path: Path) -> None:
    """Those that need no GPU."""
    settings = captioned_dataset(tmp_path) | {"base_model": str(SHIPPED), "max_train_steps": 3, "num_samples": 0}
    asked = {"optimizer_type": optimizer, "learning_rate": learning_rate, "sample_prompt": []}
    told = train("kohya-native-lora", {**settings, **asked}, tmp_path / "data", tmp_path / "lora")
    assert isinstance(told[-1], events.Finished)
    assert told[-1].change > 1e-9
    assert len(set(held_out(told).values())) == 2
