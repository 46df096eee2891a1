"""The entry point of containers as a process: the same arguments, the same files, the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdtune import events
from sdtune.jobs.spec import plan_training
from sdtune.methods.catalog import METHODS
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.__main__ import run_training
from tests.conftest import BASE_MODEL, DATASETS
from tests.training.conftest import EntryPoint

pytestmark = pytest.mark.usefixtures("small")


def arguments(settings: dict[str, Any], dataset: Path, output: Path, *more: str) -> list[str]:
    return [*plan_training(DreamBoothLora.from_settings(settings), str(dataset), str(output)).args, *more]


def train(settings: dict[str, Any], dataset: Path, output: Path, *more: str) -> tuple[int, list[events.Event], str]:
    """Exit code, events, and everything else that was printed."""
    words = arguments(settings, dataset, output, *more)
    ran = subprocess.run([sys.executable, "-m", "sdtune.training", *words], capture_output=True, text=True)
    told = [events.parse(line) for line in ran.stdout.splitlines()]
    return ran.returncode, [event for event in told if event], ran.stderr


def test_a_run_leaves_everything_it_promises(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "my cat"
    settings.pop("resolution")
    code, told, _ = train({**settings, "lora_alpha": 2, "sample_every": 2}, pictures(), output)
    assert code == 0
    assert [type(event).__name__ for event in told][-1] == "Finished"

    with safe_open(output / "pytorch_lora_weights.safetensors", "pt") as lora:
        names = list(lora.keys())
        assert all(name.startswith("unet.") for name in names)
        assert any(lora.get_tensor(key).abs().max() > 0 for key in names if ".up." in key)
    with safe_open(output / "my cat.safetensors", "pt") as kohya:
        names, metadata = list(kohya.keys()), kohya.metadata()
        assert all(name.startswith("lora_unet_") for name in names)
        assert {float(kohya.get_tensor(key)) for key in names if key.endswith(".alpha")} == {2.0}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert metadata["modelspec.trigger_phrase"] == "a photo of sks cat"
    assert not [value for value in metadata.values() if str(tmp_path) in value]

    recipe = yaml.safe_load((output / "recipe.yaml").read_text())
    assert recipe.pop("method") == "dreambooth-lora"
    assert (recipe["resolution"], recipe["rank"], recipe["sample_prompt"]) == (128, 4, ["a photo of sks cat"])
    assert DreamBoothLora.from_settings(recipe).recipe() == recipe

    steps = sorted(path.name for path in (output / "samples").iterdir())
    assert steps == ["step-000000", "step-000002", "step-000004"]
    assert Image.open(output / "samples" / "step-000004" / "prompt-0-sample-0.png").size == (128, 128)
    assert Image.open(output / "contact_sheet.png").width > 128

    curves = EventAccumulator(str(output / "logs")).Reload()
    assert {"train/loss", "train/learning_rate"} <= set(curves.Tags()["scalars"])
    assert curves.Scalars("train/loss")[-1].step == 4
    assert not [path for path in output.rglob("*") if ".partial-" in path.name]


def test_the_same_settings_give_the_same_files(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path, entry_point: EntryPoint
) -> None:
    dataset = pictures()
    settings["num_samples"] = 0
    # In one process and in another, which hashes texts in another way.
    assert train(settings, dataset, tmp_path / "one" / "cat")[0] == 0
    for name, more in (("two", {}), ("three", {"seed": 1})):
        assert entry_point(arguments({**settings, **more}, dataset, tmp_path / name / "cat"))[0] == 0
    made = [digests(tmp_path / name / "cat") for name in ("one", "two", "three")]
    assert len(made[0]) == 2
    assert made[0] == made[1]
    assert all(made[0][name] != made[2][name] for name in made[0])


def digests(output: Path) -> dict[str, str]:
    files = [file for file in output.rglob("*") if file.suffix in (".safetensors", ".json", ".txt", ".bin")]
    return {str(file.relative_to(output)): sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(
    ("name", "more", "count"),
    [
        ("dreambooth", {"with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 2}, 11),
        ("text-to-image", {"use_ema": True, "snr_gamma": 5, "random_flip": True}, 11),
        ("text-to-image-lora", {"lora_dropout": 0.2, "proportion_empty_prompts": 0.5, "save_bin": True}, 3),
        ("peft-dreambooth-lora", {"train_text_encoder": True, "use_dora": True}, 6),
    ],
)
def test_so_does_every_method(tmp_path: Path, name: str, more: dict[str, Any], count: int) -> None:
    method = METHODS[name]
    common = {
        "base_model": str(BASE_MODEL), "resolution": 64, "max_train_steps": 2, "num_samples": 0, "sample_steps": 2,
    }  # fmt: skip
    if "instance_prompt" in method.model_fields:
        common["instance_prompt"] = "a photo of sks cat"
    dataset = DATASETS / method.layout.value
    made = []
    for folder in ("one", "two"):
        run_training(method.from_settings({**common, **more}), dataset, tmp_path / folder / "cat")
        made.append(digests(tmp_path / folder / "cat"))
    assert made[0] == made[1]
    assert len(made[0]) == count, sorted(made[0])


def test_a_searchs_value_wins(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path, entry_point: EntryPoint
) -> None:
    settings["num_samples"] = 0
    searched = ("--rank=2", "--learning_rate=1e-05")
    code, _, _ = entry_point(arguments(settings, pictures(), tmp_path / "out", *searched))
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (code, recipe["rank"], recipe["learning_rate"]) == (0, 2, 1e-05)


@pytest.mark.parametrize(
    ("more", "code", "kind", "words"),
    [
        ({"learning_rate": 1e-30}, 5, "training", "the LoRA is zero: nothing was learned"),
        ({"target_modules": ["to_x"]}, 5, "training", "target_modules: to_x match no layer of the UNet"),
        ({"base_model": "someone/nothing"}, 5, "training", "base_model: someone/nothing cannot be loaded"),
    ],
)
def test_a_run_that_learns_nothing_says_why_and_fails(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path,
    more: dict[str, Any], code: int, kind: str, words: str,
    entry_point: EntryPoint, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ended, told, _ = entry_point(arguments({**settings, "num_samples": 0, **more}, pictures(), tmp_path / "out"))
    failed = told[-1]
    assert ended == code
    assert isinstance(failed, events.Failed)
    assert failed.kind == kind
    assert words in failed.text
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_an_output_that_cannot_be_written_is_named(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path, entry_point: EntryPoint
) -> None:
    (tmp_path / "file").write_text("")
    code, told, _ = entry_point(arguments(settings, pictures(), tmp_path / "file"))
    assert code == 5
    assert "cannot be written" in told[-1].text  # type: ignore[union-attr]


def test_a_stopped_run_leaves_no_half_written_file(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    settings |= {"max_train_steps": 100_000, "num_samples": 0}
    words = arguments(settings, pictures(), tmp_path / "out")
    process = subprocess.Popen([sys.executable, "-m", "sdtune.training", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if '"event": "step"' in line:
            break
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    process.stdout.read()
    assert process.wait(timeout=30) == 143
    assert time.monotonic() - started < 10
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"logs", ".sdtune", "checkpoints"}
    assert not [path for path in (tmp_path / "out").rglob("*") if ".partial-" in path.name]


def test_wrong_arguments_are_told_as_an_event() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "sdtune.training", "train", "dreambooth-lora", "--dataset=/d", "--output=/o"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert ran.returncode == 2
    assert json.loads(ran.stdout)["kind"] == "recipe"
