"""The command line as a user meets it, in process; the whole of it in a process in test_run.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdtune import __version__
from sdtune.methods.catalog import ALIASES, METHODS
from tests.conftest import BASE_MODEL, Command


def good(pictures: Path, tmp_path: Path) -> list[Any]:
    return [
        "train", "dreambooth-lora", "--base-model", BASE_MODEL, "--dataset", pictures,
        "--instance-prompt", "a photo of sks cat", "--output", tmp_path / "out",
    ]  # fmt: skip


def test_dry_run_shows_what_would_run_and_starts_nothing(
    sdtune: Command, pictures: Callable[..., Path], tmp_path: Path
) -> None:
    code, out, _ = sdtune(*good(pictures(), tmp_path), "--dry-run", "--rank", "8")
    assert code == 0
    assert "3 files, 3 used, 0 dropped" in out
    assert "3 pictures at 128 px" in out
    assert "400 steps of 1 picture, seed 42" in out
    assert "Nothing was started" in out
    assert '"rank": 8' in out
    assert not (tmp_path / "out").exists()


def test_the_shapes_of_the_pictures_are_told(sdtune: Command, pictures: Callable[..., Path], tmp_path: Path) -> None:
    dataset = pictures()
    assert "  shapes  " not in sdtune(*good(dataset, tmp_path), "--dry-run")[1]
    Image.new("RGB", (600, 400), "red").save(dataset / "wide.png")
    # Of the shipped model the sides are multiples of 16.
    assert "shapes      128 x 128: 3, 160 x 96: 1" in sdtune(*good(dataset, tmp_path), "--dry-run")[1]
    assert "  shapes  " not in sdtune(*good(dataset, tmp_path), "--dry-run", "--no-enable-bucket")[1]
    lines = sdtune(*good(dataset, tmp_path), "--dry-run", "--json", "--resolution", "256")[1].splitlines()
    plan = next(line for line in map(json.loads, lines) if line["event"] == "plan")
    assert plan["shapes"] == {"256x256": 3, "304x208": 1}


def test_json_is_one_object_per_line(sdtune: Command, pictures: Callable[..., Path], tmp_path: Path) -> None:
    code, out, err = sdtune(*good(pictures(), tmp_path), "--dry-run", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [line["event"] for line in lines] == ["progress", "dataset", "plan", "dry_run"]
    assert lines[-1]["command"][1:5] == ["-m", "sdtune.training", "train", "dreambooth-lora"]


def test_a_base_model_that_moved_is_told_in_the_plan(
    sdtune: Command, pictures: Callable[..., Path], tmp_path: Path
) -> None:
    words = [*good(pictures(), tmp_path), "--base-model", "runwayml/stable-diffusion-v1-5", "--revision", "v2"]
    there = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    note = f"base_model: runwayml/stable-diffusion-v1-5 is no longer on Hugging Face; its copy {there} is used."
    _, out, _ = sdtune(*words, "--dry-run")
    assert f"  base model  {there} at v2\n" in out
    assert f"warning: {note}\n" in out
    _, out, _ = sdtune(*words, "--dry-run", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert {"event": "note", "level": "warning", "text": note} in lines
    assert [line["settings"]["base_model"] for line in lines if line["event"] == "plan"] == [there]


def test_all_mistakes_together_and_nothing_written(sdtune: Command, tmp_path: Path) -> None:
    code, out, err = sdtune(
        "train", "dreambooth-lora", "--base-model", BASE_MODEL, "--dataset", tmp_path / "nowhere",
        "--output", tmp_path / "out", "--rank", "0", "--learning-rate", "fast",
    )  # fmt: skip
    assert code == 2
    for words in ("instance_prompt: missing", "rank: found '0'", "learning_rate: found 'fast'", "nowhere"):
        assert words in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_errors_are_json_too_when_asked(sdtune: Command, tmp_path: Path) -> None:
    code, out, err = sdtune("train", "dreambooth-lora", "--json", "--dataset", tmp_path, "--output", tmp_path / "out")
    last = json.loads(out.splitlines()[-1])
    assert (code, err, last["event"], last["exit_code"]) == (2, "", "error", 2)


def test_what_is_typed_wins_over_the_recipe(sdtune: Command, pictures: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: dreambooth-lora\nrank: 8\nlearning_rate: 2e-4\nmax_train_steps: 9\n")
    _, out, _ = sdtune(*good(pictures(), tmp_path), "--config", recipe, "--rank", "32", "--dry-run", "--json")
    settings = json.loads(out.splitlines()[2])["settings"]
    assert (settings["rank"], settings["learning_rate"], settings["max_train_steps"]) == (32, 2e-4, 9)


def test_a_switch_of_the_recipe_can_be_switched_off(
    sdtune: Command, pictures: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("random_flip: true\n")
    run = [*good(pictures(), tmp_path), "--config", recipe, "--dry-run", "--json"]
    for words, flip in (([], True), (["--no-random-flip"], False)):
        _, out, _ = sdtune(*run, *words)
        assert json.loads(out.splitlines()[2])["settings"]["random_flip"] is flip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank: [", "is not YAML"),
        ("- 1\n", "holds a list; wanted lines of the form `setting: value`."),
        ("rank: 4\nlr: 3\n", "lr: dreambooth-lora has no such setting"),
        ("method: kohya-native-lora\n", "is a recipe of kohya-native-lora"),
        ("1: 2\n", "wanted lines of the form"),
    ],
)
def test_broken_recipes_are_explained(
    sdtune: Command, pictures: Callable[..., Path], tmp_path: Path, text: str, words: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    code, _, err = sdtune(*good(pictures(), tmp_path), "--config", recipe)
    assert code == 2
    assert words in err


def test_an_unknown_option_and_an_unknown_method_are_refused(sdtune: Command, tmp_path: Path) -> None:
    code, _, err = sdtune("train", "dreambooth-lora", "--lr", "1")
    assert (code, "No such option" in err) == (2, True)
    code, _, err = sdtune("train", "dreambooth-lra")
    assert (code, "Did you mean" in err, "'dreambooth-lora'" in err) == (2, True, True)


def test_older_names_are_understood(sdtune: Command, pictures: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: diffuser_dreambooth_lora\nrank: 8\n")
    words = good(pictures(), tmp_path)
    words[1] = "diffuser_dreambooth_lora"
    code, out, _ = sdtune(*words, "--config", recipe, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["command"][4] == "dreambooth-lora"
    assert "diffuser" not in sdtune("train", "--help")[1]
    assert set(ALIASES.values()) <= set(METHODS)


def test_validate_tells_every_file(sdtune: Command, pictures: Callable[..., Path]) -> None:
    folder = pictures()
    (folder / "notes.pdf").write_text("x")
    code, out, _ = sdtune("validate", "dreambooth-lora", folder, "--all", "--resolution", "512")
    assert code == 0
    assert "4 files, 3 used, 1 dropped" in out
    for name in ("0.png", "1.png", "2.png", "notes.pdf"):
        assert name in out
    assert "warning: 0.png: is 128 x 128 pixels and is enlarged to train at 512" in out


def test_validate_ends_with_2_on_a_dataset_that_cannot_be_trained_on(sdtune: Command, tmp_path: Path) -> None:
    code, _, err = sdtune("validate", "dreambooth-lora", tmp_path)
    assert code == 2
    assert "error" in err


def test_help_names_every_setting(sdtune: Command) -> None:
    for name, method in METHODS.items():
        code, out, _ = sdtune("train", name, "--help")
        assert code == 0
        for field in method.model_fields:
            assert "--" + field.replace("_", "-") in out


def test_the_version_is_told(sdtune: Command) -> None:
    assert sdtune("--version") == (0, f"sdtune {__version__}\n", "")
