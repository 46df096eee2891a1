"""A search finds settings that are better than the defaults: twelve real trials on the shipped base model, on CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdtune import events
from sdtune.backends.local.studies import LocalStudies
from sdtune.jobs.search_space import Value, search_space
from sdtune.jobs.spec import plan_training
from sdtune.jobs.study import Study, StudyRecord
from sdtune.methods.dreambooth import DreamBoothLora
from tests.conftest import BASE_MODEL, DATASETS
from tests.shared import made_once

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEED = 1
BETTER_THAN_DEFAULT, BETTER_THAN_WORST = 0.8, 0.65
"""The best trial's held-out loss is less than so much of the other's."""
RECIPE = DreamBoothLora.from_settings(
    {
        "base_model": str(BASE_MODEL),
        "instance_prompt": "a photo of sks cat",
        "max_train_steps": 40,
        "train_batch_size": 4,
        "num_samples": 0,
        # Two of the eight photographs: what is learned by heart does not count.
        "held_out_images": 2,
        "held_out_every": 20,
        "seed": SEED,
    }
)


@dataclass(frozen=True)
class Searched:
    """The study, and the held-out losses of the default recipe, and of the best trial's trained once more."""

    record: StudyRecord
    default: float
    again: float


def held_out_loss(output: Path, values: Mapping[str, Value]) -> float:
    """Of the recipe with ``values`` laid over it, trained on its own."""
    job = plan_training(RECIPE, str(DATASETS / "images"), str(output))
    more = [f"--{name}={value}" for name, value in values.items()]
    ran = subprocess.run([sys.executable, "-m", "sdtune.training", *job.args, *more], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = [events.parse(line) for line in ran.stdout.splitlines()]
    return [event.value for event in told if isinstance(event, events.Measure)][-1]


def search(folder: Path) -> None:
    """A search, and two runs of its recipe on their own; their losses go to losses.json."""
    study = Study(
        name="search",
        method=RECIPE.name,
        space=search_space(DreamBoothLora, ["learning_rate=1e-5:1e-2:log", "rank=4,8,16,32,64"], RECIPE),
        metric="held_out_loss",
        job=plan_training(RECIPE, str(DATASETS / "images"), str(folder / "study")),
        max_trials=12,
        parallel_trials=2,
    )
    place = LocalStudies()
    *_, record = place.follow(place.submit(study).job_id)
    assert record.best, record.error
    with ThreadPoolExecutor(2) as pool:
        default = pool.submit(held_out_loss, folder / "default", {})
        again = pool.submit(held_out_loss, folder / "again", record.best.parameters)
        (folder / "losses.json").write_text(json.dumps([default.result(), again.result()]))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    folder = made_once(tmp_path_factory, "search", search)
    return Searched(LocalStudies().find(str(folder / "study")), *json.loads((folder / "losses.json").read_text()))


def test_the_best_trial_beats_the_default_recipe_and_the_worst(searched: Searched) -> None:
    """Measured with seeds 1, 2 and 3: 0.155, 0.156 and 0.155; by default 0.213; at worst 0.68, 0.30 and 0.65."""
    record = searched.record
    assert (RECIPE.learning_rate, RECIPE.rank) == (1e-4, 16)
    assert record.state == "succeeded"
    assert [trial.state for trial in record.trials] == ["succeeded"] * 12
    best, *_, worst = [record.value_of(trial) or 0.0 for trial in record.ranked]
    assert 0 < best < BETTER_THAN_DEFAULT * searched.default, f"{best}, by default {searched.default}"
    assert best < BETTER_THAN_WORST * worst, f"{best}, at worst {worst}"


def test_the_best_recipe_trained_again_is_as_good(searched: Searched) -> None:
    """What the search compared is what a run with these settings gives, to the last digit that is told."""
    assert searched.record.best
    assert searched.again == searched.record.value_of(searched.record.best)


def test_every_trial_left_its_result(searched: Searched) -> None:
    for trial in searched.record.trials:
        folder = Path(searched.record.folder_of(trial))
        assert (folder / "pytorch_lora_weights.safetensors").is_file()
        assert f"rank: {trial.parameters['rank']}\n" in (folder / "recipe.yaml").read_text()
        assert "seed: 1\n" in (folder / "recipe.yaml").read_text()
        assert [one.step for one in trial.measurements] == [20, 40]
