"""The use case: everything is checked before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdtune.backends.local.backend import LocalBackend
from sdtune.commands.train import TrainingPlan, plan_train
from sdtune.errors import DatasetError, RecipeError
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.methods.ledger import Finding


@pytest.fixture
def plan(pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path) -> TrainingPlan:
    return plan_train(DreamBoothLora, settings, str(pictures()), str(tmp_path / "out"), LocalBackend())


def warnings(plan: TrainingPlan) -> tuple[Finding, ...]:
    assert plan.ledger
    return plan.ledger.warnings


def test_a_plan_writes_nothing(plan: TrainingPlan, tmp_path: Path) -> None:
    assert not (tmp_path / "out").exists()
    assert plan.job.name == "out"
    assert plan.ledger
    assert len(plan.ledger.examples) == 3


def test_the_dataset_is_checked_at_the_base_models_own_resolution(
    pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    small = str(pictures(side=100, name="small"))
    plan = plan_train(DreamBoothLora, settings, small, str(tmp_path / "out"), LocalBackend())
    assert {finding.code for finding in warnings(plan)} == {"small"}
    settings["resolution"] = 64
    plan = plan_train(DreamBoothLora, settings, small, str(tmp_path / "out"), LocalBackend())
    assert not warnings(plan)


def test_every_mistake_is_told_at_once(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"rank": 0, "base_model": "./nowhere"}
    with pytest.raises(RecipeError) as caught:
        plan_train(DreamBoothLora, settings, str(tmp_path / "no data"), None, LocalBackend())
    for words in ("rank: found 0", "base_model: no folder or file './nowhere'", "output: missing", "no data"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ({"min_bucket_reso": 512}, "min_bucket_reso: found 512, but pictures are trained at 128; the shortest side"),
        ({"max_bucket_reso": 64}, "max_bucket_reso: found 64, but pictures are trained at 128; the longest"),
    ],
)
def test_bounds_of_buckets_are_held_against_the_base_models_resolution(
    pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, bound: dict[str, int], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        plan_train(DreamBoothLora, settings | bound, str(pictures()), str(tmp_path / "out"), LocalBackend())


@pytest.mark.parametrize("nothing", ["", None])
def test_no_base_model_is_one_mistake(
    pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, nothing: str | None
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_train(
            DreamBoothLora, settings | {"base_model": nothing}, str(pictures()), str(tmp_path / "out"), LocalBackend()
        )
    assert str(caught.value).count("base_model") == 1


def test_a_bad_dataset_stops_before_the_start(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shown = []
    with pytest.raises(DatasetError):
        plan_train(
            DreamBoothLora, settings, str(tmp_path / "data"), str(tmp_path / "out"), LocalBackend(), show=shown.append
        )
    assert len(shown) == 1


def test_a_finished_run_is_not_overwritten_unasked(
    pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text("")
    data = str(pictures())
    with pytest.raises(RecipeError, match="already holds a finished run; choose another --output or add --overwrite"):
        plan_train(DreamBoothLora, settings, data, str(out), LocalBackend())
    assert plan_train(DreamBoothLora, settings, data, str(out), LocalBackend(), overwrite=True)


def test_class_pictures_are_checked_and_found_from_anywhere(
    pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings |= {"with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": "cats"}
    data = str(pictures())
    with pytest.raises(DatasetError, match="class_data_dir: cats: no such folder"):
        plan_train(DreamBoothLora, settings, data, "out", LocalBackend())
    pictures(name="cats")
    plan = plan_train(DreamBoothLora, settings, data, "out", LocalBackend())
    assert getattr(plan.method, "class_data_dir", None) == str(tmp_path / "cats")


@pytest.mark.parametrize("name", ["dataset", "base_model", "class_data_dir"])
@pytest.mark.parametrize("below", ["", "deep/down"])
def test_the_result_is_not_written_among_its_sources(
    pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, name: str, below: str
) -> None:
    data = pictures()
    sources = {"dataset": data, "base_model": tmp_path / "model", "class_data_dir": tmp_path / "cats"}
    settings |= {
        "with_prior_preservation": True,
        "class_prompt": "a cat",
        "class_data_dir": str(sources["class_data_dir"]),
    }
    settings["base_model"] = str(sources["base_model"])
    with pytest.raises(RecipeError, match=f"is the {name} or lies in it|holds other files"):
        plan_train(DreamBoothLora, settings, str(data), str(sources[name] / below), LocalBackend())


def test_a_folder_that_is_not_ours_is_left_alone(
    pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    data, out = str(pictures()), tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    (out / "logs" / "mine").write_text("")
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match="holds other files, such as 'logs'; choose a new folder"):
            plan_train(DreamBoothLora, settings, data, str(out), LocalBackend(), overwrite=overwrite)
    # A run that was stopped left its mark, and may be started again.
    (out / ".sdtune").write_text("")
    assert plan_train(DreamBoothLora, settings, data, str(out), LocalBackend())


@pytest.mark.parametrize("output", ["", None, "pytorch_lora_weights"])
def test_an_output_that_cannot_be_is_refused(
    pictures: Callable[..., Path], settings: dict[str, Any], output: str | None
) -> None:
    with pytest.raises(RecipeError, match="output: "):
        plan_train(DreamBoothLora, settings, str(pictures()), output, LocalBackend())


def test_keeping_every_picture_out_is_refused_before_the_start(
    pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["held_out_images"] = 3
    with pytest.raises(DatasetError, match="held_out_images: 3 of 3 pictures would leave none to train on"):
        plan_train(DreamBoothLora, settings, str(pictures()), str(tmp_path / "out"), LocalBackend())


@pytest.mark.parametrize("name", ["gs://bucket/sd", "/gcs/bucket/sd", "gs://bucket/sd/"])
def test_a_base_model_in_a_bucket_is_sent_as_its_address(
    pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, name: str
) -> None:
    settings["base_model"] = name
    plan = plan_train(DreamBoothLora, settings, str(pictures()), str(tmp_path / "out"), LocalBackend())
    assert plan.method.base_model == "gs://bucket/sd"
    assert DreamBoothLora.from_args(plan.job.args[4:]) == plan.method


def test_a_base_model_that_moved_is_sent_as_what_it_is_now(
    pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"base_model": "runwayml/stable-diffusion-v1-5", "revision": "v2"}
    plan = plan_train(DreamBoothLora, settings, str(pictures()), str(tmp_path / "out"), LocalBackend())
    assert (plan.method.base_model, plan.method.revision) == ("stable-diffusion-v1-5/stable-diffusion-v1-5", "v2")
    settings["base_model"] = str(tmp_path)
    with pytest.raises(RecipeError, match=r"revision: found 'v2', but .* is no Hugging Face id"):
        plan_train(DreamBoothLora, settings, str(tmp_path / "pictures"), str(tmp_path / "out"), LocalBackend())
