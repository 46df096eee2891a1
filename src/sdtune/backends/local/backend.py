"""The local backend: the training entry point as a process on this machine, with a container's arguments."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdtune.errors import ProjectError
from sdtune.jobs.backend import JobEnd, LogLine
from sdtune.jobs.spec import JobSpec

# A library's own bars and hints would drown the run's progress. UTF-8 whatever the terminal's locale says.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
SECONDS_TO_STOP = 15.0


class LocalBackend:
    """Jobs as child processes."""

    name = "local"

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def place(self) -> str:
        return f"this machine ({', '.join([*_gpus(), f'{os.cpu_count()} CPU cores'])})"

    def resolve(self, path: str) -> str:
        return str(Path(path).expanduser().resolve())

    def list_names(self, folder: str) -> list[str]:
        path = Path(folder)
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    def can_write(self, folder: str) -> bool:
        path = Path(folder)
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK) and not _is_virtual(existing)

    def render(self, job: JobSpec) -> dict[str, Any]:
        return {"command": [sys.executable, "-m", "sdtune.training", *job.args], "environment": ENVIRONMENT}

    def submit(self, job: JobSpec) -> str:
        if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
            raise ProjectError(
                "training on this machine needs torch and diffusers, which this Python does not have; "
                "install them with: pip install -e '.[train]' in sdtune's folder"
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
        return job_id

    def logs(self, job_id: str) -> Iterator[LogLine]:
        stream = self._processes[job_id].stdout
        assert stream is not None
        for line in stream:
            # A progress bar redraws its line with carriage returns; only its last state is worth a line.
            yield LogLine(line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2])

    def wait(self, job_id: str) -> JobEnd:
        return JobEnd(self._processes[job_id].wait())

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


def _is_virtual(folder: Path) -> bool:
    """Root may write there, says the system, but no file can be made."""
    return folder.is_relative_to("/proc") or folder.is_relative_to("/sys")


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs, asked of the driver: importing torch for it would take seconds."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.strip().splitlines() if listed.returncode == 0 else []
