"""What the launcher finds of a run in an output, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdtune import events
from sdtune.backends.local.backend import LocalBackend
from sdtune.commands.earlier import Earlier, find_earlier
from sdtune.errors import RecipeError
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.methods.resuming import Manifest, name_of

BACKEND = LocalBackend()


def method(**more: Any) -> DreamBoothLora:
    return DreamBoothLora.from_settings({"instance_prompt": "a photo of sks cat", **more})


def look(output: Path, dataset: str = "/pictures", **more: Any) -> Earlier:
    return find_earlier(method(**more), dataset, str(output), BACKEND.list_names(str(output)), BACKEND)


def checkpoint(output: Path, step: int, **more: Any) -> Path:
    folder = output / "checkpoints" / name_of(step)
    folder.mkdir(parents=True)
    made = method(**more)
    (folder / "manifest.json").write_bytes(Manifest(step, made.name, made.recipe(), "/pictures").to_bytes())
    return folder


def finish(output: Path, **more: Any) -> events.Finished:
    """As a run leaves it: resolved."""
    made = method(**more).resolved(resolution=512, mixed_precision="bf16")
    done = events.Finished(12.5, 400, 0.25, 0.01)
    facts = {"dataset": "/pictures", "token": None, "beside": {"processes": 1}, "finished": vars_of(done)}
    output.mkdir(exist_ok=True)
    (output / ".sdtune").write_text(f"The output of a run of sdtune 0.1.0. {json.dumps(facts)}\ncat.safetensors\n")
    (output / "recipe.yaml").write_text(yaml.safe_dump({"method": made.name, **made.recipe()}))
    return done


def vars_of(done: events.Finished) -> dict[str, Any]:
    return {name: value for name, value in events.to_dict(done).items() if name != "event"}


def test_nothing(tmp_path: Path) -> None:
    assert look(tmp_path / "out") == Earlier()
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    assert look(tmp_path / "out") == Earlier()


def test_the_newest_checkpoint_of_the_same_run(tmp_path: Path) -> None:
    checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 100)
    (checkpoint(tmp_path, 140) / "manifest.json").write_text("torn")
    assert look(tmp_path) == Earlier(step=100)
    # What changes no weight may be another.
    assert look(tmp_path, sample_every=7, checkpointing_steps=9, push_to_hub=True, max_train_steps=700).step == 100


@pytest.mark.parametrize(
    ("more", "lines"),
    [
        ({"learning_rate": 5e-4}, ["learning_rate: 0.0001 then, 0.0005 now"]),
        ({"rank": 8, "seed": 1}, ["seed: 42 then, 1 now", "rank: 16 then, 8 now"]),
        ({"max_train_steps": 90}, ["max_train_steps: 400 then, 90 now"]),
        ({"lr_scheduler": "cosine"}, ["lr_scheduler: constant then, cosine now"]),
        ({"dataset": "/others"}, ["dataset: /pictures then, /others now"]),
    ],
)
def test_another_run_is_refused_with_every_difference(tmp_path: Path, more: dict[str, Any], lines: list[str]) -> None:
    checkpoint(tmp_path, 100)
    with pytest.raises(RecipeError) as refused:
        look(tmp_path, **more)
    told = str(refused.value).splitlines()
    assert told[0] == f"output: {tmp_path} holds an unfinished run, at step 100, with other settings:"
    assert [line.strip() for line in told[1:-1]] == lines
    assert "--overwrite to begin anew" in told[-1]


def test_more_steps_need_a_schedule_that_does_not_look_at_them(tmp_path: Path) -> None:
    checkpoint(tmp_path, 100, lr_scheduler="cosine")
    assert look(tmp_path, lr_scheduler="cosine").step == 100
    with pytest.raises(RecipeError, match="max_train_steps: 400 then, 500 now"):
        look(tmp_path, lr_scheduler="cosine", max_train_steps=500)


def test_what_draws_class_pictures_is_no_matter_of_taste(tmp_path: Path) -> None:
    prior = {"with_prior_preservation": True, "class_prompt": "a cat"}
    checkpoint(tmp_path / "with", 5, **prior)
    checkpoint(tmp_path / "without", 5)
    assert look(tmp_path / "without", sample_steps=9).step == 5
    with pytest.raises(RecipeError, match="sample_steps: 25 then, 9 now"):
        look(tmp_path / "with", sample_steps=9, **prior)


def test_a_finished_run(tmp_path: Path) -> None:
    done = finish(tmp_path)
    assert look(tmp_path) == Earlier(finished=done)
    # Whether it was said, or left to the run.
    assert look(tmp_path, resolution=512, mixed_precision="bf16").finished
    with pytest.raises(
        RecipeError, match=r"holds a finished run with other settings:\n  resolution: 512 then, 768 now"
    ):
        look(tmp_path, resolution=768)
    with pytest.raises(RecipeError, match="dataset: /pictures then, /others now"):
        look(tmp_path, dataset="/others")


def test_a_finished_run_that_kept_its_checkpoints_takes_more_steps(tmp_path: Path) -> None:
    finish(tmp_path)
    checkpoint(tmp_path, 400)
    assert look(tmp_path, max_train_steps=800) == Earlier(step=400)
    with pytest.raises(RecipeError, match=r"a finished run with other settings:\n  seed: 42 then, 1 now"):
        look(tmp_path, seed=1)


@pytest.mark.parametrize("mark", ["The output of a run of sdtune 0.1.0.\ncat.safetensors\n", "torn {", ""])
def test_one_that_does_not_say_what_it_is(tmp_path: Path, mark: str) -> None:
    finish(tmp_path)
    (tmp_path / ".sdtune").write_text(mark)
    with pytest.raises(RecipeError, match="what it was trained with is not known"):
        look(tmp_path)
