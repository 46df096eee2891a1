"""Which values come next: a search space as Optuna draws from it, and as a grid."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdtune.errors import RecipeError
from sdtune.jobs.search_space import Parameter, SearchSpace, Value

if TYPE_CHECKING:
    import optuna

MOST_POINTS = 100_000
"""Of a grid."""


def grid(space: SearchSpace, seed: int) -> list[dict[str, Value]]:
    """Every point of the space once, in an order of the seed's: a part of it is spread over the whole.

    RecipeError: a parameter has no steps, or there are too many points.
    """
    endless = [one.name for one in space if one.kind == "double"]
    if endless:
        raise RecipeError(
            f"tune {', '.join(endless)}: a grid needs values, such as 1e-5,1e-4,1e-3, not a range of numbers."
        )
    sides = [one.values or tuple(range(int(one.low), int(one.high) + 1)) for one in space]
    size = math.prod(map(len, sides))
    if size > MOST_POINTS:
        raise RecipeError(f"tune: a grid of {size:,} points, wanted at most {MOST_POINTS:,}; name fewer values.")
    names = [one.name for one in space]
    # Points that differ in what does not matter are one.
    points = {
        json.dumps(active): active
        for values in itertools.product(*sides)
        if (active := space.active(dict(zip(names, values, strict=True))))
    }
    found = list(points.values())
    random.Random(seed).shuffle(found)
    return found


def suggest(trial: optuna.Trial, parameter: Parameter) -> Value:
    """A value of the parameter, by its scale."""
    name, low, high = parameter.name, parameter.low, parameter.high
    log = parameter.scale != "linear"
    if parameter.kind == "categorical":
        return str(trial.suggest_categorical(name, parameter.values))
    if parameter.kind == "discrete":
        # By its place in the row: each is as likely as the others, and neighbours are near.
        return parameter.values[trial.suggest_int(_name(parameter), 0, len(parameter.values) - 1)]
    found: float
    if parameter.kind == "integer":
        found = trial.suggest_int(_name(parameter), int(low), int(high), log=log)
    else:
        found = trial.suggest_float(_name(parameter), low, high, log=log)
    if parameter.scale == "reverse-log":
        # The logarithm's fine end is at the top: drawn there, and turned over. Rounding must not leave the bounds.
        found = min(max(low + high - found, low), high)
    return int(found) if parameter.kind == "integer" else found


def _name(parameter: Parameter) -> str:
    """What Optuna calls it: by its own name only where it has its own values."""
    if parameter.kind == "discrete":
        return f"{parameter.name} (place)"
    return f"{parameter.name} (reversed)" if parameter.scale == "reverse-log" else parameter.name


def as_suggested(space: SearchSpace, values: Mapping[str, Value]) -> dict[str, Any]:
    """Values as Optuna is to draw them."""
    drawn: dict[str, Any] = {}
    for name, value in values.items():
        parameter = space[name]
        if parameter.kind == "discrete":
            value = parameter.values.index(value)
        elif parameter.scale == "reverse-log":
            value = int(parameter.low + parameter.high) - int(value)
        drawn[_name(parameter)] = value
    return drawn
