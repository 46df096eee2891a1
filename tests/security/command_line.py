"""The command line as a user meets it, in this process: what it says, and what it ends with."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

from sdtune.cli.app import main
from tests.conftest import ROOT

TABLE = frozenset(
    int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
)
"""The documented exit codes."""
OURS = TABLE - {1}
"""Those that say what went wrong: 1 is for a terminal that is gone, and for what nobody foresaw."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. said: all of standard output and error."""

    code: int
    said: str


def sdtune(*words: str) -> Ended:
    """Run a command; an exception that is no exit is the caller's to see."""
    # In UTF-8, as PYTHONUTF8 and every terminal of today have it, and as strict as they are.
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    code = 0
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            mock.patch.object(sys, "argv", ["sdtune", *words]),
        ):
            try:
                main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out.flush()
    return Ended(code, out.buffer.getvalue().decode())  # type: ignore[attr-defined]


def ends_well(words: Sequence[str], allowed: frozenset[int] = OURS) -> Ended:
    """Run it, and hold it to what every command promises: a documented exit code, a reason, never a traceback."""
    ended = sdtune(*words)
    assert ended.code in allowed, (ended, words)
    assert "Traceback" not in ended.said, (ended.said, words)
    assert "mistake of sdtune's own" not in ended.said, (ended.said, words)
    if ended.code:
        assert ended.said.strip(), words
    return ended
