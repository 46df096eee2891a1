"""sd-scripts as a process: a list of arguments, no shell, believed only when it ends with 0."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch

import sdtune
from sdtune import events
from sdtune.errors import ERRORS, INTERRUPTED, ProjectError, TrainingError
from sdtune.training import interrupts
from sdtune.training.kohya import orders
from sdtune.training.kohya.launcher import Setup
from sdtune.training.kohya.reporter import AVERAGE_MARK
from sdtune.training.secrets import SECRETS

FOLDER = "SDTUNE_SD_SCRIPTS"
PYTHON = "SDTUNE_SD_SCRIPTS_PYTHON"
LAUNCHER = "sdtune.training.kohya.launcher"
LAST_LINES = 30
_BAR = re.compile(r"\d+%\|")
SECONDS_TO_STOP = 10.0
SECONDS_BETWEEN_LOOKS = 0.2
"""For a signal, while nothing is said."""


@dataclass(frozen=True)
class SdScripts:
    """A copy of kohya-ss/sd-scripts and the Python that has what it needs."""

    folder: Path
    python: str


@dataclass(frozen=True)
class Averages:
    """sd-scripts' moving average of the loss, and the mean over the last tenth of the steps so far."""

    step: int
    avr_loss: float
    last_tenth: float


def find_sd_scripts(environment: Mapping[str, str] = os.environ) -> SdScripts:
    """As the environment says. ProjectError: it says nothing, or something that is not there."""
    folder = environment.get(FOLDER)
    if not folder:
        raise ProjectError(
            f"kohya's methods train with a copy of kohya-ss/sd-scripts, and {FOLDER} does not say where one is. The "
            "container has it; on this machine clone https://github.com/kohya-ss/sd-scripts at the commit in "
            f"containers/kohya/SD_SCRIPTS_COMMIT, install its requirements into a Python of its own, and set {FOLDER} "
            f"to the clone and {PYTHON} to that Python."
        )
    found = Path(folder).expanduser().resolve()
    if not (found / "train_network.py").is_file() or not (found / "library").is_dir():
        raise ProjectError(
            f"{FOLDER}: {folder} is no copy of kohya-ss/sd-scripts: no train_network.py and library/ there."
        )
    python = environment.get(PYTHON) or sys.executable
    if not Path(python).is_file():
        raise ProjectError(f"{PYTHON}: no program {python}; wanted the Python that has sd-scripts' requirements.")
    return SdScripts(found, python)


@dataclass(frozen=True)
class Listeners:
    """Who hears what sd-scripts says. begins: training begins, and waits. stepped: so does it after a step, after which
    samples were drawn and the loss was measured, or that was interrupted."""

    event: Callable[[events.Event], None]
    averages: Callable[[Averages], None]
    begins: Callable[[Talk], None]
    stepped: Callable[[Talk, int, bool], None]


class _GoneError(Exception):
    """It has ended while it was to answer; why, is told where its end is looked at."""


class Talk:
    """What a process of sd-scripts says, line by line, and the orders that it is given."""

    def __init__(self, process: subprocess.Popen[str], listeners: Listeners) -> None:
        self._process, self._listeners = process, listeners
        self.failed: events.Failed | None = None
        self.averages: Averages | None = None
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._stopping = False
        # Not into the same pipe: a progress bar does not end its line, and would swallow the event that follows.
        self._threads = [Thread(target=self._read, daemon=True), Thread(target=self._complain, daemon=True)]
        for thread in self._threads:
            thread.start()

    def hear_all(self) -> None:
        """Until it ends."""
        while (line := self._next()) is not None:
            self._hear(line)
        for thread in self._threads:
            thread.join()

    def save(self) -> None:
        """Have the state of the training written, after the step that it waits after."""
        self._say(orders.SAVE)
        while (line := self._next()) is not None:
            if _asked(line) == {"asks": orders.SAVED}:
                return
            self._hear(line)
        raise _GoneError

    def _hear(self, line: str) -> None:
        asked, event = _asked(line), events.parse(line)
        match asked:
            case {"asks": orders.BEGIN}:
                self._listeners.begins(self)
                self._say(orders.TRAIN)
            case {"asks": orders.STEP, "step": step, "whole": whole}:
                self._listeners.stepped(self, step, whole)
                self._say(orders.TRAIN)
            case _ if isinstance(event, events.Failed):
                self.failed = event
            case _ if event is not None:
                self._listeners.event(event)
            case _ if line.startswith(AVERAGE_MARK):
                self.averages = Averages(**json.loads(line))
                self._listeners.averages(self.averages)
            case _:
                _pass_on([line], self.last_lines)

    def _next(self) -> str | None:
        """The next line; None when there will be none. Meanwhile a signal that is held back is passed on, once."""
        while True:
            if interrupts.wanted() and not self._stopping:
                self._stopping = True
                self._say(orders.STOP)
            try:
                return self._lines.get(timeout=SECONDS_BETWEEN_LOOKS)
            except Empty:
                pass

    def _say(self, order: str) -> None:
        assert self._process.stdin is not None
        # If it has ended, that is found out by reading.
        with suppress(BrokenPipeError):
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in map(str.rstrip, self._process.stdout):
            self._lines.put(line)
        self._lines.put(None)

    def _complain(self) -> None:
        assert self._process.stderr is not None
        _pass_on(self._process.stderr, self.last_lines)


def run_sd_scripts(
    scripts: SdScripts, args: list[str], setup: Setup, work: Path, *, sdxl: bool, processes: int, listeners: Listeners
) -> Averages:
    """Train and return what the losses were at the end. Lines that are no events go to standard output.

    processes: one for each GPU; accelerate, which sd-scripts is built on, finds the others by torch's launcher.
    TrainingError: it did not end with 0, or made no step. An interrupt stops it first.
    """
    beside = work / "setup.json"
    beside.write_text(json.dumps(asdict(setup)), encoding="utf-8")
    process = subprocess.Popen(
        [*_python(scripts, processes), "-m", LAUNCHER, "sdxl" if sdxl else "sd", str(beside), *args],
        cwd=scripts.folder,
        env=_environment(work),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        # A terminal's Ctrl-C is for this process, which waits for the end of a step.
        start_new_session=True,
    )
    talk = Talk(process, listeners)
    try:
        with suppress(_GoneError):
            talk.hear_all()
        code = process.wait()
    except BaseException:
        _stop(process)
        raise
    if talk.failed is not None:
        raise ERRORS.get(talk.failed.kind, TrainingError)(talk.failed.text)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise _explained(code, list(talk.last_lines))
    if talk.averages is None:
        raise TrainingError(f"sd-scripts ended without a single step.{_quoted(list(talk.last_lines))}")
    return talk.averages


def _asked(line: str) -> dict[str, Any]:
    """What a line asks; nothing, if it is another. Before it may stand what a library wrote without ending its line."""
    start = line.find(orders.ASK_MARK)
    if start < 0:
        return {}
    try:
        asked: dict[str, Any] = json.loads(line[start:])
    except ValueError:
        return {}
    return asked


def _python(scripts: SdScripts, processes: int) -> list[str]:
    """What runs a module of sd-scripts' Python, so many times."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [scripts.python, *(several if processes > 1 else [])]


def _pass_on(lines: Iterable[str], last_lines: deque[str]) -> None:
    """Ordinary output, less progress bars."""
    for line in map(str.rstrip, lines):
        if line and not _BAR.search(line):
            last_lines.append(line)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


def _environment(work: Path) -> dict[str, str]:
    """Ours, but with nothing of our libraries on the path of sd-scripts' Python: only the sdtune package itself."""
    python_path = work / "python"
    python_path.mkdir(exist_ok=True)
    (python_path / "sdtune").symlink_to(Path(sdtune.__file__).parent)
    fixed = {
        # Model and tokenizers were fetched by then; a name that is asked for all the same is a mistake of ours.
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(python_path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Of its libraries about each other.
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    }
    # sd-scripts asks nobody for anything, so that it has no use for a token.
    ours = {name: value for name, value in os.environ.items() if name not in SECRETS.values()}
    return {**ours, **fixed}


def _explained(code: int, last_lines: list[str]) -> Exception:
    if any("OutOfMemoryError" in line for line in last_lines):
        # The same error as in this process, so that the user is told what helps.
        return torch.cuda.OutOfMemoryError(last_lines[-1])
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if code == -9:
        how += ", most often because the machine ran out of memory"
    return TrainingError(f"sd-scripts {how} and without its result.{_quoted(last_lines)}")


def _quoted(lines: list[str]) -> str:
    return " Its last lines:" + "".join(f"\n  | {line}" for line in lines) if lines else ""


def _stop(process: subprocess.Popen[str]) -> None:
    """Both end it at once: there is nobody left to give it orders, and SIGTERM reaches those that train with it."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.terminate()
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
