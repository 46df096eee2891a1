"""The trainer as a process, around a stand-in for sd-scripts: what is told, what is left, what is believed."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdtune import events
from sdtune.errors import ProjectError, TrainingError
from sdtune.jobs.spec import plan_training
from sdtune.methods.kohya import KohyaDreamBoothLora
from sdtune.training.__main__ import main
from sdtune.training.components.held_out import fixed_draws
from sdtune.training.kohya import launcher
from sdtune.training.kohya.process import FOLDER, PYTHON, find_sd_scripts
from tests.kohya.test_base import model
from tests.servers.storage import StorageServer

FAKE = Path(__file__).parent / "fake"
SMALL = Path(__file__).parents[2] / "examples" / "base-model"

Train = Callable[..., tuple[int, list[events.Event], str]]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    (tmp_path / "data" / "4_sks cat").mkdir(parents=True)
    Image.new("RGB", (96, 64), "red").save(tmp_path / "data" / "4_sks cat" / "a.png")
    return tmp_path / "data"


@pytest.fixture
def train(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Train]:
    """Trains in this process, with the stand-in in one of its own: exit code, events, everything printed."""
    monkeypatch.setenv(FOLDER, str(FAKE))
    monkeypatch.setenv(PYTHON, sys.executable)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    handler = signal.getsignal(signal.SIGTERM)

    def run(fake: str = "learn", **settings: Any) -> tuple[int, list[events.Event], str]:
        monkeypatch.setenv("FAKE", fake)
        code = main(arguments(tmp_path, dataset, **settings))
        printed = capsys.readouterr().out
        assert not list(tmp_path.glob("sdtune-kohya-*")), "the temporary folder stays"
        return code, [event for line in printed.splitlines() if (event := events.parse(line))], printed

    yield run
    signal.signal(signal.SIGTERM, handler)


def arguments(tmp_path: Path, dataset: Path, output: str = "my cat", **settings: Any) -> list[str]:
    base = tmp_path / "base"
    if not base.exists():
        model(base)
    settings = {"base_model": str(base), "max_train_steps": 5, "num_samples": 2, "sample_every": 3, **settings}
    method = KohyaDreamBoothLora.from_settings(settings)
    # Each run anew: a finished one would only say so.
    return list(plan_training(method, str(dataset), str(tmp_path / output), overwrite=True).args)


def test_a_run_leaves_everything_it_promises(train: Train, tmp_path: Path) -> None:
    code, told, printed = train(gradient_accumulation_steps=2)
    assert code == 0, printed
    assert "%|" not in printed
    steps = [event for event in told if isinstance(event, events.Step)]
    assert (steps[-1].step, steps[-1].steps, steps[-1].loss, steps[-1].learning_rate) == (5, 5, 1.0, 1e-4)
    phases = [event.name for event in told if isinstance(event, events.Phase)]
    assert phases == ["load", "cache", "sample", "train", "sample", "train", "sample", "save"]
    assert told[-1] == events.Finished(told[-1].seconds, 5, 1.0, 2.0)  # type: ignore[union-attr]

    output = tmp_path / "my cat"
    assert sorted(path.name for path in (output / "samples").iterdir()) == [
        "step-000000", "step-000003", "step-000005",
    ]  # fmt: skip
    drawn = Image.open(output / "samples" / "step-000005" / "prompt-0-sample-1.png")
    assert drawn.getpixel((0, 0)) == (50, 0, 0)
    assert Image.open(output / "contact_sheet.png").width > 128

    with safe_open(output / "my cat.safetensors", "pt") as lora:
        metadata = lora.metadata()
    assert metadata["ss_sd_model_name"] == "base"
    assert "ss_sd_model_hash" not in metadata
    content = (output / "my cat.safetensors").read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    with safe_open(output / "pytorch_lora_weights.safetensors", "pt") as lora:
        assert len(list(lora.keys())) == 2

    recipe = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    assert (recipe["resolution"], recipe["sample_prompt"]) == (512, ["sks cat"])
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "It has learned `sks cat` from 1 picture." in card
    assert "| pictures | 1, 4 with repeats |" in card
    assert "](samples/step-000005/prompt-0-sample-1.png)" in card
    assert "instance_prompt: sks cat" in card
    assert str(tmp_path) not in card
    curves = EventAccumulator(str(output / "logs")).Reload()
    assert {"train/loss", "train/learning_rate", "train/avr_loss"} <= set(curves.Tags()["scalars"])
    assert curves.Scalars("train/avr_loss")[-1].value == 0.75


def test_a_base_model_comes_from_a_bucket_whose_name_is_not_told(
    train: Train, tmp_path: Path, storage: StorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    folder = model(tmp_path / "uploaded")
    for path in folder.rglob("*.*"):
        storage.put("secret", f"sd/{path.relative_to(folder).as_posix()}", path.read_bytes())
    for part in ("unet", "vae"):
        storage.put("secret", f"sd/{part}/diffusion_pytorch_model.safetensors", b"not opened by the stand-in")
    code, told, printed = train(base_model="gs://secret/sd")
    assert code == 0, printed
    assert next(event.name for event in told if isinstance(event, events.Phase)) == "fetch"
    with safe_open(tmp_path / "my cat" / "my cat.safetensors", "pt") as lora:
        assert lora.metadata()["ss_sd_model_name"] == "sd"
        assert "secret" not in str(lora.metadata())


def held_out(told: list[events.Event]) -> dict[int, float]:
    return {event.step: event.value for event in told if isinstance(event, events.Measure)}


def test_the_held_out_loss_is_measured_on_the_draws_of_the_other_methods(train: Train, tmp_path: Path) -> None:
    """Of the stand-in: (noise - share * (latents + noise)) squared, where the picture is red: 1/3 bright, -1/3."""
    _, told, printed = train(held_out_every=2, gradient_accumulation_steps=2)
    noise = torch.stack(fixed_draws([(4, 64, 64)], 1000).noise)
    expected = {step: ((noise - step / 10 * (-0.18215 / 3 + noise)) ** 2).mean().item() for step in (0, 2, 4, 5)}
    assert held_out(told) == pytest.approx(expected, abs=2e-6), printed
    curves = EventAccumulator(str(tmp_path / "my cat" / "logs")).Reload()
    assert [point.step for point in curves.Scalars("held_out_loss")] == [0, 2, 4, 5]
    assert list(held_out(train(num_samples=0, sample_every=0)[1])) == [0, 5]


def test_the_small_model_is_trained_as_it_is(train: Train, tmp_path: Path) -> None:
    code, told, printed = train(base_model=str(SMALL), num_samples=1)
    assert code == 0, printed
    assert "a UNet of [80, 96] and latents times 0.4357" in printed
    # The pipeline of the samples divides by Stable Diffusion's scale whatever the VAE says, and is told of it.
    drawn = Image.open(tmp_path / "my cat" / "samples" / "step-000005" / "prompt-0-sample-0.png")
    assert drawn.getpixel((0, 0)) == (50, 100, 0)
    noise = torch.stack(fixed_draws([(4, 16, 16)], 1000).noise)
    assert held_out(told)[0] == pytest.approx((noise**2).mean().item(), abs=2e-6)


def test_a_constant_that_sd_scripts_does_not_have_is_an_error() -> None:
    module = types.SimpleNamespace(__name__="library.original_unet", NORM_GROUPS=32)
    launcher.set_constants(module, {"NORM_GROUPS": 16})
    assert module.NORM_GROUPS == 16
    with pytest.raises(TrainingError, match=r"library.original_unet of this copy of sd-scripts has no NORMS"):
        launcher.set_constants(module, {"NORMS": 16})


def test_the_same_settings_give_the_same_files(train: Train, tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        code, _, printed = train()
        assert code == 0, printed
        made.append({path.name: path.read_bytes() for path in (tmp_path / "my cat").glob("*.safetensors")})
    assert sorted(made[0]) == ["my cat.safetensors", "pytorch_lora_weights.safetensors"]
    assert made[0] == made[1]


def test_a_finished_run_says_so_and_one_without_its_recipe_begins_anew(
    train: Train, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train()[0] == 0
    words = [word for word in arguments(tmp_path, dataset) if not word.startswith("--overwrite=")]
    before = (tmp_path / "my cat" / "my cat.safetensors").stat().st_mtime_ns
    assert main(words) == 0
    assert "holds this run already, and it has finished" in capsys.readouterr().out
    assert (tmp_path / "my cat" / "my cat.safetensors").stat().st_mtime_ns == before
    (tmp_path / "my cat" / "recipe.yaml").unlink()
    assert main(words) == 0
    assert '"event": "phase", "name": "train"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ("nothing", "sd-scripts ended without a single step"),
        ("zero", "the LoRA is zero: nothing was learned"),
        ("gone", "left no LoRA"),
        ("diverge", "the loss was nan at step 3"),
        ("crash", "  | ValueError: something inside sd-scripts"),
        ("memory", "the GPU ran out of memory. What helps, most first: --train-batch-size 1"),
    ],
)
def test_a_run_without_its_result_fails(fake: str, words: str, train: Train, tmp_path: Path) -> None:
    code, told, printed = train(fake, num_samples=0, sample_every=0)
    assert code == 5, printed
    assert isinstance(told[-1], events.Failed)
    assert (told[-1].kind, words in told[-1].text) == ("training", True), told[-1].text
    assert not list((tmp_path / "my cat").glob("*.safetensors"))
    assert not (tmp_path / "my cat" / "recipe.yaml").exists()


def test_a_stopped_run_stops_sd_scripts(tmp_path: Path, dataset: Path) -> None:
    words = arguments(tmp_path, dataset, max_train_steps=10_000, num_samples=0, sample_every=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "sdtune.training", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, FOLDER: str(FAKE), PYTHON: sys.executable, "FAKE": "hang", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if isinstance(events.parse(line), events.Step):
            break
    process.send_signal(signal.SIGTERM)
    process.stdout.read()  # ends when the last process that writes to it has ended
    assert process.wait(timeout=30) == 143
    assert not list(tmp_path.glob("sdtune-kohya-*"))
    assert {path.name for path in (tmp_path / "my cat").iterdir()} == {"logs", ".sdtune", "checkpoints"}


def test_where_sd_scripts_is_must_be_told(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="SDTUNE_SD_SCRIPTS does not say where one is"):
        find_sd_scripts({})
    with pytest.raises(ProjectError, match="is no copy of kohya-ss/sd-scripts"):
        find_sd_scripts({FOLDER: str(tmp_path)})
    with pytest.raises(ProjectError, match="no program /nowhere/python"):
        find_sd_scripts({FOLDER: str(FAKE), PYTHON: "/nowhere/python"})
    assert find_sd_scripts({FOLDER: str(FAKE)}).python == sys.executable


def test_without_sd_scripts_nothing_starts(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER)
    code, told, _ = train()
    assert code == 3
    assert isinstance(told[-1], events.Failed)
    assert told[-1].kind == "project"


def test_inside_sd_scripts_nothing_of_sdtune_is_imported_but_what_needs_torch_alone() -> None:
    seen, waiting, others = set(), {"sdtune.training.kohya.launcher"}, set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        tree = ast.parse(Path(importlib.import_module(name).__file__ or "").read_text(encoding="utf-8"))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        imported |= {each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
        imported |= {"sdtune.training.interrupts"} if "sdtune.training" in imported else set()
        waiting |= {each for each in imported if each.startswith("sdtune")} - seen - {"sdtune.training"}
        others |= {each.partition(".")[0] for each in imported if not each.startswith("sdtune")}
    assert others - set(sys.stdlib_module_names) == {"torch", "safetensors", "numpy"}, seen
    assert "sdtune.training.kohya.moving" in seen
    assert "sdtune.training.interrupts" in seen
