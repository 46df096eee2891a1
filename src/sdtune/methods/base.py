"""Method: the settings of one way of fine-tuning, declared once.

A Method is at the same time the options of the command line, the keys of the YAML recipe, the
arguments of the container and the space that a hyperparameter search may draw from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
RECIPE, MORE = "--recipe=", "--recipe-more="
"""How the arguments begin that carry the settings: the first, and those that it goes on in where it is long."""
LONGEST_ARGUMENT = 100_000
"""Characters. Linux starts no program with an argument of 131,072 bytes; a prompt may have 10,000 emoji, 12 each."""
LONGEST_RECIPE = 1_000_000
"""All arguments and the environment of a program have 2 MB together."""


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
        """The settings as the argument that the training entry point reads; several where it would be too long.

        One JSON value and not a flag per field: a prompt such as ``1``, ``null`` or ``--help`` arrives as it is. So do
        ``$(HOME)`` and ``$$``, which containers' arguments are searched for: JSON has another way to write ``$``.
        RecipeError: no program could be started with so much.
        """
        text = json.dumps(self.settings()).replace("$", "\\u0024")
        if len(text) > LONGEST_RECIPE:
            raise RecipeError(
                f"{self.name}: the settings take {len(text):,} characters as arguments of the training process, which "
                f"can have {LONGEST_RECIPE:,}; shorten the prompts or give fewer."
            )
        first, *others = (text[start : start + LONGEST_ARGUMENT] for start in range(0, len(text), LONGEST_ARGUMENT))
        return [RECIPE + first, *(MORE + other for other in others)]

    @classmethod
    def from_args(cls, args: Sequence[str]) -> Self:
        """The method that ``to_args`` was made from, with plain overrides laid over it.

        A hyperparameter search appends ``--<field>=<value>`` per tuned field after our own arguments: the later wins.
        """
        settings: dict[str, Any] = {}
        for arg in _whole(args):
            option, equals, value = arg.partition("=")
            if not option.startswith("--") or not equals:
                raise RecipeError(f"argument {_shortened(arg)!r}: wanted --recipe=JSON or --<setting>=<value>")
            if arg.startswith(RECIPE):
                settings.update(_recipe_object(value))
            else:
                settings[option.removeprefix("--").replace("-", "_")] = value
        return cls.from_settings(settings)


def recipe_in(args: Sequence[str]) -> dict[str, Any]:
    """The settings among arguments that ``to_args`` made, which may have others beside them."""
    recipe: dict[str, Any] = {}
    for arg in _whole(arg for arg in args if arg.startswith((RECIPE, MORE))):
        recipe.update(_recipe_object(arg.partition("=")[2]))
    return recipe


def _whole(args: Iterable[str]) -> list[str]:
    """``args`` with what was cut put together."""
    whole: list[str] = []
    for arg in args:
        if arg.startswith(MORE) and whole and whole[-1].startswith(RECIPE):
            whole[-1] += arg.removeprefix(MORE)
        else:
            whole.append(arg)
    return whole


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _recipe_object(text: str) -> dict[str, Any]:
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"--recipe is not JSON: {error}") from None
    if not isinstance(recipe, dict):
        raise RecipeError(f"--recipe: found {type(recipe).__name__}, wanted a JSON object of settings")
    return recipe
