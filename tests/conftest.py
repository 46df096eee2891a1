"""What many tests need: the shipped base model, small datasets, a dreambooth-lora recipe, the command line."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.servers.storage import StorageServer

# Of every process that a test starts: a second thread gains little on models this small, and where a core is busy
# OpenMP's threads wait for each other by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
BASE_MODEL = ROOT / "examples" / "base-model"
DATASETS = ROOT / "examples" / "datasets"
Command = Callable[..., tuple[int, str, str]]
"""Words in; the exit code, standard output and standard error."""


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of small pictures, each of another colour."""

    def make(count: int = 3, side: int = 128, name: str = "pictures") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            shade = 40 + 50 * number
            Image.new("RGB", (side, side), (shade, 255 - shade, 128)).save(folder / f"{number}.png")
        return folder

    return make


@pytest.fixture
def settings() -> dict[str, Any]:
    """Settings of a dreambooth-lora run that takes seconds on the shipped base model."""
    return {
        "base_model": str(BASE_MODEL),
        "instance_prompt": "a photo of sks cat",
        "max_train_steps": 4,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "rank": 4,
        "num_samples": 1,
        "sample_steps": 2,
    }


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageServer]:
    """Cloud Storage, empty; Google's own clients of this process and of its children find it."""
    with StorageServer() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
        yield server


@pytest.fixture
def sdtune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Runs ``sdtune WORDS`` in this process, on a terminal that is wide enough for every line."""
    from sdtune.cli import app as cli

    monkeypatch.setenv("COLUMNS", "250")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["sdtune", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
