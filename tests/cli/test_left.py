"""What ``sdtune train`` says where it is left, or finds somebody else's job, just when it submits its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BASE_MODEL
from tests.servers.cloud import Cloud, loopback_cloud

SDTUNE = str(Path(sys.executable).with_name("sdtune"))


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud[Any]]:
    with loopback_cloud(delays={"JOB_STATE_PENDING": 600}) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        found.storage.buckets["my-bucket"] = {}
        yield found


def training(dataset: Path, output: str) -> list[str]:
    return [
        SDTUNE, "train", "dreambooth-lora", "--base-model", str(BASE_MODEL), "--dataset", str(dataset),
        "--output", output, "--instance-prompt", "a photo of sks cat", "--max-train-steps", "3",
        "--gpu", "l4", "--detach",
    ]  # fmt: skip


def test_ctrl_c_while_the_answer_is_awaited(cloud: Cloud[Any], pictures: Callable[..., Path], tmp_path: Path) -> None:
    cloud.vertex.befall("slow", "POST", "customJobs$", seconds=600.0)
    with subprocess.Popen(
        training(pictures(), "gs://my-bucket/cat"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=tmp_path,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not cloud.vertex.jobs:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stdout
        said = process.stdout.read()
        assert process.wait(60) == 130, said
    [job] = cloud.vertex.jobs.values()
    run_id = job.message.labels["sdtune-run"]
    named = f"{run_id} --region us-central1"
    assert "Stopped as it was being submitted, and it may have been: " in said
    assert f"sdtune jobs show {named} tells, and sdtune jobs cancel {named} ends it." in said
    shown = subprocess.run([SDTUNE, "jobs", "show", *named.split()], capture_output=True, text=True, cwd=tmp_path)
    assert job.id in shown.stdout


def test_who_comes_second_is_told_before_the_upload(
    cloud: Cloud[Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    words = training(pictures(), "gs://my-bucket/cat")
    first = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    [job] = cloud.vertex.jobs.values()
    before = len(cloud.storage.buckets["my-bucket"])
    others = training(pictures(name="others"), "gs://my-bucket/cat")
    second = subprocess.run(others, capture_output=True, text=True, cwd=tmp_path)
    assert second.returncode == 2
    assert f"output: gs://my-bucket/cat is written to by job {job.id}, pending, which " in second.stderr
    assert "choose another --output" in second.stderr
    assert len(cloud.storage.buckets["my-bucket"]) == before
    assert len(cloud.vertex.jobs) == 1
