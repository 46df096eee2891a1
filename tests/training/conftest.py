"""The shipped base model, and runs that write to a temporary folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from sdtune.methods.dreambooth import DreamBoothLora
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
