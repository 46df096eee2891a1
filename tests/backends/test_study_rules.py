"""What is tried next, and what is not worth its end: the rules of a search on this machine, without processes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import optuna
import pytest

from sdtune.backends.local.sampling import grid, suggest
from sdtune.backends.local.stopping import has_no_chance, worse_than_median
from sdtune.errors import RecipeError
from sdtune.jobs.search_space import Parameter, SearchSpace
from tests.backends.test_local_studies import RATE


def curves(*ends: float) -> list[dict[int, float]]:
    """Each falls by 1 on its way to its end."""
    return [{10: end + 1, 20: end} for end in ends]


def test_the_median_is_of_averages_up_to_the_same_step() -> None:
    """At 10 they are 2, 3, 4, 5; up to 20, on average, 1.5, 2.5, 3.5, 4.5."""
    ended = curves(1, 2, 3, 4)
    assert worse_than_median({10: 3.6}, ended, "minimize")
    assert not worse_than_median({10: 3.4}, ended, "minimize")
    assert not worse_than_median({15: 3.4}, ended, "minimize")
    assert worse_than_median({10: 9.0, 20: 3.1}, ended, "minimize")
    assert not worse_than_median({10: 2.9, 20: 9.0}, ended, "minimize"), "its best counts"
    assert worse_than_median({10: 3.4}, ended, "maximize")
    assert not worse_than_median({10: 3.6}, ended, "maximize")
    assert not worse_than_median({10: 99.0}, ended[:3], "minimize"), "too few to judge by"
    assert not worse_than_median({5: 99.0}, ended, "minimize"), "nothing is known of the others then"


def test_a_chance_is_what_the_others_still_gained() -> None:
    ended = [{10: 2.0, 20: 1.0}, {10: 3.0, 20: 1.8}, {10: 4.0, 20: 3.2}, {10: 5.0, 20: 4.0}]
    # They gained 1.0 with a deviation of 0.16, so 2.2 will be 1.2 give or take that: 11 in 100 to reach 1.0.
    assert not has_no_chance({10: 2.2}, ended, "minimize")
    assert has_no_chance({10: 2.4}, ended, "minimize")
    assert has_no_chance({10: 4.0}, ended, "maximize")
    assert not has_no_chance({10: 4.9}, ended, "maximize")
    assert not has_no_chance({10: 99.0}, ended[:3], "minimize")
    assert has_no_chance({10: 2.1}, curves(1, 2, 3, 4), "minimize"), "all gained the same"
    assert not has_no_chance({10: 2.0}, curves(1, 2, 3, 4), "minimize")


def test_a_grid_too_large_is_refused() -> None:
    many = Parameter("rank", "integer", low=1, high=500)
    with pytest.raises(RecipeError, match="a grid of 250,000 points, wanted at most 100,000"):
        grid(SearchSpace((many, replace(many, name="seed"))), 0)


@pytest.mark.parametrize("algorithm", ["random", "default"])
def test_scales_bounds_and_conditions_are_kept(algorithm: str) -> None:
    space = (
        RATE,
        Parameter("lora_dropout", "double", low=0.01, high=0.9, scale="reverse-log"),
        Parameter("rank", "integer", low=4, high=64, scale="log"),
        Parameter("train_batch_size", "integer", low=1, high=100, scale="reverse-log"),
        Parameter("conv_rank", "discrete", values=(4, 8, 100)),
        Parameter("optimizer", "categorical", values=("adamw", "lion")),
    )
    sampler = optuna.samplers.RandomSampler(1) if algorithm == "random" else optuna.samplers.TPESampler(seed=1)
    drawing = optuna.create_study(sampler=sampler)
    drawn: dict[str, list[Any]] = {one.name: [] for one in space}
    for _ in range(300):
        trial = drawing.ask()
        for one in space:
            drawn[one.name].append(suggest(trial, one))
        drawing.tell(trial, 1.0)
    for one in space:
        values = drawn[one.name]
        if one.values:
            assert set(values) == set(one.values)
        else:
            assert all(one.low <= value <= one.high for value in values)
            assert {type(value) for value in values} == {int if one.kind == "integer" else float}
    if algorithm == "random":
        # Half of the values lie below the middle of the scale: the geometric mean, or its mirror image.
        assert sum(rate < 1e-3 for rate in drawn["learning_rate"]) == pytest.approx(150, abs=35)
        assert sum(rank < 16 for rank in drawn["rank"]) == pytest.approx(150, abs=35)
        mirrored = 0.91 - math.sqrt(0.009)
        assert sum(value < mirrored for value in drawn["lora_dropout"]) == pytest.approx(150, abs=35)
        assert sum(value < 91 for value in drawn["train_batch_size"]) == pytest.approx(150, abs=35)
        assert sum(value == 100 for value in drawn["conv_rank"]) == pytest.approx(100, abs=35)
