"""A few kills at random moments; ``make kills`` makes two hundred."""

from __future__ import annotations

from pathlib import Path

from tests.survival.forks import Forks
from tests.survival.kills import kill_runs


def test_every_run_ends_with_the_same_files(tmp_path: Path) -> None:
    with Forks() as forks:
        report = kill_runs(forks, tmp_path, kills=8, seed=7, kinds=("lora",), each=4)
    assert report.wrong == [], str(report)
    assert sum(report.kills.values()) == 8
    assert report.went_on > 0
