"""Runs that are killed at random moments, again and again, until they finish: ``python -m tests.survival.kills``.

Each run must end with the same files as one that nobody disturbed, bit for bit; whatever lies in its output at the
moment of a kill must be whole; and what SIGTERM or Ctrl-C stops must be gone within ten seconds, with the exit code
that says so.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdtune import events
from tests.survival import kohya_runs
from tests.survival.forks import Forks, Trained
from tests.survival.runs import KINDS, all_is_whole, result_of, words_of

SIGNALS = {signal.SIGKILL: {-9}, signal.SIGTERM: {143}, signal.SIGINT: {130}}
"""With the exit codes that they must have, if the run has not finished before."""
PLANS = ({"checkpointing_steps": 1}, {"checkpointing_steps": 2}, {"checkpointing_steps": 5}, {"checkpointing_steps": 0})
"""Of when checkpoints are written; the last at a signal and at the end alone, and what SIGKILL takes is done again."""


@dataclass
class Report:
    """What came of it. phases: what the runs were doing when they were killed."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    went_on: int = 0
    seconds_to_stop: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        slowest = f"{max(self.seconds_to_stop):.1f}" if self.seconds_to_stop else "-"
        median = f"{statistics.median(self.seconds_to_stop):.1f}" if self.seconds_to_stop else "-"
        return (
            f"{sum(self.kills.values())} kills of {self.runs} runs in {self.seconds:,.0f} s: {dict(self.kills)}\n"
            f"while they were at: {dict(self.phases.most_common())}\n"
            f"{self.went_on} starts went on from a checkpoint; from a signal to its end {median} s, at most {slowest}\n"
            f"runs with another result, or another fault: {len(self.wrong)}\n" + "\n".join(self.wrong)
        )


def kill_runs(
    forks: Forks,
    folder: Path,
    kills: int,
    seed: int,
    kinds: tuple[str, ...],
    each: int = 5,
    after_each: Callable[[Report], object] = bool,
) -> Report:
    """Kill so many times: each run ``each`` times, then it may finish. after_each: called after each run."""
    chance = random.Random(seed)
    report, started = Report(), time.monotonic()
    kohya_runs.lay_out(folder / "datasets")
    undisturbed: dict[str, dict[str, str]] = {}
    lengths: dict[str, float] = {}
    for kind in kinds:
        undisturbed[kind], lengths[kind] = _undisturbed(forks, folder, kind)
    while sum(report.kills.values()) < kills:
        kind = kinds[report.runs % len(kinds)]
        output = folder / f"{report.runs}" / "out"
        plan = chance.choice(PLANS)
        words = _words(folder, kind, output, **plan)
        wanted, length = undisturbed[kind], lengths[kind]
        for _ in range(min(each, kills - sum(report.kills.values()))):
            number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGINT])
            training = forks.start(words, folder / "log")
            code, seconds = training.kill_after(chance.uniform(0, length), number)
            report.wrong += [f"{kind} {output}: {fault}" for fault in _faults(training, output, code, seconds, number)]
            report.went_on += _went_on(training)
            if code == 0:
                # The machine is less busy than it was, and later kills should find something to kill.
                lengths[kind] *= 0.9
                break
            report.kills[number.name] += 1
            report.phases[_phase(training)] += 1
            if number != signal.SIGKILL:
                report.seconds_to_stop.append(seconds)
        training = forks.start(words, folder / "log")
        if (code := forks.code()) != 0:
            report.wrong.append(f"{kind} {output}: ended with {code}: {training.log.read_text()[-2000:]}")
        elif (found := result_of(output)) != wanted:
            other = [name for name in wanted if found.get(name) != wanted[name]]
            report.wrong.append(f"{kind} {output} with {plan}: other files: {other}, {sorted(found.keys() - wanted)}")
        elif (output / "checkpoints").exists():
            report.wrong.append(f"{kind} {output}: checkpoints are left")
        report.went_on += _went_on(training)
        report.runs += 1
        report.seconds = time.monotonic() - started
        after_each(report)
    return report


def _words(folder: Path, kind: str, output: Path, **plan: int) -> list[str]:
    if kind in kohya_runs.KINDS:
        return kohya_runs.words_of(kind, folder / "datasets", output, **plan)
    return words_of(kind, output, **plan)


def _undisturbed(forks: Forks, folder: Path, kind: str) -> tuple[dict[str, str], float]:
    """The result, and how many seconds it took. Both runs must agree, or nothing here would prove anything."""
    found, seconds = [], 0.0
    for name in ("first", "second"):
        started = time.monotonic()
        output = folder / kind / name / "out"
        training = forks.start(_words(folder, kind, output), folder / "log")
        assert forks.code() == 0, training.log.read_text()
        seconds = time.monotonic() - started
        found.append(result_of(output))
    assert found[0] == found[1]
    return found[0], seconds


def _faults(training: Trained, output: Path, code: int, seconds: float, number: signal.Signals) -> Iterator[str]:
    try:
        all_is_whole(output)
    except AssertionError as error:
        yield f"not whole after {number.name}: {error}"
    # A process that has not begun to listen yet is ended by the signal itself.
    if code not in {*SIGNALS[number], 0, *(() if training.told() else (-number,))}:
        yield f"{number.name} gave {code}: {training.log.read_text()[-2000:]}"
    if seconds > 10:
        yield f"{number.name} took {seconds:.1f} s while at {_phase(training)}"


def _went_on(training: Trained) -> bool:
    return any(isinstance(event, events.Note) and "Going on from" in event.text for event in training.told())


def _phase(training: Trained) -> str:
    """What it said last that it was doing."""
    for event in reversed(training.told()):
        match event:
            case events.Step() | events.Checkpoint():
                return "train"
            case events.Phase():
                return event.name
    return "start"


def _show(report: Report) -> None:
    sys.stderr.write(f"{sum(report.kills.values())} kills of {report.runs} runs, {len(report.wrong)} faults\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill training runs at random moments.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--kinds", nargs="+", default=["lora", "whole-ema", "lora-prior-text-encoder"],
        choices=[*KINDS, *kohya_runs.KINDS], help="those of kohya want a copy of sd-scripts (docs/kohya.md)",
    )  # fmt: skip
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sdtune-kills-") as folder, Forks() as forks:
        report = kill_runs(forks, Path(folder), asked.kills, asked.seed, tuple(asked.kinds), after_each=_show)
    sys.stdout.write(f"{report}\n")
    raise SystemExit(bool(report.wrong))


if __name__ == "__main__":
    main()
