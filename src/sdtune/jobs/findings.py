"""Check and Finding: a question about what jobs need, and its answer with the commands that mend what is bad."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Grade = Literal["good", "warning", "bad", "unasked"]
"""warning: also what could not be asked; unasked: what nobody needs, or what makes no sense before something else."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An answer. text: one line; commands: to copy, as they are; note: what else should be known, one line."""

    grade: Grade
    text: str
    commands: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A question. needs: names of checks that come first, and without which it is not asked; they stand before it."""

    name: str
    ask: Callable[[], Finding]
    needs: tuple[str, ...] = ()
