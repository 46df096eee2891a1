"""Screens: where a run is shown, a cell of a notebook or lines of text."""

from __future__ import annotations

import base64
import sys
import time
from typing import Any, Protocol

SECONDS_BETWEEN_UPDATES = 0.5
SECONDS_BETWEEN_LINES = 10.0


class Showable(Protocol):
    """What can be shown as a whole, again and again."""

    def as_html(self) -> str:
        """The state of now."""

    def as_text(self) -> str:
        """The same in a few lines."""

    def as_picture(self) -> bytes | None:
        """A JPEG to stand below it; None where there is none."""


class Screen(Protocol):
    def begin(self, shown: Showable) -> None:
        """Before anything was started."""

    def line(self, text: str, *, seldom: bool = False) -> None:
        """Something was said. seldom: so often that only some of it is worth a line."""

    def change(self, shown: Showable, *, at_once: bool = False) -> None:
        """Something is otherwise than before."""

    def end(self, shown: Showable) -> None:
        """For the last time."""


def open_screen(show: bool) -> Screen:
    """The screen of whoever called; one that shows nothing if not ``show``."""
    if not show:
        return Dark()
    return Cell() if in_notebook() else Lines()


def in_notebook() -> bool:
    """Whether a cell of a notebook is there to show something in."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class Dark:
    """Shows nothing."""

    def begin(self, shown: Showable) -> None: ...

    def line(self, text: str, *, seldom: bool = False) -> None: ...

    def change(self, shown: Showable, *, at_once: bool = False) -> None: ...

    def end(self, shown: Showable) -> None: ...


class Lines:
    """A line for each thing that is said, on standard output."""

    def __init__(self) -> None:
        self._next = 0.0

    def begin(self, shown: Showable) -> None:
        self.line(shown.as_text())

    def line(self, text: str, *, seldom: bool = False) -> None:
        if seldom and time.monotonic() < self._next:
            return
        if seldom:
            self._next = time.monotonic() + SECONDS_BETWEEN_LINES
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def change(self, shown: Showable, *, at_once: bool = False) -> None: ...

    def end(self, shown: Showable) -> None:
        self.line(shown.as_text())


class Cell:
    """An output of the cell that is drawn over, and a picture below it. What it shows last is what the notebook keeps.

    The thread of a run may show while another cell works, or none: an output is found by its own name.
    """

    def __init__(self) -> None:
        self._page: Any = None
        self._picture: Any = None
        self._drawn: bytes | None = None
        self._next = 0.0

    def begin(self, shown: Showable) -> None:
        from IPython.display import display as untyped

        display: Any = untyped
        # Now, in the cell that was run: what a thread shows first would land in whichever works then.
        self._page = display(*_bundle(shown), raw=True, display_id=True)
        self._picture = display({"text/plain": ""}, raw=True, display_id=True)

    def line(self, text: str, *, seldom: bool = False) -> None: ...

    def change(self, shown: Showable, *, at_once: bool = False) -> None:
        if not at_once and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SECONDS_BETWEEN_UPDATES
        self._update(shown)

    def end(self, shown: Showable) -> None:
        self._update(shown)

    def _update(self, shown: Showable) -> None:
        self._page.update(*_bundle(shown), raw=True)
        picture = shown.as_picture()
        if picture and picture != self._drawn:
            self._drawn = picture
            self._picture.update({"image/jpeg": base64.b64encode(picture).decode(), "text/plain": "samples"}, raw=True)


def _bundle(shown: Showable) -> tuple[dict[str, str]]:
    return ({"text/html": shown.as_html(), "text/plain": shown.as_text()},)
