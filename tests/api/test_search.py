"""sdtune.hpo on this machine: followed to its best trial, stopped from another thread, taken up again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sdtune
from sdtune.errors import JobError, RecipeError
from tests.api.test_train import until


def searched(folder: Path, pictures: Path, settings: dict[str, Any], **more: Any) -> sdtune.api.Search:
    given = {name: value for name, value in settings.items() if name not in ("learning_rate", "rank")}
    given |= {"num_samples": 0, "max_train_steps": 2, "tune": ["learning_rate=1e-4:1e-2:log", "rank=2,4"]}
    return sdtune.hpo("dreambooth-lora", dataset=pictures, output=folder, max_trials=2, **given | more)


def test_a_search_is_stopped_taken_up_again_and_its_best_known(
    pictures: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, images = tmp_path / "search", pictures()
    planned = searched(folder, images, settings, dry_run=True)
    assert planned.state == "planned"
    assert "--trials" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="max_trails: dreambooth-lora has no such setting; did you mean max_trials"):
        sdtune.hpo("dreambooth-lora", max_trails=1)  # type: ignore[call-arg]

    search = searched(folder, images, settings, wait=False, show=False, parallel_trials=1)
    until(lambda: any(trial.state == "active" for trial in search.trials))
    search.cancel()
    with pytest.raises(JobError, match="the search search was cancelled"):
        search.result()
    assert search.state == "cancelled"

    search = searched(folder, images, settings, parallel_trials=1)
    assert search.state == "succeeded"
    assert "search on this machine" in capsys.readouterr().out
    values = [search.value_of(trial) for trial in search.trials if trial.state == "succeeded"]
    assert len(values) == 2
    best = search.result()
    assert search.value_of(best) == min(value for value in values if value is not None)
    assert (Path(search.output_of(best)) / "pytorch_lora_weights.safetensors").is_file()
    recipe = search.recipe()
    assert recipe["learning_rate"] == best.parameters["learning_rate"]
    run = sdtune.train("dreambooth-lora", config=recipe, dry_run=True, show=False)
    assert run.output == str(folder / "best")
    assert search.picture().width > 300
    assert "★" in search.as_html()

    found = sdtune.find_search(folder)
    assert (found.state, found.result().id) == ("succeeded", best.id)
    with pytest.raises(JobError, match="no search is kept in"):
        sdtune.find_search(tmp_path)
