"""The shipped base model, and runs that write to a temporary folder."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from sdtune import events
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.__main__ import main
from sdtune.training.components.models import Parts, load_parts
from sdtune.training.run import Run


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small gain nothing from a second thread, and lose much where the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def a_fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its precision for the whole process; a run has the process to itself, tests have not."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def small(settings: dict[str, Any]) -> None:
    """Runs of ``settings`` train at half of the base model's resolution, in half of the time."""
    settings["resolution"] = 64


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out loss of every run over 8 draws, not 64, which is half of a small run: test_held_out.py has all."""
    monkeypatch.setattr("sdtune.training.components.held_out.DRAWS", 8)


Trained = tuple[int, list[events.Event], str]
"""The exit code, what was told, and what else was printed."""


EntryPoint = Callable[[Sequence[str]], Trained]


@pytest.fixture
def entry_point(capsys: pytest.CaptureFixture[str]) -> Iterator[EntryPoint]:
    """What containers run, in this process: torch and diffusers take longer to import than a small run to train.

    test_entry.py has it as a process of its own.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(words: Sequence[str]) -> Trained:
        capsys.readouterr()
        code = main(words)
        printed, errors = capsys.readouterr()
        return code, [event for line in printed.splitlines() if (event := events.parse(line))], errors

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def method(settings: dict[str, Any]) -> DreamBoothLora:
    return DreamBoothLora.from_settings(settings)


@pytest.fixture
def run(method: DreamBoothLora, pictures: Callable[..., Path], tmp_path: Path) -> Iterator[Run]:
    """A run on five pictures."""
    with Run.open(method, pictures(5, name="dataset"), tmp_path / "out") as run:
        yield run


@pytest.fixture
def parts(method: DreamBoothLora, run: Run) -> Parts:
    return load_parts(method, run)
