"""The local backend: real processes."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sdtune.backends.local.backend import LocalBackend
from sdtune.backends.registry import open_backend
from sdtune.errors import ProjectError
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import JobSpec


class Scripted(LocalBackend):
    """A local backend whose jobs run a script of the test in place of the trainer."""

    def __init__(self, script: str) -> None:
        super().__init__()
        self.script = script

    def render(self, job: JobSpec) -> dict[str, Any]:
        return {**super().render(job), "command": [sys.executable, "-c", self.script, *job.args]}


JOB = JobSpec("run", "train", "dreambooth-lora", "diffusers", "/out", ("train", 'a "quoted" $(word)\n'))


def run(script: str) -> tuple[list[str], int | None]:
    backend = Scripted(script)
    job_id = backend.submit(JOB).job_id
    return [line.text for line in backend.follow(job_id)], backend.wait(job_id).exit_code


def test_the_job_gets_the_arguments_of_a_container_and_no_shell() -> None:
    lines, code = run("import sys; print(sys.argv[1:])")
    assert (lines, code) == ([repr(list(JOB.args))], 0)
    rendered = LocalBackend().render(JOB)
    assert rendered["command"] == [sys.executable, "-m", "sdtune.training", *JOB.args]


def test_both_streams_come_in_the_order_they_were_written() -> None:
    lines, code = run("import sys; print('a'); print('b', file=sys.stderr); print('c ✓'); sys.exit(7)")
    assert (lines, code) == (["a", "b", "c ✓"], 7)


def test_a_bar_that_redraws_itself_is_one_line() -> None:
    assert run("print('10%\\r50%\\r100%')")[0] == ["100%"]


def test_bytes_that_are_no_text_do_not_end_the_log() -> None:
    lines, _ = run("import sys; sys.stdout.buffer.write(b'\\xff\\n'); sys.stdout.flush(); print('on')")
    assert lines[-1] == "on"


def test_a_killed_job_tells_its_signal() -> None:
    assert run("import os; os.kill(os.getpid(), 9)")[1] == -9


@pytest.mark.parametrize("stubborn", [False, True], ids=["obedient", "ignores SIGTERM"])
def test_cancel_stops_the_job(stubborn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtune.backends.local.backend.SECONDS_TO_STOP", 0.5)
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " if stubborn else ""
    backend = Scripted(f"{ignore}import time; print('up', flush=True); time.sleep(60)")
    job_id = backend.submit(JOB).job_id
    assert next(backend.follow(job_id)).text == "up"
    started = time.monotonic()
    backend.cancel(job_id)
    assert time.monotonic() - started < 20
    assert backend.wait(job_id).exit_code == (-9 if stubborn else -15)
    backend.cancel(job_id)  # once more does no harm


def test_without_torch_the_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ProjectError, match=r"pip install -e '\.\[train\]'"):
        LocalBackend().submit(JOB)


def test_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    backend = LocalBackend()
    assert backend.resolve("data") == str(tmp_path / "data")
    assert backend.resolve("~/data") == str(tmp_path / "home" / "data")


def test_names_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "sub").mkdir()
    assert LocalBackend().list_names(str(tmp_path)) == ["a.txt", "b.txt", "sub"]
    assert LocalBackend().list_names(str(tmp_path / "nowhere")) == []


@pytest.mark.parametrize(
    ("folder", "can"), [("new/deep", True), ("", True), ("file", False), ("file/sub", False), ("/proc/new", False)]
)
def test_where_a_result_can_go(tmp_path: Path, folder: str, can: bool) -> None:
    (tmp_path / "file").write_text("")
    assert (LocalBackend().why_not_written(str(tmp_path / folder)) is None) is can
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ProjectError, match="no backend is called 'moon'; there are: local, vertex"):
        open_backend("moon", Placement())
