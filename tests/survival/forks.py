"""Training processes that start at once: a process that has imported everything makes copies of itself.

A start of Python with torch and diffusers takes ten seconds, most of what a run on the shipped model takes; hundreds of
runs can be killed only if that is paid once. A copy is a process of its own, and runs what containers run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sdtune import events

ROOT = Path(__file__).parent.parent.parent


class Forks:
    """Makes one training process at a time. environment: more of it, for all of them."""

    def __init__(self, **environment: str) -> None:
        fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.survival.forks"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **fixed, **environment},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        try:
            self._server.wait(30)
        except subprocess.TimeoutExpired:
            self._server.kill()

    def start(self, words: Sequence[str], log: Path, **environment: str) -> Trained:
        """Start ``python -m sdtune.training WORDS``; what it prints goes to ``log``."""
        assert self._server.stdin
        # What another has said there must not be taken for its words.
        log.unlink(missing_ok=True)
        self._server.stdin.write(json.dumps({"words": list(words), "log": str(log), "environment": environment}) + "\n")
        self._server.stdin.flush()
        return Trained(self, json.loads(self._answer())["pid"], log)

    def _answer(self) -> str:
        assert self._server.stdout
        line = self._server.stdout.readline()
        assert line, f"the server of forks has ended with {self._server.poll()}"
        return line

    def has_answered(self, seconds: float) -> bool:
        """The process has ended, or does within so many seconds."""
        return bool(select.select([self._server.stdout], [], [], seconds)[0])

    def code(self) -> int:
        """Wait for the end of the process; its exit code, negative for the signal that ended it."""
        code: int = json.loads(self._answer())["code"]
        return code


@dataclass
class Trained:
    """One training process."""

    forks: Forks
    pid: int
    log: Path

    def told(self) -> list[events.Event]:
        """What it has said by now."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return [event for line in lines if (event := events.parse(line))]

    def kill(self, number: int) -> None:
        """Send it a signal; none if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill_when(self, number: int, reached: Callable[[events.Event], bool]) -> int:
        """Send it a signal when it has said something; its exit code."""
        while not self.forks.has_answered(0.005):
            if any(map(reached, self.told())):
                self.kill(number)
                break
        return self.forks.code()

    def kill_after(self, seconds: float, number: int) -> tuple[int, float]:
        """Send it a signal after so many seconds; its exit code, and how many seconds later it had ended."""
        self.forks.has_answered(seconds)
        self.kill(number)
        sent = time.monotonic()
        return self.forks.code(), time.monotonic() - sent


def serve() -> None:
    """Read an order from each line of standard input, and answer with the process and then with how it ended."""
    for name in ("sdtune.training.__main__", "sdtune.training.run", *_trainers()):
        importlib.import_module(name)
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _train(order)
        _answer({"pid": pid})
        _, status = os.waitpid(pid, 0)
        _answer({"code": os.waitstatus_to_exitcode(status)})


def _answer(said: dict[str, int]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def _trainers() -> list[str]:
    folder = ROOT / "src" / "sdtune" / "training" / "trainers"
    return [f"sdtune.training.trainers.{file.stem}" for file in folder.glob("*.py") if file.stem != "__init__"]


def _train(order: dict[str, Any]) -> None:
    from sdtune.training.__main__ import main

    code = 1
    try:
        # A shell starts what it puts into the background deaf to Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(order["environment"])
        log = os.open(order["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = main(order["words"])
        sys.stdout.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
