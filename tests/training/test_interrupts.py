"""A signal is obeyed at once, or at the end of what must not be torn."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from sdtune.training import interrupts


@pytest.fixture(autouse=True)
def signals_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(interrupts, "_wanted", False)
    interrupts.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_obeyed_at_once(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_or_when_what_must_not_be_torn_is_done(number: signal.Signals) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012
        os.kill(os.getpid(), number)
        done.append(1)
    assert done == [1]


def test_nothing_happens_without_one() -> None:
    with interrupts.held():
        pass
