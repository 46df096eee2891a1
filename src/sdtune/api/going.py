"""Going: something that goes on in a thread while the notebook is free, waited for, left or stopped."""

from __future__ import annotations

import atexit
import threading
import weakref
from abc import ABC, abstractmethod
from typing import Self

from sdtune.errors import JobError

SECONDS_BETWEEN_LOOKS = 0.2
"""While waiting: a wait without an end would not be interrupted everywhere."""
SECONDS_TO_STOP = 40.0
"""What the end of this Python leaves to runs, which stop their own processes in it."""
PLANNED, CANCELLED = "planned", "cancelled"

_GOING: weakref.WeakSet[Going] = weakref.WeakSet()


class InterruptedWait(KeyboardInterrupt):
    """The cell was interrupted; the message says what has become of what it waited for."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook in place of a traceback."""
        return [f"\x1b[1;33mInterrupted\x1b[0m: {self}"]


class Going(ABC):
    """state: ``planned`` where it was not started, else in the words of its place.

    outlives: it goes on when this Python ends. A subclass does its work in ``_work``, which returns or raises.
    """

    def __init__(self, outlives: bool) -> None:
        self.state = PLANNED
        self.outlives = outlives
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._cancelled = False

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Stop it. JobError: it has ended, or was never started."""
        if self.state == PLANNED:
            raise JobError(f"{self._what()} was not started.")
        if self.done:
            raise JobError(f"{self._what()} has ended already ({self.state}).")
        self._cancelled = True
        self._stop()

    @abstractmethod
    def _work(self) -> None:
        """All of it, in a thread of its own."""

    @abstractmethod
    def _stop(self) -> None:
        """Let ``_work`` end soon; called from another thread."""

    @abstractmethod
    def _show_end(self) -> None:
        """Show for the last time."""

    @abstractmethod
    def _what(self) -> str:
        """In words, as the first of a sentence."""

    @abstractmethod
    def _left(self) -> str:
        """What the user should know who has left it."""

    def _start(self, wait: bool) -> Self:
        """Begin. wait: to the end; raises how that was, or InterruptedWait."""
        self.state = "starting"
        _GOING.add(self)
        threading.Thread(target=self._run, name=f"sdtune {self._what()}", daemon=True).start()
        if not wait:
            return self
        try:
            self._await()
        except KeyboardInterrupt:
            if not self.outlives and not self.done:
                self.cancel()
                self._ended.wait(SECONDS_TO_STOP)
            raise InterruptedWait(self._left()) from None
        self._raise_error()
        return self

    def _run(self) -> None:
        try:
            self._work()
            self.state = "succeeded"
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            self.state = CANCELLED if self._cancelled else "failed"
            self._error = JobError(f"{self._what()} was cancelled.") if self._cancelled else error
        finally:
            try:
                self._show_end()
            finally:
                self._ended.set()

    def _await(self, timeout: float | None = None) -> None:
        """Until it has ended. TimeoutError: not within ``timeout`` seconds. Interrupting it leaves the run alone."""
        if self.state == PLANNED:
            raise JobError(f"{self._what()} was not started: dry_run shows what would run.")
        left = float("inf") if timeout is None else timeout
        while left > 0 and not self._ended.wait(min(SECONDS_BETWEEN_LOOKS, left)):
            left -= SECONDS_BETWEEN_LOOKS
        if not self.done:
            raise TimeoutError(f"{self._what()} has not ended after {timeout} seconds; it goes on.")

    def _raise_error(self) -> None:
        if self._error:
            raise self._error


@atexit.register
def _end_with_python() -> None:
    """Runs that do not outlive their launcher, stopped at once, then waited for."""
    going = [one for one in _GOING if not one.outlives and not one.done]
    for one in going:
        one._cancelled = True
        one._stop()
    for one in going:
        one._ended.wait(SECONDS_TO_STOP)
