"""A run that takes the place of another leaves nothing of it, and everything that is not of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdtune.errors import SdtuneError, TrainingError
from sdtune.methods.base import MARK
from sdtune.methods.catalog import METHODS
from sdtune.training.__main__ import run_training
from sdtune.training.results import all_files, remove_result, write_mark

pytestmark = pytest.mark.usefixtures("small")


def names(output: Path) -> set[str]:
    """Less the curves, whose names have the time in them."""
    found = (path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    return {name for name in found if not name.startswith("logs/")}


def train(method: str, settings: dict[str, Any], dataset: Path, output: Path, **more: Any) -> set[str]:
    wanted = {"max_train_steps": 1, **{key: value for key, value in settings.items() if key not in ("rank", *more)}}
    run_training(METHODS[method].from_settings({**wanted, **more}), dataset, output)
    return names(output)


def test_nothing_of_the_earlier_result_is_left(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    dataset, output = pictures(), tmp_path / "out"
    lora = train("dreambooth-lora", settings, dataset, output, save_bin=True)
    assert {"pytorch_lora_weights.bin", "out.safetensors", "contact_sheet.png"} <= lora
    (output / "unet").mkdir()
    (output / "unet" / "notes.txt").write_text("mine")
    (output / "mine.safetensors").write_text("mine")

    oft = train("peft-dreambooth-lora", settings, dataset, output, adapter="oft", rank=8, num_samples=0)
    adapter = {"unet/adapter_config.json", "unet/adapter_model.safetensors"}
    mine = {"unet/notes.txt", "mine.safetensors"}
    assert oft == {MARK, "README.md", "recipe.yaml", *adapter, *mine}

    whole = train("dreambooth", settings, dataset, output, num_samples=0, max_train_steps=2)
    assert {"model_index.json", "unet/config.json", "out.safetensors", *mine} <= whole
    # transformers would put an adapter that lies beside a text encoder on it, unasked.
    assert not {name for name in whole if "adapter" in name}

    again = train("peft-dreambooth-lora", settings, dataset, output, adapter="oft", rank=8, num_samples=0)
    assert again == oft
    assert yaml.safe_load((output / "recipe.yaml").read_text())["method"] == "peft-dreambooth-lora"


def test_a_run_that_fails_leaves_the_earlier_result(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    dataset, output = pictures(), tmp_path / "out"
    train("dreambooth-lora", settings, dataset, output)
    kept = (output / "out.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="nothing was learned"):
        train("dreambooth-lora", settings, dataset, output, learning_rate=1e-30)
    assert (output / "out.safetensors").read_bytes() == kept
    # It is no finished run any more, but what lies there is still known to be ours.
    assert not (output / "recipe.yaml").exists()
    after = train("dreambooth-lora", settings, dataset, output, num_samples=0)
    assert "contact_sheet.png" not in after


def test_a_run_that_cannot_begin_leaves_everything(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    dataset, output = pictures(), tmp_path / "out"
    before = train("dreambooth-lora", settings, dataset, output)
    curves = sorted((output / "logs").iterdir())
    for wrong in ({"rescale_betas_zero_snr": True}, {"clip_skip": 8}, {"target_modules": ["nope"]}):
        with pytest.raises(SdtuneError):
            train("dreambooth-lora", settings, dataset, output, **wrong)
    assert names(output) == before
    assert sorted((output / "logs").iterdir()) == curves


def test_a_mark_does_not_reach_out_of_its_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    write_mark(output, ["../mine.txt"])
    remove_result(output)
    assert (tmp_path / "mine.txt").exists()


def test_a_checkpoint_that_is_being_written_may_go_while_a_result_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder gets its name, or is dropped, between being seen and being looked into."""
    (tmp_path / "notes.txt").touch()
    going = tmp_path / "checkpoints" / ".step-000012.partial-1"
    going.mkdir(parents=True)
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if Path(path) == going:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert all_files(tmp_path) == {tmp_path / "notes.txt"}
