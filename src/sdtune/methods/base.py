"""Method: the settings of one way of fine-tuning, declared once.

A Method is at the same time the options of the command line, the keys of the YAML recipe, the
arguments of the container and the space that a hyperparameter search may draw from.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from sdtune.errors import RecipeError
from sdtune.methods.ledger import Layout

RECIPE_FILE = "recipe.yaml"
"""Written last by a run: an output folder that has it holds a finished one."""
MARK = ".sdtune"
"""Written first by a run: an output folder that has it was made by sdtune."""


@dataclass(frozen=True)
class Tunable:
    """Marks a field that a hyperparameter search may vary, with its default range.

    A frozen dataclass and not a pydantic model: inside ``Annotated`` pydantic would take the latter for a schema.
    """

    low: float
    high: float
    log: bool = False


class Method(BaseModel):
    """Base of all methods. A subclass adds its card (the class variables) and its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    name: ClassVar[str]
    summary: ClassVar[str]
    container: ClassVar[str]
    layout: ClassVar[Layout]
    trainer: ClassVar[str]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The method with these settings. RecipeError lists every mistake at once."""
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise RecipeError(cls._explain(error.errors())) from None

    def settings(self) -> dict[str, Any]:
        """Every field with its value, as JSON and YAML know values."""
        return self.model_dump(mode="json")

    def to_args(self) -> list[str]:
        """The settings as the one argument that the training entry point reads.

        One JSON value and not a flag per field: a prompt such as ``1``, ``null`` or ``--help`` arrives as it is.
        """
        return [f"--recipe={json.dumps(self.settings())}"]

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

    @classmethod
    def flag(cls, field: str) -> str:
        """How the command line spells ``field``."""
        return "--" + field.replace("_", "-")

    @classmethod
    def _explain(cls, errors: Iterable[ErrorDetails]) -> str:
        lines: dict[str, str] = {}
        for error in errors:
            field = str(error["loc"][0]) if error["loc"] else ""
            lines.setdefault(field, f"  {cls._mistake(field, error)}")
        head = "this setting cannot be used" if len(lines) == 1 else f"these {len(lines)} settings cannot be used"
        return f"{cls.name}: {head}:\n" + "\n".join(lines.values())

    @classmethod
    def _mistake(cls, field: str, error: ErrorDetails) -> str:
        """One mistake: which setting, what was found, what is allowed, what to do."""
        if error["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, cls.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see sdtune train {cls.name} --help."
            return f"{field}: {cls.name} has no such setting; {hint}"
        if error["type"] == "missing":
            info = cls.model_fields[field]
            return f"{field}: missing; give {cls.flag(field)}. {info.description}"
        if error["type"] == "value_error":
            return f"{field}: {error['ctx']['error']}"
        return f"{field}: found {_shorten(error['input'])}, wanted {cls.allowed(field)}."

    @classmethod
    def allowed(cls, field: str) -> str:
        """What a field accepts, in words: ``a number greater than 0``, ``no or fp16 or bf16``."""
        info = cls.model_fields[field]
        kind = _kind(info.annotation)
        bounds = []
        for limit in info.metadata:
            for sign, words in _BOUNDS.items():
                if getattr(limit, sign, None) is not None:
                    bounds.append(words.format(getattr(limit, sign)))
        return " ".join([kind, " and ".join(bounds)]).strip()


_BOUNDS = {
    "gt": "greater than {}",
    "ge": "of at least {}",
    "lt": "less than {}",
    "le": "at most {}",
    "multiple_of": "in steps of {}",
    "min_length": "of at least {} characters",
    "max_length": "of at most {} characters",
}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _kind(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " or ".join(map(str, typing.get_args(annotation)))
    if origin is tuple:
        return "a list, each " + _kind(typing.get_args(annotation)[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_kind(part) for part in typing.get_args(annotation) if part is not type(None))
    if origin is typing.Annotated:
        return _kind(typing.get_args(annotation)[0])
    return _KINDS.get(annotation, str(annotation))


def _shorten(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _recipe_object(text: str) -> dict[str, Any]:
    try:
        recipe = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"--recipe is not JSON: {error}") from None
    if not isinstance(recipe, dict):
        raise RecipeError(f"--recipe: found {type(recipe).__name__}, wanted a JSON object of settings")
    return recipe
