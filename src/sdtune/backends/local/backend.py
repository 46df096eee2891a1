"""The local backend: the training entry point as a process on this machine, with a container's arguments."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from sdtune.backends.places import Places
from sdtune.errors import ProjectError
from sdtune.jobs.backend import JobEnd, LogLine, Submitted
from sdtune.jobs.environment import ENVIRONMENT
from sdtune.jobs.spec import JobSpec

SECONDS_TO_STOP = 15.0
NEEDED = {
    "train": ("training", ("torch", "diffusers"), "train"),
    "notebook": ("running a notebook", ("nbclient", "ipykernel"), "notebook"),
}
"""By task: what it is, what it imports, the extra of the package that has it."""


class LocalBackend(Places):
    """Jobs as child processes."""

    name: ClassVar[str] = "local"
    outlives: ClassVar[bool] = False

    def __init__(self, offline: bool = False) -> None:
        super().__init__(offline)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def place(self) -> str:
        return f"this machine ({', '.join([*_gpus(), f'{os.cpu_count()} CPU cores'])})"

    def stage(self, path: str, names: Sequence[str], kind: str, output: str) -> None:
        """A process of this machine reads what lies here."""

    def render(self, job: JobSpec) -> dict[str, Any]:
        return {"command": [sys.executable, "-m", "sdtune.training", *job.args], "environment": ENVIRONMENT}

    def as_text(self, rendered: dict[str, Any]) -> str:
        environment = [f"{name}={value}" for name, value in rendered["environment"].items()]
        return "  " + " ".join(shlex.quote(word) for word in [*environment, *rendered["command"]])

    def submit(self, job: JobSpec) -> Submitted:
        what, needed, extra = NEEDED["notebook" if job.task == "notebook" else "train"]
        if any(importlib.util.find_spec(name) is None for name in needed):
            raise ProjectError(
                f"{what} on this machine needs {' and '.join(needed)}, which this Python does not have; "
                f"install them with: pip install -e '.[{extra}]' in sdtune's folder"
            )
        rendered = self.render(job)
        process = subprocess.Popen(
            rendered["command"],
            env={**os.environ, **rendered["environment"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            # One stream keeps a warning beside the step it belongs to.
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches the launcher alone, which then stops the job in good order.
            start_new_session=True,
        )
        job_id = str(process.pid)
        self._processes[job_id] = process
        return Submitted(job_id, job_id, "", "")

    def follow(self, job_id: str) -> Iterator[LogLine]:
        stream = self._processes[job_id].stdout
        assert stream is not None
        for line in stream:
            # A progress bar redraws its line with carriage returns; only its last state is worth a line.
            yield LogLine(line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2])

    def wait(self, job_id: str) -> JobEnd:
        return JobEnd(self._processes[job_id].wait())

    def try_elsewhere(self) -> None:
        """There is no other machine."""

    def cancel(self, job_id: str) -> None:
        process = self._processes[job_id]
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is not None:
                return
            os.killpg(process.pid, signal_number)
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                continue


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs, asked of the driver: importing torch for it would take seconds."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.strip().splitlines() if listed.returncode == 0 else []
