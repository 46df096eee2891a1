"""Settings: what a user may set somewhere, declared once: type, bound, help, default.

The fields of one are options of the command line and keys of a YAML file alike.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from sdtune.errors import RecipeError


class Settings(BaseModel):
    """Base of everything that is set. name: whose settings these are, for messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    name: ClassVar[str]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """These settings. RecipeError lists every mistake at once."""
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise RecipeError(cls._explain(error.errors())) from None

    def settings(self) -> dict[str, Any]:
        """Every field with its value, as JSON and YAML know values."""
        return self.model_dump(mode="json")

    @classmethod
    def help_command(cls) -> str:
        """The command that lists them."""
        return "sdtune train METHOD --help"

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
            hint = f"did you mean {near[0]}?" if near else f"see {cls.help_command()}."
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
NOT_YAML = (
    yaml.YAMLError, RecursionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip
"""What PyYAML raises: ValueError of a date such as 2026-13-01, and others of tags such as !!int on what is none."""
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


LARGEST_FILE, MOST_VALUES = 2**24, 100_000
"""Bytes, and values in them, of a file of settings: a hundred prompts of 10,000 letters are 4 MB."""


def _shorten(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_values(found: Any, what: str) -> None:
    """RecipeError: there are more values, at any depth, than anybody writes. YAML's aliases make many of few lines."""
    count, waiting = 0, [found]
    while waiting:
        one = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise RecipeError(f"{what} holds more than {MOST_VALUES:,} values, or one that holds itself (&, *).")
        if isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set):
            waiting += one


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Lines ``setting: value`` that ``read_settings`` reads as they are; letters as people write them where it can."""
    plain = dict(settings)
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    try:
        same = yaml.safe_load(text) == plain
    except yaml.YAMLError:
        same = False
    # Of letters such as U+0085 and U+2028 PyYAML would make line breaks when it reads them.
    return text if same else str(yaml.safe_dump(plain, sort_keys=False))


def read_settings(path: Path, role: str) -> dict[str, Any]:
    """The lines ``setting: value`` of a YAML file. RecipeError if it is none; role: what it is to the user."""
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST_FILE + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{role}: {path} cannot be read: {error}") from None
    if len(data) > LARGEST_FILE:
        raise RecipeError(f"{role}: {path} is larger than {LARGEST_FILE // 2**20} MB; wanted lines `setting: value`.")
    try:
        found = yaml.safe_load(text)
    except NOT_YAML as error:
        raise RecipeError(f"{role}: {path} is not YAML: {error}") from None
    if found is None:
        return {}
    check_values(found, f"{role}: {path}")
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise RecipeError(f"{role}: {path} holds a {type(found).__name__}; wanted lines of the form `setting: value`.")
    return found
