"""What a function was given, as the settings that commands read."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdtune.commands.gathering import read_config
from sdtune.errors import RecipeError
from sdtune.methods.catalog import find_method
from sdtune.methods.fields import CommonFields
from sdtune.methods.ledger import Ledger
from sdtune.methods.settings import Settings

Place = str | os.PathLike[str]
Config = Place | Mapping[str, Any]
FINDINGS_SHOWN = 3


def plain(value: Any) -> Any:
    """Paths as text, sequences as lists, as YAML has them."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def checked(given: Mapping[str, Any], *settings: type[Settings]) -> dict[str, Any]:
    """``given`` with paths as text. RecipeError: none of ``settings`` has a setting of such a name.

    That none is overlooked is checked here: each of the commands' parts takes out of the whole what is its own.
    """
    known = [name for one in settings for name in one.model_fields]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see {settings[0].help_command()}."
            raise RecipeError(f"{name}: {settings[0].name} has no such setting; {hint}")
    return {name: plain(value) for name, value in given.items()}


def recipe_of(config: Config | None, method: type[CommonFields]) -> dict[str, Any]:
    """A recipe's settings, from a file or as they are. RecipeError: it is one of another method."""
    if not isinstance(config, Mapping):
        return read_config(None if config is None else Path(config).expanduser(), method)
    recipe = dict(config)
    named = str(recipe.pop("method", method.name))
    if find_method(named) is not method:
        raise RecipeError(f"config: is a recipe of {named}; train it as that: sdtune.train({named!r}, config=...)")
    return recipe


def as_text(place: Place | None) -> str | None:
    """A path or an address as text."""
    return None if place is None else os.fspath(place)


def warnings_of(ledger: Ledger | None) -> list[str]:
    """What the check of a dataset warns of, the first few in full."""
    found = ledger.warnings if ledger else ()
    told = [f"{finding.path}: {finding.message}".removeprefix(": ") for finding in found[:FINDINGS_SHOWN]]
    more = len(found) - FINDINGS_SHOWN
    return [*told, f"... and {more} more warnings; sdtune validate shows them all"] if more > 0 else told
