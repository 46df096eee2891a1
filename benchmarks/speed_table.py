"""The JSON of train_speed.py as one table in Markdown, with ratios: what goes into RESULTS.md.

python benchmarks/speed_table.py FILE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

TERAFLOPS = 989
"""What one H100 or H200 can do in a second, in bf16, dense."""
HEAD = (
    "work", "trainer", "time", "images/s", f"of {TERAFLOPS} TFLOP/s", "GiB, torch", "GiB, driver", "speed",
    "memory, torch", "memory, driver",
)  # fmt: skip
OURS = "sdtune"

Run = dict[str, Any]
Row = tuple[str, ...]


def seconds_per_step(points: Sequence[Sequence[float]], warm_up: int) -> float | None:
    """The mean from the first point at or after step ``warm_up`` to the last; None: there are not two such points.

    points: step, and the seconds at which the device had done it. Not every step needs one.
    """
    steady = [point for point in points if point[0] >= warm_up]
    if len(steady) < 2 or steady[-1][0] <= steady[0][0]:
        return None
    return (steady[-1][1] - steady[0][1]) / (steady[-1][0] - steady[0][0])


def job_seconds(run: Run, steps: int, end: str) -> float | None:
    """Seconds of a job of so many steps, from the start of its process.

    end: ``on_disk``, until what it trained is on disk, or ``seconds``, until the process ends. Measured where the run
    had so many steps; else all that is not steady steps as measured, and the others at their pace. None: the run did
    not come to its own end.
    """
    if run["failed"] or run["stopped"] or run[end] is None or run["seconds_per_step"] is None:
        return None
    return float(run[end] + (steps - run["steps"]) * run["seconds_per_step"])


def markdown(report: dict[str, Any]) -> str:
    """The table, and below it what it was measured on. What was not run has no row."""
    runs: list[Run] = report["runs"]
    rows = [row for name in dict.fromkeys(run["work"] for run in runs) for row in _rows(name, runs)]
    return "\n".join([*_aligned([HEAD, *rows]), "", *_notes(report)])


def _rows(name: str, runs: Sequence[Run]) -> Iterator[Row]:
    """Of one work: each peer, then ours against each of them; then the same of the whole job."""
    # Ours last; the sort keeps the order of the peers.
    these = sorted((run for run in runs if run["work"] == name), key=lambda run: run["trainer"] == OURS)
    for run in these:
        yield _row(run, [*these, *_on_one_gpu(run, runs)] if run["trainer"] == OURS else [])
    ours = these[-1]
    if ours["trainer"] != OURS or not ours["whole"]:
        return
    for end, until in (("on_disk", "the LoRA is on disk"), ("seconds", "the process ends")):
        jobs = {run["trainer"]: job_seconds(run, ours["steps"], end) for run in these}
        for run in these:
            if seconds := jobs[run["trainer"]]:
                from_fewer = "" if run["steps"] == ours["steps"] else f" (of {run['steps']} steps)"
                speed = (
                    _ratios({name: job / seconds if job else None for name, job in jobs.items()}) if run is ours else ""
                )
                title = f"the same, {ours['steps']} steps, until {until}"
                yield (title, run["trainer"], f"{seconds:.1f} s{from_fewer}", "", "", "", "", speed, "", "")


def _row(run: Run, others: Sequence[Run]) -> Row:
    """others: what the run is compared with; itself does not count."""
    pace, rate = run["seconds_per_step"], run["images_per_second"]
    if run["failed"] or pace is None:
        why = "failed" if run["failed"] else "out of time"
        return (run["title"], run["trainer"], why, *[""] * (len(HEAD) - 3))
    share = f"{rate / run['gpus'] * run['teraflop'] / TERAFLOPS:.1%}" if run["teraflop"] else ""
    measured = {
        "one GPU" if other["trainer"] == OURS else other["trainer"]: other
        for other in others
        if other is not run and not other["failed"]
    }

    def against(figure: str) -> str:
        return _ratios(
            {name: run[figure] / other[figure] if other[figure] else None for name, other in measured.items()}
        )

    return (
        run["title"], run["trainer"], f"{pace:.4f} s/step", f"{rate:.1f}", share, _gib(run["allocated"]),
        _gib(run["driver"]), against("images_per_second"),
        against("allocated") if run["allocated"] else "", against("driver") if run["driver"] else "",
    )  # fmt: skip


def _on_one_gpu(run: Run, runs: Iterable[Run]) -> list[Run]:
    """Of a run on several GPUs: the same on one."""
    alike = ("trainer", "family", "resolution", "batch", "whole_model")
    on_one = [one for one in runs if one["gpus"] == 1 and all(one[key] == run[key] for key in alike)]
    return on_one if run["gpus"] > 1 else []


def _ratios(ratios: dict[str, float | None]) -> str:
    """Ours as a multiple of each other's."""
    return ", ".join(f"{ratio:.2f} × {name}" for name, ratio in ratios.items() if ratio and name != OURS)


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _aligned(rows: Sequence[Row]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    head, *others = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    line = " | ".join("-" * width for width in widths)
    return [f"| {text} |" for text in (head, line, *others)]


def _notes(report: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield f"{report['date']}; {report['machine']}, {report['cores']} cores; {versions}."
    yield f"Steady pace after {report['warm_up']} steps; speed and memory: ours as a multiple of the other's."
    if report["tiny"]:
        yield "Of small models: that it runs is all that this says."
    for run in report["runs"]:
        if run["failed"]:
            yield f"{run['title']}, {run['trainer']}: {run['failed'].strip().splitlines()[-1]}"


def main() -> None:
    """Print the table of a file."""
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
