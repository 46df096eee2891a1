"""The whole command in a process of its own: a run to its end, and a run that is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import BASE_MODEL

SDTUNE = str(Path(sys.executable).with_name("sdtune"))


def command(dataset: Path, output: Path, *more: str) -> list[str]:
    return [
        SDTUNE, "train", "dreambooth-lora", "--base-model", str(BASE_MODEL), "--dataset", str(dataset),
        "--instance-prompt", "a photo of\nsks \"cat\" 🐈", "--output", str(output), "--num-samples", "1",
        "--sample-steps", "2", "--rank", "4", *more,
    ]  # fmt: skip


def test_a_run_from_the_command_to_the_files(pictures: Callable[..., Path], tmp_path: Path) -> None:
    words = command(pictures(), tmp_path / "out", "--max-train-steps", "3", "--json")
    ran = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["event"] for line in told if line["event"] == "log"] == []
    assert told[-1]["event"] == "finished"
    made = {line["kind"]: Path(line["path"]) for line in told if line["event"] == "artifact"}
    assert set(made) == {"lora", "kohya_lora", "contact_sheet", "tensorboard", "card", "recipe"}
    assert all(path.exists() for path in made.values())

    again = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0
    assert "holds this run already, and it has finished" in json.loads(again.stdout.splitlines()[-1])["text"]

    other = subprocess.run([*words, "--seed", "7"], capture_output=True, text=True, cwd=tmp_path)
    assert other.returncode == 2
    assert "  seed: 42 then, 7 now" in json.loads(other.stdout.splitlines()[-1])["text"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_so_and_leaves_no_process(
    number: signal.Signals, pictures: Callable[..., Path], tmp_path: Path
) -> None:
    words = command(pictures(), tmp_path / "out", "--max-train-steps", "100000")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "  step " in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait(timeout=30) == 130
    assert "Stopped." in rest
    assert "Traceback" not in rest
    assert children
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert not list((tmp_path / "out").glob("*.safetensors"))
