"""One entry of Cloud Logging as lines of log: what was said, by which replica, when, and how bad it is.

Shape of a container's entry: viamrobotics/api issue 534. Vertex AI marks all that a container writes to standard error
as ERROR (GoogleCloudPlatform/vertex-ai-samples issue 242), so that severities are told from the text. An event of the
run stays the text that it arrives as.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sdtune.jobs.backend import LogLine

Entry = Mapping[str, Any]

_REPLICA = re.compile(r"workerpool\d+-\d+")
_SERVICE = {"WARNING": "warning", "ERROR": "error", "CRITICAL": "error", "ALERT": "error", "EMERGENCY": "error"}
"""Severities of Vertex AI's own messages, which can be trusted."""

_RANK = re.compile(r"\[rank\d+\]:\s?")
_PROGRESS_BAR = re.compile(r"[^|]{0,80}?\d{1,3}%\|")
_CONTINUED = re.compile(r"\s+\S")
_TRACEBACK = "Traceback (most recent call last)"

_SEVERITIES = {
    **dict.fromkeys(("ERROR", "CRITICAL", "FATAL", "SEVERE", "E", "F", "C"), "error"),
    **dict.fromkeys(("WARNING", "WARN", "W"), "warning"),
    **dict.fromkeys(("INFO", "DEBUG", "NOTICE", "TRACE", "I", "D"), "info"),
}
_WORD = "|".join(word for word in _SEVERITIES if len(word) > 1)
# 2026-11-25 10:00:00,123 - | [11/25/2026 10:00:00] | 10:00:00.123456:
_WHEN = re.compile(r"\[?\d[\dT/:.,+Z -]{6,40}\]?[\s:|-]*")
# WARNING: | [INFO] | INFO - | warning: | glog's E0101 10:00:00
_LEVEL = re.compile(
    rf"[\[<(]?(?:({_WORD})(?=[\]>)]|\s*[:|]|\s+-|\s\s|$)|((?i:{_WORD}))(?=:\s)|([EFCWID])(?=\d{{4}}\s))"
)
# After a time: WARNING ... | name - WARNING | W tensorflow/
_DATED_LEVEL = re.compile(rf"(?:[\[(]?[\w.]{{1,60}}[\])]?[\s:|-]+)??[\[<(]?(?:({_WORD})\b|([EFCWID])\s)")
_SAYS = (
    # lib/x.py:12: FutureWarning: ... before the names of errors, which have no path.
    ("warning", re.compile(r"(?:.{0,300}?:\d+: )?(?:\w+\.)*\w*Warning: ")),
    ("error", re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt|ExceptionGroup)(?::|$)")),
    ("error", re.compile(r"During handling of the above exception|The above exception was the direct cause")),
    ("error", re.compile(r"Segmentation fault|Bus error|Killed$|Aborted \(core|terminate called after throwing")),
)


class EntryReader:
    """Entries, in the order in which they are shown, as lines.

    It remembers for every stream whether a traceback is under way, because its lines may be entries of their own.
    """

    def __init__(self) -> None:
        self._above: dict[tuple[str, str], str] = {}

    def lines(self, entry: Entry) -> list[LogLine]:
        """The lines in ``entry``, at least one."""
        replica = replica_of(entry)
        time = datetime.fromisoformat(entry["timestamp"])
        severity = str(entry.get("severity", "DEFAULT"))
        if not replica:
            said = _SERVICE.get(severity, "info")
            return [LogLine(text, said, time) for text in texts_of(entry)]
        # Standard output and error are told apart by nothing else.
        stream = (replica, severity)
        return [LogLine(text, self._grade(stream, text), time, replica) for text in texts_of(entry)]

    def _grade(self, stream: tuple[str, str], text: str) -> str:
        if text.startswith("{"):
            return "info"
        if text.startswith("[rank"):
            text = _RANK.sub("", text, count=1)
        above = self._above.get(stream, "")
        if _TRACEBACK in text:
            self._above[stream] = _TRACEBACK
            return "error"
        # What is indented belongs to what stands above it: a traceback's frames, the source line of a warning.
        if above and _CONTINUED.match(text) and not _PROGRESS_BAR.match(text):
            return "error" if above is _TRACEBACK else above
        severity = "error" if above is _TRACEBACK and text.strip() else grade(text)
        self._above[stream] = severity if severity != "info" else ""
        return severity


def grade(text: str) -> str:
    """``info``, ``warning`` or ``error``, by what a line says of itself, in its beginning."""
    text = text[:300]
    when = _WHEN.match(text)
    level = _LEVEL.match(text, when.end() if when else 0) or (when and _DATED_LEVEL.match(text, when.end()))
    if level:
        return _SEVERITIES[level[level.lastindex or 1].upper()]
    return next((severity for severity, pattern in _SAYS if pattern.match(text)), "info")


def replica_of(entry: Entry) -> str:
    """The replica that wrote ``entry``, such as ``workerpool0-0``; empty for messages of Vertex AI itself."""
    task = _at(entry, "jsonPayload", "attrs", "tag") or _at(entry, "resource", "labels", "task_name")
    return task if isinstance(task, str) and _REPLICA.fullmatch(task) else ""


def _at(value: Any, *names: str) -> Any:
    """What is there under these names; None where it is none of our kind. Programs print JSON of any shape."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def texts_of(entry: Entry) -> list[str]:
    """What ``entry`` says, line by line, at least one. Of a progress bar that was redrawn, its last state."""
    payload = entry.get("jsonPayload")
    message = payload.get("message", payload) if isinstance(payload, dict) and payload else entry.get("textPayload", "")
    text = message if isinstance(message, str) else json.dumps(message)
    return [_last_drawn(line) if "\r" in line else line for line in text.removesuffix("\n").split("\n")]


def _last_drawn(line: str) -> str:
    return next((frame for frame in reversed(line.split("\r")) if frame.strip()), "")
