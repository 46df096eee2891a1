"""sd-scripts as a process: a list of arguments, no shell, believed only when it ends with 0."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

import torch

import sdtune
from sdtune import events
from sdtune.errors import ERRORS, INTERRUPTED, ProjectError, TrainingError
from sdtune.training.kohya.launcher import AVERAGE_MARK, Setup
from sdtune.training.secrets import SECRETS

FOLDER = "SDTUNE_SD_SCRIPTS"
PYTHON = "SDTUNE_SD_SCRIPTS_PYTHON"
LAUNCHER = "sdtune.training.kohya.launcher"
LAST_LINES = 30
_BAR = re.compile(r"\d+%\|")
SECONDS_TO_STOP = 10.0


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


def run_sd_scripts(
    scripts: SdScripts,
    args: list[str],
    setup: Setup,
    work: Path,
    *,
    sdxl: bool,
    processes: int,
    on_event: Callable[[events.Event], None],
    on_averages: Callable[[Averages], None],
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
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    assert process.stderr is not None
    failed: events.Failed | None = None
    averages: Averages | None = None
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    # Not into the same pipe: a progress bar does not end its line, and would swallow the event that follows.
    complaints = Thread(target=_pass_on, args=(process.stderr, last_lines), daemon=True)
    complaints.start()
    try:
        for line in map(str.rstrip, process.stdout):
            event = events.parse(line)
            if isinstance(event, events.Failed):
                failed = event
            elif event is not None:
                on_event(event)
            elif line.startswith(AVERAGE_MARK):
                averages = Averages(**json.loads(line))
                on_averages(averages)
            else:
                _pass_on([line], last_lines)
        code = process.wait()
        complaints.join()
    except BaseException:
        _stop(process)
        raise
    if failed is not None:
        raise ERRORS.get(failed.kind, TrainingError)(failed.text)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise _explained(code, list(last_lines))
    if averages is None:
        raise TrainingError(f"sd-scripts ended without a single step.{_quoted(list(last_lines))}")
    return averages


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
    process.terminate()
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
