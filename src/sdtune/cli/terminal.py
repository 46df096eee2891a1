"""Screen: rich's console, for text that others wrote: nothing in it is an order to the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_COLOUR = re.compile(r"(?:\x1b\[|\x9b)[\d;:]*m")
"""What libraries colour their lines of log with."""


class Screen(Console):
    """Lines of log, names of files and answers of servers are shown as they are, but what a terminal would obey.

    Without that a line of log could set the window's title, or hide what stands above it.
    """

    def __init__(self, **options: Any) -> None:
        # A prompt such as ":cat:" is no picture of a cat.
        super().__init__(**{"highlight": False, "soft_wrap": True, "emoji": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of ``renderable``; rich's own orders are segments of another kind."""
        for segment in super().render(renderable, options):
            harmless = segment.control or segment.text.isprintable()
            yield segment if harmless else Segment(obeyed_by_nobody(segment.text), segment.style)


def obeyed_by_nobody(text: str) -> str:
    r"""``text`` without its colours, its other control characters by their numbers: ``\x1b``."""
    text = _COLOUR.sub("", text)
    return "".join(
        letter if letter.isprintable() or letter in "\n\t " or not _is_control(letter) else ascii(letter)[1:-1]
        for letter in text
    )


def _is_control(letter: str) -> bool:
    """C0, DEL, C1, the separators of lines, and what turns the direction of a text around; half characters too."""
    code = ord(letter)
    return (
        code < 0x20 or 0x7F <= code < 0xA0 or code in (0x2028, 0x2029, 0x200E, 0x200F) or 0x202A <= code <= 0x202E
        or 0x2066 <= code <= 0x2069 or 0xD800 <= code < 0xE000
    )  # fmt: skip
