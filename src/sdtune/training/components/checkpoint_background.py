"""Checkpoints that are written while training goes on: one at a time, in a thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import TypeAlias

from sdtune.training.components.checkpoint_files import StoppedError

IN_BACKGROUND = min(4, os.cpu_count() or 1)
"""Files at once while training goes on, which needs cores as well; and so many are waited for when it is stopped."""

Stopped: TypeAlias = Callable[[], bool]


@dataclass(frozen=True)
class Ended:
    """What became of a checkpoint. error: why it could not be written; seconds: that it took."""

    step: int
    error: Exception | None
    seconds: float


class Background:
    """Its owner starts one when the one before has ended, and takes note of how each has."""

    def __init__(self) -> None:
        self._running: Future[Ended] | None = None
        self._unwanted = Event()

    def start(self, step: int, write: Callable[[Stopped], object]) -> None:
        """Call ``write`` in the background; what it is given says whether its checkpoint is wanted no more."""
        assert self._running is None
        self._unwanted.clear()
        pool = ThreadPoolExecutor(1)
        self._running = pool.submit(_ended, step, write, self._unwanted.is_set)
        # Its thread ends with what it was started for.
        pool.shutdown(wait=False)

    def ended(self) -> Ended | None:
        """The one that was started, if it has ended and has not been asked for yet."""
        return self.end() if self._running and self._running.done() else None

    def end(self) -> Ended | None:
        """The same, waiting for its end."""
        if (running := self._running) is None:
            return None
        # In turns, so that a signal is heard.
        while not running.done():
            wait([running], timeout=0.2)
        self._running = None
        return running.result()

    def drop(self) -> None:
        """It is wanted no more: wait until nothing is written any more."""
        self._unwanted.set()
        self.end()


def _ended(step: int, write: Callable[[Stopped], object], stopped: Stopped) -> Ended:
    began = time.monotonic()
    error: Exception | None = None
    try:
        write(stopped)
    except StoppedError:
        pass
    except Exception as what:  # noqa: BLE001 the owner raises it, at the next step
        error = what
    return Ended(step, error, time.monotonic() - began)
