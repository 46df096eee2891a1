"""One trial of a search as a process of this machine: its log, its reports, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdtune import events
from sdtune.backends.local.backend import LocalBackend
from sdtune.errors import INTERRUPTED, TERMINATED
from sdtune.jobs.search_space import Value
from sdtune.jobs.spec import JobSpec
from sdtune.jobs.study import METRIC_FILE_VARIABLE, TRIAL_VARIABLE, Measurement, Study, trial_folder

LOG_FILE, METRIC_FILE = "log.txt", "output.metrics"
"""In the folder of each trial: all that it printed; what it reported."""


@dataclass(frozen=True)
class Said:
    """A trial has measured something, or (ended) is no more. reason: why it has no result; empty if it has one."""

    trial_id: str
    ended: bool = False
    reason: str = ""


class TrialProcess:
    """Starts the trial. hear is called, from another thread, whenever it has something to say.

    gpu: the one that it sees of several; threads: of each process, where there is none.
    """

    def __init__(
        self, study: Study, trial_id: str, values: Mapping[str, Value], environment: Mapping[str, str],
        hear: Callable[[Said], None],
    ) -> None:  # fmt: skip
        self.trial_id, self._hear = trial_id, hear
        self.folder = Path(trial_folder(study.output, trial_id))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = self.folder / METRIC_FILE
        # Of an earlier try of this trial; read before the new one begins, it would be taken for its own.
        self._metrics.unlink(missing_ok=True)
        self._backend = _OfTrial({**environment, TRIAL_VARIABLE: trial_id, METRIC_FILE_VARIABLE: str(self._metrics)})
        self.pid = int(self._backend.submit(job_of_trial(study, values)).job_id)
        self.identity = identity(self.pid)
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def measurements(self) -> tuple[Measurement, ...]:
        """What it has reported by now."""
        return read_reports(self._metrics)

    def cancel(self) -> None:
        """Stop it, and come back when it is gone."""
        self._backend.cancel(str(self.pid))
        self._follower.join()

    def _follow(self) -> None:
        failed, finished, last = "", False, ""
        try:
            with (self.folder / LOG_FILE).open("a", encoding="utf-8", buffering=1) as log:
                for line in self._backend.follow(str(self.pid)):
                    log.write(line.text + "\n")
                    event = events.parse(line.text)
                    if isinstance(event, events.Failed):
                        failed = event.text
                    elif isinstance(event, events.Measure):
                        self._hear(Said(self.trial_id))
                    elif event is None:
                        last = line.text or last
                    finished = finished or isinstance(event, events.Finished)
        except OSError as error:
            # Nobody empties its pipe any more, so it would wait for ever.
            failed = f"{self.folder / LOG_FILE} cannot be written ({error.strerror or error})."
            self._backend.cancel(str(self.pid))
        code = self._backend.wait(str(self.pid)).exit_code
        reason = failed or ("" if code == 0 and finished else _unexplained(code or 0, last))
        self._hear(Said(self.trial_id, ended=True, reason=reason))


class _OfTrial(LocalBackend):
    """The local backend, for processes with more in their environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__()
        self._environment = environment

    def render(self, job: JobSpec) -> dict[str, Any]:
        rendered = super().render(job)
        return {**rendered, "environment": {**rendered["environment"], **self._environment}}


def job_of_trial(study: Study, values: Mapping[str, Value]) -> JobSpec:
    """The job of the trial with these values."""
    return replace(study.trial_job, args=study.trial_args(values))


def read_reports(file: Path) -> tuple[Measurement, ...]:
    """The measurements in a metric file, by step; a last line that is not whole yet is left for the next time."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return ()
    by_step: dict[int, dict[str, float]] = {}
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            said = json.loads(line)
            metrics = {
                name: float(value)
                for name, value in said.items()
                if name not in ("timestamp", "trial", "global_step", "checkpoint_path")
            }
            by_step.setdefault(int(said["global_step"]), {}).update(metrics)
    return tuple(Measurement(step, by_step[step]) for step in sorted(by_step))


def identity(pid: int) -> str:
    """When the process of this number began, as far as the system tells; empty if there is none.

    Numbers of processes come again; with this, another process is not taken for one of earlier.
    """
    try:
        # The name of the program, in brackets, may hold anything.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        asked = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip()


def end_orphan(pid: int, began: str) -> None:
    """End a trial that has outlived its search: the same trial is to run again, and in the same folder."""
    if not began or identity(pid) != began:
        return
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    until = time.monotonic() + 10
    while _is_alive(pid, began) and time.monotonic() < until:
        time.sleep(0.02)


def _is_alive(pid: int, began: str) -> bool:
    """Not of a process that has ended and waits to be taken note of."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return identity(pid) == began
    return state not in "ZX" and identity(pid) == began


def _unexplained(code: int, last: str) -> str:
    if code in (INTERRUPTED, TERMINATED):
        return "it was stopped from outside."
    how = f"signal {-code} ended it" if code < 0 else f"it ended with exit code {code} and without its result"
    if code == -signal.SIGKILL:
        how += ", most often because the machine ran out of memory"
    return f"{how}. Its last line: {last}" if last else f"{how}."
