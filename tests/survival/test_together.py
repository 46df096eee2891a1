"""Several processes that train together stop after the same step, and go on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from sdtune import events
from sdtune.methods.resuming import CHECKPOINTS
from sdtune.training.components.checkpoint_files import steps_in
from tests.survival.runs import STEPS, all_is_whole, result_of, words_of

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(output: Path, processes: int = 2) -> subprocess.Popen[str]:
    # Dropout is another in each process; samples make the others wait for the first.
    words = words_of("lora", output, f"--processes={processes}", checkpointing_steps=0, sample_every=4)
    return subprocess.Popen(
        [sys.executable, "-m", "sdtune.training", *words],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip


def ended(process: subprocess.Popen[str], stop_when: str | None = None) -> tuple[int, list[events.Event]]:
    """To its end, or to a SIGTERM when a line has these words: exit code and events."""
    assert process.stdout
    told, sent = [], 0.0
    for line in process.stdout:
        if event := events.parse(line):
            told.append(event)
        if stop_when and stop_when in line and not sent:
            process.send_signal(signal.SIGTERM)
            sent = time.monotonic()
    code = process.wait(timeout=120)
    assert not sent or time.monotonic() - sent < 60
    return code, told


def test_two_that_are_stopped_go_on_bit_for_bit(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole" / "cat", tmp_path / "torn" / "cat"
    code, _ = ended(start(whole))
    assert code == 0
    # While they train, and while the first draws and the other waits.
    reached = []
    for words in ('"step": 3,', "pictures after step 8"):
        code, told = ended(start(torn), words)
        assert code == 143
        (saved,) = (event.step for event in told if isinstance(event, events.Checkpoint))
        assert steps_in(torn / CHECKPOINTS)[0] == saved
        all_is_whole(torn)
        reached.append(saved)
    assert reached[0] < 8 <= reached[1] < STEPS
    code, told = ended(start(torn, processes=1))
    assert code == 2
    assert "  processes: 2 then, 1 now\n" in told[-1].text  # type: ignore[union-attr]
    code, told = ended(start(torn))
    assert code == 0
    assert any(isinstance(event, events.Note) and "Going on from" in event.text for event in told)
    assert result_of(torn) == result_of(whole)
