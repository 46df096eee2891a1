"""What cells say, as lines of standard output while it comes; of a line that is redrawn, its state now and then."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdtune import events

SECONDS_BETWEEN_STATES = 10.0
"""Of a progress bar, which redraws its line many times a second."""
LONGEST_LINE = 8000
"""Characters. An entry of Cloud Logging has 256 KB; the notebook keeps all."""
_COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_NO_TEXT = re.compile(r"<[^<>]*>")
"""``<Figure size 640x480 with 1 Axes>``: what stands in for what has no text."""


def say(line: str) -> None:
    """One line. What a cell prints is never an event of the run, even if it looks like one."""
    line = _COLOURS.sub("", line)
    if len(line) > LONGEST_LINE:
        line = f"{line[:LONGEST_LINE]} ... ({len(line) - LONGEST_LINE:,} characters more in the notebook)"
    text = line if events.parse(line) is None else events.to_line(events.Note(line))
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Lines:
    """The messages of a kernel as lines. clock: in seconds."""

    def __init__(self, say: Callable[[str], None] = say, clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._open: dict[str, str] = {}
        self._states: dict[str, tuple[float, Sequence[str]]] = {}

    def take(self, kind: str, content: Mapping[str, Any]) -> None:
        """One message: its type and content, as Jupyter's protocol has them."""
        if kind == "stream":
            self._stream(str(content.get("name")), str(content.get("text", "")))
        elif kind in ("execute_result", "display_data"):
            self._shown(content)
        elif kind == "update_display_data":
            self._state("display", _plain(content).splitlines())
        elif kind == "error":
            self.end()
            for block in content.get("traceback") or [f"{content.get('ename')}: {content.get('evalue')}"]:
                for line in str(block).splitlines():
                    self._say(line)

    def end(self) -> None:
        """A cell is over: what stands in an unfinished line is said."""
        for line in self._open.values():
            if left := line.rstrip("\r"):
                self._say(left)
        self._open.clear()
        self._states.clear()

    def _stream(self, name: str, text: str) -> None:
        *lines, rest = (self._open.get(name, "") + text).replace("\r\n", "\n").split("\n")
        for line in lines:
            self._say(line.rpartition("\r")[2])
        # A redrawn line is kept from its last beginning alone. At its end, the next text takes its place.
        drawn = [part for part in rest.split("\r") if part]
        self._open[name] = (drawn[-1] if drawn else "") + ("\r" if rest.endswith("\r") else "")
        if "\r" in rest and drawn:
            self._state(name, [drawn[-1]])

    def _shown(self, content: Mapping[str, Any]) -> None:
        self.end()
        text = _plain(content)
        if not text and any(str(kind).startswith("image/") for kind in content.get("data") or ()):
            text = "(a picture)"
        for line in text.splitlines():
            self._say(line)

    def _state(self, name: str, lines: Sequence[str]) -> None:
        """What is new in it, if it is time to say it."""
        now, (due, said) = self._clock(), self._states.get(name, (0.0, []))
        if now >= due and (new := [line for line in lines if line not in said]):
            self._states[name] = (now + SECONDS_BETWEEN_STATES, lines)
            for line in new:
                self._say(line)


def _plain(content: Mapping[str, Any]) -> str:
    """What a shown thing says in words; nothing for what only a picture or a browser shows."""
    data = content.get("data")
    text = data.get("text/plain") if isinstance(data, dict) else None
    if not isinstance(text, str) or (len(data or ()) > 1 and _NO_TEXT.fullmatch(text.strip())):
        return ""
    return text
