"""Waiting that costs no time: for the thread that tests, and for no server's."""

from __future__ import annotations

import threading
import time

import pytest


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been slept, as they come."""
    slept: list[float] = []
    sleep, tester = time.sleep, threading.current_thread()

    def quick(seconds: float) -> None:
        if threading.current_thread() is tester:
            slept.append(seconds)
            seconds = min(seconds, 0.001)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", quick)
    return slept
