"""One trainer as a process: started, listened to until its steps are done, ended; and the GPU's memory meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed_work import Command

from sdtune import events

GIB = 2**30
MIB_PER_GIB = 1024
IN_TRAINERS = Path(__file__).parent / "in_trainers"
SECONDS_BETWEEN_LOOKS = 0.25
SECONDS_TO_END = 30.0
SECONDS_TO_FREE = 20.0
"""At most, for the driver to take back the memory of the process before."""
LAST_CHARACTERS = 2000
MOST_OVER = 0.05
"""GiB that may still be taken of the GPU when the next process starts."""


@dataclass
class Seen:
    """What one process did.

    points: the number of a step and the seconds at which its loss was read, so that the GPU had done it. seconds: from
    its start to its end. on_disk: to the last byte of what it trained. stopped: why it was ended before its own end,
    ``measured`` or ``time``. failed: how it ended, where it ought not. driver, allocated, reserved: GiB of one GPU at
    most, as the driver counted beyond what was taken before, and as torch did.
    """

    points: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    on_disk: float | None = None
    stopped: str | None = None
    failed: str | None = None
    driver: float | None = None
    allocated: float | None = None
    reserved: float | None = None


class Card:
    """What the driver says of the first GPUs, five times a second; of no GPU where there is no nvidia-smi."""

    def __init__(self, gpus: int) -> None:
        given = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        self.visible = given.split(",")[:gpus]
        self.name, self.before = "CPU", 0.0
        self._latest, self._peaks = dict[str, float](), dict[str, float]()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Card:
        query = ["nvidia-smi", "--format=csv,noheader,nounits", "-i", ",".join(self.visible)]
        try:
            self.name = subprocess.run(
                [*query, "--query-gpu=name,driver_version"], check=True, capture_output=True, text=True
            ).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            return self
        self._process = subprocess.Popen(
            [*query, "--query-gpu=index,memory.used", "-lms", "200"], stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        while len(self._latest) < len(self.visible) and self._process.poll() is None:
            time.sleep(0.05)
        self.before = max(self._latest.values(), default=0.0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            index, _, used = line.partition(",")
            with contextlib.suppress(ValueError):
                self._latest[index] = float(used) / MIB_PER_GIB
                self._peaks[index] = max(self._peaks.get(index, 0.0), self._latest[index])

    def forget(self) -> None:
        """Wait until what was taken is free again, and begin anew."""
        until = time.monotonic() + SECONDS_TO_FREE
        while max(list(self._latest.values()), default=0.0) > self.before + MOST_OVER and time.monotonic() < until:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self._peaks.clear()

    def peak(self) -> float | None:
        """GiB of the GPU that had most, beyond what was taken before the first process."""
        peaks = list(self._peaks.values())
        return round(max(peaks) - self.before, 3) if peaks else None


class Told:
    """The steps that sdtune tells on standard output, at the time when each line comes."""

    def __init__(self, started: float) -> None:
        self.points: list[tuple[int, float]] = []
        self.why: str | None = None
        self._started = started

    def hear(self, line: str) -> None:
        match events.parse(line):
            case events.Step(step=step):
                self.points.append((step, time.time() - self._started))
            case events.Failed(text=text):
                self.why = text


def read_curve(folder: Path, name: str, started: float) -> list[tuple[int, float]]:
    """The points of the longest curve ``name`` in TensorBoard's files below the folder: step, seconds since the start.

    The peers read their loss before they write it, so these are times at which the GPU had done the step.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: list[list[tuple[int, float]]] = [[]]
    for file in folder.rglob("events.out.*"):
        curve = EventAccumulator(str(file), size_guidance={"scalars": 0})
        curve.Reload()
        if name in curve.Tags()["scalars"]:
            curves.append([(point.step, point.wall_time - started) for point in curve.Scalars(name)])
    return max(curves, key=len)


def watch(command: Command, output: Path, log: Path, card: Card, gpus: int, until: float, *, whole: bool) -> Seen:
    """Run it; what was seen.

    output: where it writes. log: gets everything it says. until: of time.monotonic(), when it is ended at the latest.
    whole: to its own end, and not only until its last step.
    """
    card.forget()
    memory = log.with_suffix(".memory")
    seen, started, clock = Seen(), time.time(), time.monotonic()
    told = Told(started)
    with _process(command, _environment(command, card, gpus, memory), log, told) as process:
        while _runs(process):
            if time.monotonic() > until:
                seen.stopped = "time"
            elif not whole and _last_step(command, told, output, started) >= command.steps:
                seen.stopped = "measured"
            if seen.stopped:
                _end(process)
        seen.seconds = round(time.monotonic() - clock, 2)
    seen.points = told.points if command.curve is None else read_curve(output, command.curve, started)
    seen.driver = card.peak()
    results = [file.stat().st_mtime - started for file in output.glob(command.result)]
    seen.on_disk = round(max(results), 2) if results and not seen.stopped else None
    if process.returncode and not seen.stopped:
        said = log.read_text(encoding="utf-8", errors="replace")[-LAST_CHARACTERS:]
        seen.failed = f"exit code {process.returncode}: {told.why or said}"
    _read_memory(memory, seen)
    return seen


def _runs(process: subprocess.Popen[str]) -> bool:
    """After a while, or at once when it has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_BETWEEN_LOOKS)
    return process.returncode is None


def _last_step(command: Command, told: Told, output: Path, started: float) -> int:
    points = told.points if command.curve is None else read_curve(output, command.curve, started)
    return points[-1][0] if points else 0


def _environment(command: Command, card: Card, gpus: int, memory: Path) -> dict[str, str]:
    """What the process finds: the first GPUs alone, no network, and in_trainers first on Python's path."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **command.environment}
    path = [str(IN_TRAINERS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(card.visible[:gpus])
    environment["SPEED_MEMORY"] = str(memory)
    return environment


@contextmanager
def _process(command: Command, environment: dict[str, str], log: Path, told: Told) -> Iterator[subprocess.Popen[str]]:
    """The process, a group of its own; nothing of the group is left afterwards."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command.words, cwd=command.folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=file, text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        listener = threading.Thread(target=_listen, args=(process, log, told), daemon=True)
        listener.start()
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            listener.join()


def _listen(process: subprocess.Popen[str], log: Path, told: Told) -> None:
    """Standard output is not the log's: a progress bar there does not end its line, and would swallow an event."""
    assert process.stdout
    with log.with_suffix(".out").open("w", encoding="utf-8") as file:
        for line in process.stdout:
            told.hear(line)
            file.write(line)


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_END)
    if process.returncode is None:
        process.kill()


def _read_memory(file: Path, seen: Seen) -> None:
    if not file.is_file():
        return
    peaks = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    seen.allocated = round(max(peak["allocated"] for peak in peaks) / GIB, 3)
    seen.reserved = round(max(peak["reserved"] for peak in peaks) / GIB, 3)
