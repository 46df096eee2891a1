"""Curves and samples by the real libraries: TensorBoard's files, and the log that Weights & Biases keeps offline."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdtune import events
from sdtune.errors import ProjectError
from sdtune.jobs.spec import plan_training
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.trackers import check_trackers

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path) -> Start:
    """Starts a training into ``my cat`` that logs to the project ``cats``."""
    dataset = pictures()

    def run(environment: dict[str, str], **more: Any) -> subprocess.Popen[str]:
        method = DreamBoothLora.from_settings({**settings, "wandb_project": "cats", **more})
        job = plan_training(method, str(dataset), str(tmp_path / "my cat"))
        without = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        quiet = {"HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false"}
        return subprocess.Popen(
            [sys.executable, "-m", "sdtune.training", *job.args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True, env={**without, **quiet, **environment},
        )  # fmt: skip

    return run


def records(folder: Path) -> Iterator[Any]:
    """What an offline run has written down: LevelDB's log format, blocks of 32 KiB, after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content = next((folder / "logs" / "wandb").rglob("run-*.wandb")).read_bytes()
    place, whole = 7, b""
    while place < len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_weights_and_biases_gets_what_tensorboard_gets(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    process = start({"WANDB_MODE": "offline"})
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert [line for line in printed.splitlines() if events.parse(line) is None] == []

    written = list(records(tmp_path / "my cat"))
    run = next(record.run for record in written if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("cats", "my cat")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["method"], config["rank"], config["instance_prompt"]) == ("dreambooth-lora", 4, "a photo of sks cat")
    assert config["base_model"] == "base-model"
    assert not {"push_to_hub", "wandb_project"} & set(config)

    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in written
        if record.WhichOneof("record_type") == "history"
    ]
    measured = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    told = [event for line in printed.splitlines() if isinstance(event := events.parse(line), events.Measure)]
    assert measured == [(event.step, event.value) for event in told]
    assert {name for row in rows for name in row} >= {"train/loss", "train/learning_rate", "train/images_per_second"}
    samples = [(row["step"], row["samples/0-0/caption"]) for row in rows if "samples/0-0/caption" in row]
    assert samples == [(0, "a photo of sks cat"), (4, "a photo of sks cat")]
    assert [record.exit.exit_code for record in written if record.WhichOneof("record_type") == "exit"] == [0]


def test_a_failed_run_is_a_failed_run_there_too(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    process = start({"WANDB_MODE": "offline"}, learning_rate=1e-30, num_samples=0)
    printed, _ = process.communicate()
    assert process.returncode == 5, printed
    assert "the LoRA is zero" in printed
    written = records(tmp_path / "my cat")
    assert [record.exit.exit_code for record in written if record.WhichOneof("record_type") == "exit"] == [5]


def test_a_stopped_run_stops_with_it(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    process = start({"WANDB_MODE": "offline"}, max_train_steps=100_000, num_samples=0)
    assert process.stdout is not None
    for line in process.stdout:
        if '"step"' in line:
            break
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    printed = process.stdout.read()  # ends when the last process that writes to it has ended
    assert process.wait(timeout=30) == 143, printed
    assert time.monotonic() - started < 15
    assert "Traceback" not in printed
    written = records(tmp_path / "my cat")
    assert [record.exit.exit_code for record in written if record.WhichOneof("record_type") == "exit"] == [143]


def test_without_a_key_nothing_starts(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    process = start({})
    printed, _ = process.communicate()
    assert process.returncode == 3, printed
    (failed,) = [events.parse(line) for line in printed.splitlines()]
    assert isinstance(failed, events.Failed)
    assert "Set WANDB_API_KEY to a key from https://wandb.ai/authorize, or WANDB_MODE=offline" in failed.text
    assert not (tmp_path / "my cat").exists()


def test_without_the_library_nothing_starts(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers(DreamBoothLora.from_settings(settings))
    with pytest.raises(ProjectError, match=r"the library wandb is not installed here; install it with pip install -e"):
        check_trackers(DreamBoothLora.from_settings({**settings, "wandb_project": "cats"}))
