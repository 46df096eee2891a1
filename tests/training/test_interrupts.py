"""A signal is obeyed at once, or at the end of what must not be torn."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest

from sdtune.errors import TrainingError
from sdtune.training import interrupts
from sdtune.training.__main__ import main


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    interrupts.listen()
    yield
    interrupts.listen()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_obeyed_at_once(number: signal.Signals, code: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert interrupts.exit_code() == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_or_when_what_must_not_be_torn_is_done(number: signal.Signals) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012
        os.kill(os.getpid(), number)
        done.append(1)
    assert done == [1]


def test_of_blocks_in_each_other_at_the_end_of_the_outermost() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(1)
        assert interrupts.wanted()
    assert done == [1]


def test_what_may_be_torn_inside_of_what_may_not_is_torn() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012
        try:
            with interrupts.let_through():
                with interrupts.held():
                    os.kill(os.getpid(), signal.SIGTERM)
                    done.append("inner")
                done.append("never")
        except KeyboardInterrupt:
            done.append("outer")
        with pytest.raises(KeyboardInterrupt), interrupts.let_through():
            done.append("nor this")
    assert done == ["inner", "outer"]


def test_sigterm_is_obeyed_once_and_ctrl_c_whenever_it_comes() -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_nothing_happens_without_one() -> None:
    with interrupts.held(), interrupts.let_through():
        pass
    assert not interrupts.wanted()


def test_an_error_after_a_signal_is_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """As safetensors, which takes an interrupt while it reads for an error of its own."""

    def swallowing(*_: object) -> int:
        interrupts.listen()
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise TrainingError("the model is not whole")

    monkeypatch.setattr("sdtune.training.__main__.train", swallowing)
    assert main(["train", "dreambooth-lora", "--dataset=d"]) == 143
