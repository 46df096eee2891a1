"""Method: the settings of one way of fine-tuning, declared once.

A Method is at the same time the options of the command line, the keys of the YAML recipe, the
arguments of the container and the space that a hyperparameter search may draw from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sdtune.errors import RecipeError
from sdtune.methods.ledger import Layout
from sdtune.methods.settings import Settings

RECIPE_FILE = "recipe.yaml"
"""Written last by a run: an output folder that has it holds a finished one."""
MARK = ".sdtune"
"""Written first by a run: an output folder that has it was made by sdtune."""
HELD_OUT_LOSS = "held_out_loss"
"""The metric that all methods report: the loss on fixed noise, timesteps and pictures."""
AVERAGE_LOSS = "avr_loss"
"""What kohya's own trainer averages over the steps so far."""


@dataclass(frozen=True)
class Tunable:
    """Marks a field that a hyperparameter search may vary, with its default range, or its default values.

    when: another field, and its values under which this one matters; no condition for a method without that field.
    by_default: varied where a search names no fields.
    A frozen dataclass and not a pydantic model: inside ``Annotated`` pydantic would take the latter for a schema.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    values: tuple[str | float, ...] = ()
    when: tuple[str, tuple[str | int | bool, ...]] | None = None
    by_default: bool = False


class Method(Settings):
    """Base of all methods. A subclass adds its card (the class variables) and its fields."""

    summary: ClassVar[str]
    container: ClassVar[str]
    layout: ClassVar[Layout]
    trainer: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = (HELD_OUT_LOSS,)
    """What a run reports to a search, lower is better. The first is what a search looks at unless told."""

    @classmethod
    def help_command(cls) -> str:
        return f"sdtune train {cls.name} --help"

    def to_args(self) -> list[str]:
        """The settings as the one argument that the training entry point reads.

        One JSON value and not a flag per field: a prompt such as ``1``, ``null`` or ``--help`` arrives as it is. So do
        ``$(HOME)`` and ``$$``, which containers' arguments are searched for: JSON has another way to write ``$``.
        """
        return ["--recipe=" + json.dumps(self.settings()).replace("$", "\\u0024")]

    @classmethod
    def from_args(cls, args: Sequence[str]) -> Self:
        """The method that ``to_args`` was made from, with plain overrides laid over it.

        A hyperparameter search appends ``--<field>=<value>`` per tuned field after our own arguments: the later wins.
        """
        settings: dict[str, Any] = {}
        for arg in args:
            option, equals, value = arg.partition("=")
            if not option.startswith("--") or not equals:
                raise RecipeError(f"argument {arg!r}: wanted --recipe=JSON or --<setting>=<value>")
            if option == "--recipe":
                settings.update(_recipe_object(value))
            else:
                settings[option.removeprefix("--").replace("-", "_")] = value
        return cls.from_settings(settings)


def _recipe_object(text: str) -> dict[str, Any]:
    try:
        recipe = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"--recipe is not JSON: {error}") from None
    if not isinstance(recipe, dict):
        raise RecipeError(f"--recipe: found {type(recipe).__name__}, wanted a JSON object of settings")
    return recipe
