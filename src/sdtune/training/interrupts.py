"""Stopping a run: SIGTERM and Ctrl-C unwind it, but never in the middle of a step or of a library's locks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from sdtune.errors import INTERRUPTED, TERMINATED

_holders = 0
_came: int | None = None


def listen() -> None:
    """From now on both signals raise KeyboardInterrupt in the main thread, so that what is open is closed."""
    forget()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)


@contextmanager
def held() -> Iterator[None]:
    """A signal that comes inside the block is obeyed at its end; of blocks in each other, at the end of the outermost.

    A step of training is whole or not begun. And TensorBoard hands events to a thread of its own: an exception inside
    that handing over can lose the wake-up of the thread, and closing the file then waits for its next flush, two
    minutes.
    """
    global _holders
    _holders += 1
    try:
        yield
    finally:
        _holders -= 1
    _obey()


@contextmanager
def let_through() -> Iterator[None]:
    """Inside of what is held: here a signal is obeyed at once, also one that came before."""
    global _holders
    before, _holders = _holders, 0
    try:
        _obey()
        yield
    finally:
        _holders = before


def forget() -> None:
    """None has come yet."""
    global _came
    _came = None


def wanted() -> bool:
    """A signal has come. An error after it may be the interrupt itself: safetensors takes one that comes while it reads
    for an error of its own."""
    return _came is not None


def exit_code() -> int:
    """What a process ends with that a signal has stopped: as if it had never heard of signals, so that whoever
    restarts such processes restarts this one. That of Ctrl-C where there was none, but another process was stopped."""
    return TERMINATED if _came == signal.SIGTERM else INTERRUPTED


def _obey() -> None:
    if _came is not None and not _holders:
        raise KeyboardInterrupt


def _interrupt(signal_number: int, frame: object) -> None:
    global _came
    # torch's launcher says it again to a process that is already on its way out, and has yet to upload what it saved.
    if _came is not None and signal_number == signal.SIGTERM:
        return
    _came = signal_number
    _obey()
