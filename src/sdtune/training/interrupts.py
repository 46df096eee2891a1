"""Stopping a run: SIGTERM and Ctrl-C unwind it, but never in the middle of a library's locks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_held = False
_wanted = False


def listen() -> None:
    """From now on both signals raise KeyboardInterrupt in the main thread, so that what is open is closed."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)


@contextmanager
def held() -> Iterator[None]:
    """A signal that comes inside the block is obeyed at its end.

    TensorBoard hands events to a thread of its own; an exception inside that handing over can lose the wake-up of the
    thread, and closing the file then waits for its next flush, two minutes.
    """
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False
    if _wanted:
        raise KeyboardInterrupt


def _interrupt(signal_number: int, frame: object) -> None:
    global _wanted
    _wanted = True
    if not _held:
        raise KeyboardInterrupt
