"""How quickly a job in the cloud answers: against servers of this machine, so that the network costs nothing.

How long a dry run takes, how many calls a list of jobs makes, how late the lines of a job are shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from google.cloud.storage import Client

from tests.servers.cloud import loopback_cloud
from tests.servers.emulator import Emulator

ROOT = Path(__file__).parent.parent
SDTUNE = str(Path(sys.executable).with_name("sdtune"))
RUNS = 9
TRAIN = [
    "train", "dreambooth-lora", "--base-model", "examples/base-model", "--dataset", "examples/datasets/images",
    "--instance-prompt", "a photo of sks cat", "--gpu", "l4", "--max-train-steps", "5", "--num-samples", "0",
]  # fmt: skip


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SDTUNE, *words], cwd=ROOT, check=True, capture_output=True, text=True)


def shortest(*words: str) -> float:
    """Seconds of the shortest of several runs."""
    taken = []
    for _ in range(RUNS):
        started = time.perf_counter()
        run(*words)
        taken.append(time.perf_counter() - started)
    return min(taken)


def lateness(*words: str) -> list[float]:
    """Of each line of a job's log: seconds from its writing to its showing."""
    late = []
    with subprocess.Popen([SDTUNE, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            told = json.loads(line)
            if told["event"] == "log":
                late.append((datetime.now(UTC) - datetime.fromisoformat(told["time"])).total_seconds())
    if process.returncode:
        raise SystemExit(f"the job ended with {process.returncode}")
    return late


def main() -> None:
    """Print one row per figure."""
    with loopback_cloud(Emulator) as cloud:
        os.environ.update(cloud.environment)
        Client(project="my-project").create_bucket("my-bucket")
        dry = shortest(*TRAIN, "--output", "gs://my-bucket/dry", "--dry-run")
        late = lateness(*TRAIN, "--output", "gs://my-bucket/cat", "--json")
        cloud.vertex.requests.clear()
        listed = shortest("jobs", "list")
        calls = len(cloud.vertex.requests) // RUNS
        for what, figure in (
            ("train ... --output gs://... --dry-run", f"{1000 * dry:.0f} ms"),
            ("a job's lines, from writing to showing", f"{late[0]:.1f} s the first, {max(late):.1f} s the latest"),
            ("jobs list", f"{1000 * listed:.0f} ms, {calls} call"),
        ):
            print(f"{what:<42} {figure}")


if __name__ == "__main__":
    main()
