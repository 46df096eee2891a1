"""Durations as people write them: ``90m``, ``24h``, ``2d``, ``3600s``."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_duration(value: Any) -> Any:
    """Whole seconds. ValueError if ``value`` is a text that is no duration; anything but a text as it is."""
    if not isinstance(value, str):
        return value
    written = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", value.strip().lower())
    if not written:
        raise ValueError(f"found {value!r}, wanted a duration such as 90m, 24h or 2d.")
    return round(float(written[1]) * _SECONDS[written[2]])


def show_duration(seconds: int) -> str:
    """``86400`` as ``24h``: the shortest that parse_duration takes back."""
    for unit in ("h", "m"):
        if seconds and seconds % _SECONDS[unit] == 0:
            return f"{seconds // _SECONDS[unit]}{unit}"
    return f"{seconds}s"


Duration = Annotated[int, BeforeValidator(parse_duration)]
"""Seconds."""
