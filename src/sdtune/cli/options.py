"""From a Method's fields to options of the command line: the only reflection in the product."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from sdtune.methods.fields import PublishFields
from sdtune.methods.settings import Settings

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}


def parameters_of(settings: type[Settings], taken: set[str]) -> list[inspect.Parameter]:
    """One keyword parameter per field. None stands for "not typed", so that a recipe's value is not hidden.

    Values stay text: the Settings parse them, and so report all mistakes together, wherever they were made.
    taken: names of the command's other options, which no field may carry.
    """
    clash = taken & set(settings.model_fields)
    if clash:
        raise TypeError(f"{settings.__name__}: fields {sorted(clash)} are named like other options of the command")
    # What is trained first, where it is shown last.
    fields = sorted(settings.model_fields.items(), key=lambda field: field[0] in PublishFields.model_fields)
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(settings, name, info))
        for name, info in fields
    ]


def own_parameters(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[inspect.Parameter]:
    """One keyword parameter per option of the command itself; None is the default where ``defaults`` has no other."""
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=option, default=defaults.get(name))
        for name, option in options.items()
    ]


def _option(settings: type[Settings], name: str, info: FieldInfo) -> Any:
    kind = _plain(info.annotation)
    shown = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    help_text = info.description or ""
    if info.is_required():
        help_text += "  [required]"
    elif info.default not in (None, (), ""):
        help_text += f"  [default: {shown.get('default') or _shown(info.default)}]"
    if kind is bool:
        flag = settings.flag(name)
        switches = f"{flag}/{flag.replace('--', '--no-', 1)}"
        return Annotated[bool | None, typer.Option(switches, help=help_text, show_default=False)]
    repeated = typing.get_origin(kind) is tuple
    metavar = str(shown.get("metavar") or _metavar(kind))
    option = typer.Option(settings.flag(name), help=help_text, metavar=metavar, show_default=False)
    return Annotated[list[str] | None, option] if repeated else Annotated[str | None, option]


def _plain(annotation: Any) -> Any:
    """The type under ``| None`` and Annotated."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return next(_plain(part) for part in typing.get_args(annotation) if part is not type(None))
    return _plain(typing.get_args(annotation)[0]) if origin is Annotated else annotation


def _metavar(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return "[" + "|".join(map(str, typing.get_args(kind))) + "]"
    return "TEXT" if origin is tuple else _METAVARS.get(kind, "TEXT")


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    if isinstance(default, bool):
        return "yes" if default else "no"
    return str(default)
