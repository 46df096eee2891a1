"""Checkpoints that are written while training goes on: whatever comes meanwhile, the newest that can be whole is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods.resuming import name_of
from sdtune.training import checkpoints, interrupts
from sdtune.training.checkpoints import Checkpoints
from sdtune.training.components.checkpoint_files import Disk, steps_in
from tests.survival.test_checkpoints import STEPS, Counting, all_threads_have_ended, begun, newest_good, told_nothing


class GatedDisk(Disk):
    """Waits at one call until it is let through; ``fails`` then."""

    def __init__(self, at: int, fails: bool = False) -> None:
        self.reached, self.through, self.calls = threading.Event(), threading.Event(), 0
        self._at, self._fails, self._lock = at, fails, threading.Lock()

    def _call(self) -> None:
        with self._lock:
            self.calls += 1
            mine = self.calls == self._at
        if mine:
            self.reached.set()
            assert self.through.wait(60)
            if self._fails:
                raise OSError(28, "No space left on device")

    def make(self, folder: Path) -> None:
        self._call()
        super().make(folder)

    def write(self, file: Path, content: Iterable[bytes | memoryview]) -> tuple[int, str]:
        def gated() -> Iterator[bytes | memoryview]:
            yield from content
            # All is written but not yet waited for.
            self._call()

        self._call()
        return super().write(file, gated())

    def rename(self, source: Path, target: Path) -> None:
        self._call()
        super().rename(source, target)

    def remove(self, folder: Path) -> None:
        self._call()
        super().remove(folder)


CALLS = 10
"""Of the first checkpoint: a folder, four files (twice each), a renaming."""


@pytest.fixture(autouse=True)
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Signals are heard, as in a run, and there is room in memory."""
    monkeypatch.setattr(checkpoints, "has_room", lambda *_: True)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    interrupts.listen()
    yield
    interrupts.forget()
    for number, handler in before.items():
        signal.signal(number, handler)
    all_threads_have_ended()


def opened(folder: Path, disk: Disk, **more: Any) -> tuple[Checkpoints, list[events.Event]]:
    run, told = begun(folder, disk, **more), list[events.Event]()
    run.tell, run.told = told.append, told_nothing
    run.begin()
    return run, told


def saved(told: list[events.Event]) -> list[int]:
    return [event.step for event in told if isinstance(event, events.Checkpoint)]


def later(call: Callable[[], object]) -> threading.Timer:
    """In a thread, when the one that is here waits already."""
    timer = threading.Timer(0.05, call)
    timer.start()
    return timer


def at_the_gate(run: Checkpoints, disk: GatedDisk, training: Counting) -> None:
    """One step whose checkpoint is being written, up to the gate."""
    training.train()
    run.after(training)
    assert disk.reached.wait(60)


def test_there_are_so_many_calls(tmp_path: Path) -> None:
    disk = GatedDisk(0)
    run, _ = opened(tmp_path, disk)
    with run:
        training = Counting()
        training.train()
        run.after(training)
    assert disk.calls == CALLS


def test_training_goes_on_and_the_checkpoint_is_of_its_step(tmp_path: Path) -> None:
    disk = GatedDisk(3)
    run, told = opened(tmp_path, disk, checkpointing_steps=4)
    training = Counting()
    with run:
        for _ in range(3):
            training.train()
            run.after(training)
        at_the_gate(run, disk, training)
        # What is written has been copied: this changes nothing of it.
        training.weights -= 100
        training.step += 1
        assert saved(told) == []
        disk.through.set()
    assert saved(told) == [4]
    assert newest_good(tmp_path) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", range(1, CALLS + 1))
def test_a_signal_at_any_moment_of_it(tmp_path: Path, at: int, number: signal.Signals) -> None:
    disk = GatedDisk(at)
    run, told = opened(tmp_path, disk, checkpointing_steps=2)
    training = Counting()
    with pytest.raises(KeyboardInterrupt), run, interrupts.held():  # noqa: PT012
        training.train()
        run.after(training)
        at_the_gate(run, disk, training)
        signal.raise_signal(number)
        later(disk.through.set)
        training.train()
        run.after(training)
    # The one that was under way, and that of the moment.
    assert saved(told) == [2, 3]
    assert steps_in(tmp_path) == [3, 2]
    assert newest_good(tmp_path) == 3
    assert not list(tmp_path.glob(".*"))


def test_where_a_second_would_take_too_long_the_first_is_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SECONDS_TO_STOP", 0.0)
    disk = GatedDisk(5)
    run, told = opened(tmp_path, disk, checkpointing_steps=2)
    training = Counting()
    with pytest.raises(KeyboardInterrupt), run, interrupts.held():  # noqa: PT012
        training.train()
        run.after(training)
        at_the_gate(run, disk, training)
        training.train()
        run.after(training)
        signal.raise_signal(signal.SIGTERM)
        later(disk.through.set)
        # Not one that is due anyway, for then it would be one as of old.
        training.train()
        run.after(training)
    assert saved(told) == [2]
    assert newest_good(tmp_path) == 2
    assert told[-1] == events.Note(
        "The checkpoint of step 2 took 0 s; for another one there is no time, so what follows on it, up to step 4, is "
        "done again."
    )


@pytest.mark.parametrize("at", range(1, CALLS + 1))
def test_one_that_fails_when_a_signal_comes_gives_way_to_the_next(tmp_path: Path, at: int) -> None:
    disk = GatedDisk(at, fails=True)
    run, told = opened(tmp_path, disk, checkpointing_steps=2)
    training = Counting()
    with pytest.raises(KeyboardInterrupt), run, interrupts.held():  # noqa: PT012
        training.train()
        run.after(training)
        at_the_gate(run, disk, training)
        signal.raise_signal(signal.SIGTERM)
        disk.through.set()
        training.train()
        run.after(training)
    assert "that of step 2 cannot be written" in told[0].text  # type: ignore[union-attr]
    assert saved(told) == [3]
    assert newest_good(tmp_path) == 3


@pytest.mark.parametrize("at", range(CALLS + 1, 2 * CALLS + 1))
def test_an_error_ends_training_at_the_next_step(tmp_path: Path, at: int) -> None:
    disk = GatedDisk(at, fails=True)
    run, told = opened(tmp_path, disk, checkpointing_steps=2)
    training = Counting()
    with run:
        for _ in range(3):
            training.train()
            run.after(training)
        at_the_gate(run, disk, training)
        disk.through.set()
        all_threads_have_ended()
        training.train()
        with pytest.raises(
            TrainingError, match=r"that of step 4 cannot be written to .*No space left.*that of step 2 is kept"
        ):
            run.after(training)
    assert saved(told) == [2]
    assert newest_good(tmp_path) == 2


def test_another_error_is_not_hidden(tmp_path: Path) -> None:
    class Broken(Disk):
        def make(self, folder: Path) -> None:
            raise ZeroDivisionError

    run, _ = opened(tmp_path, Broken())
    training = Counting()
    with pytest.raises(ZeroDivisionError), run:  # noqa: PT012
        training.train()
        run.after(training)


def test_one_at_a_time(tmp_path: Path) -> None:
    disk = GatedDisk(2)
    run, told = opened(tmp_path, disk)
    training = Counting()
    with run:
        at_the_gate(run, disk, training)
        later(disk.through.set)
        training.train()
        run.after(training)
        assert saved(told) == [1]
    assert saved(told) == [1, 2]


# --- the last one, while the result is saved --------------------------------------------------------------------------


def at_the_end(run: Checkpoints, disk: GatedDisk) -> None:
    """Trained to the end; the last checkpoint is on its way up to the gate."""
    training = Counting()
    while training.step < STEPS:
        training.train()
        run.after(training)
    assert disk.reached.wait(60)


LAST = {"checkpointing_steps": 0, "checkpointing_minutes": 1440}


@pytest.mark.parametrize("at", range(1, CALLS + 1))
def test_it_is_not_waited_for_when_the_result_is_there(tmp_path: Path, at: int) -> None:
    disk = GatedDisk(at)
    run, told = opened(tmp_path / "checkpoints", disk, **LAST)
    with run:
        at_the_end(run, disk)
        later(lambda: run._background._unwanted.wait(60) and disk.through.set())
        run.finish()
        calls = disk.calls
        assert not (tmp_path / "checkpoints").exists()
    assert disk.calls == calls
    # What was still to be written was not: at a gate before the first byte, no file but the one of another thread.
    assert at > 3 or calls <= 4
    assert saved(told) == []


@pytest.mark.parametrize("at", range(1, CALLS + 1))
def test_it_is_if_it_is_to_be_kept(tmp_path: Path, at: int) -> None:
    disk = GatedDisk(at)
    run, told = opened(tmp_path, disk, **LAST, keep_checkpoints=True)
    with run:
        at_the_end(run, disk)
        later(disk.through.set)
        run.finish()
        assert newest_good(tmp_path) == STEPS
    assert saved(told) == [STEPS]


def test_and_if_it_cannot_be_the_result_is_there_all_the_same(tmp_path: Path) -> None:
    disk = GatedDisk(5, fails=True)
    run, told = opened(tmp_path, disk, **LAST, keep_checkpoints=True)
    with run:
        at_the_end(run, disk)
        disk.through.set()
        run.finish()
    assert [event.text for event in told if isinstance(event, events.Note)] == [
        f"checkpoint: that of step {STEPS} cannot be written to {tmp_path} ([Errno 28] No space left on device); "
        "there is none yet."
    ]


@pytest.mark.parametrize("at", range(1, CALLS + 1))
@pytest.mark.parametrize("what", ["a signal", "an error"])
def test_what_ends_the_saving_of_the_result_waits_for_it(tmp_path: Path, at: int, what: str) -> None:
    disk = GatedDisk(at)
    run, told = opened(tmp_path, disk, **LAST)
    with pytest.raises(KeyboardInterrupt if what == "a signal" else TrainingError), run:  # noqa: PT012
        at_the_end(run, disk)
        later(disk.through.set)
        if what == "an error":
            raise TrainingError("the result cannot be written")
        signal.raise_signal(signal.SIGTERM)
    assert newest_good(tmp_path) == STEPS
    assert saved(told) == [STEPS]


def test_a_signal_in_that_waiting_is_obeyed_after_it(tmp_path: Path) -> None:
    disk = GatedDisk(4)
    run, _ = opened(tmp_path, disk, **LAST)

    def signal_and_release() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        later(disk.through.set)

    with pytest.raises(KeyboardInterrupt), run:  # noqa: PT012
        at_the_end(run, disk)
        later(signal_and_release)
        raise TrainingError("the result cannot be written")
    assert newest_good(tmp_path) == STEPS


def test_a_second_ctrl_c_ends_the_waiting(tmp_path: Path) -> None:
    disk = GatedDisk(4)
    run, told = opened(tmp_path, disk, **LAST)
    with pytest.raises(KeyboardInterrupt), run:  # noqa: PT012
        at_the_end(run, disk)
        later(lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
        signal.raise_signal(signal.SIGINT)
    assert saved(told) == []
    assert not (tmp_path / name_of(STEPS)).exists()
    disk.through.set()
