"""What a trial reports is what the package cloudml-hypertune would have written, whole at every moment, and true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypertune
import pytest
from PIL import Image

from sdtune import events
from sdtune.errors import TERMINATED, DatasetError, RecipeError, TrainingError
from sdtune.jobs.spec import plan_training
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.methods.kohya import KohyaNativeLora
from sdtune.training.hypertune import (
    DEFAULT_FILE,
    METRIC_FILE,
    MOST_BYTES,
    TRIAL_ID,
    Reports,
    open_reports,
    output_of_trial,
    seed_of_trial,
    trial_id,
)
from sdtune.training.kohya.process import FOLDER, PYTHON
from sdtune.training.run import Run
from tests.kohya.test_trainer import FAKE, arguments
from tests.training.conftest import EntryPoint, Trained
from tests.training.test_entry import arguments as arguments_of


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("trial", ["3", None])
def test_the_file_is_what_the_package_writes(
    trial: str | None, method: DreamBoothLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_790_000_000.25)
    if trial:
        monkeypatch.setenv(TRIAL_ID, trial)
    measured = [("held_out_loss", 0.123456, 1), ("held_out_loss", 1e-05, 2), ("held_out_loss", 3.0, 4)]

    monkeypatch.setenv(METRIC_FILE, str(tmp_path / "theirs" / "output.metrics"))
    package = hypertune.HyperTune()
    for name, value, step in measured:
        package.report_hyperparameter_tuning_metric(name, value, global_step=step)
    monkeypatch.setenv(METRIC_FILE, str(tmp_path / "ours" / "output.metrics"))
    ours = open_reports(method)
    assert ours
    for name, value, step in measured:
        ours.report(name, value, step)

    written = (tmp_path / "ours" / "output.metrics").read_bytes()
    assert written == (tmp_path / "theirs" / "output.metrics").read_bytes()
    assert written.count(b"\n") == 3


def test_it_is_written_where_the_package_writes() -> None:
    """Without the variable, which is the package's business to know."""
    assert hypertune.hypertune._DEFAULT_METRIC_PATH == DEFAULT_FILE


def test_no_trial_no_file(method: DreamBoothLora) -> None:
    assert open_reports(method, {}) is None


def test_an_earlier_try_of_the_trial_is_forgotten(method: DreamBoothLora, tmp_path: Path) -> None:
    file = tmp_path / "output.metrics"
    file.write_text("of earlier\n")
    with file.open() as held:
        reports = open_reports(method, {METRIC_FILE: str(file), TRIAL_ID: "1"})
        assert file.read_text() == ""
        assert reports
        reports.report("held_out_loss", 0.5, 4)
        # Who had it open finds the new reports: it is the same file.
        assert json.loads(held.readline())["global_step"] == "4"


@pytest.mark.parametrize("metrics", [("held_out_loss",), ("held_out_loss", "avr_loss")])
@pytest.mark.parametrize(("steps", "every"), [(5, 1), (40, 10), (100, 1), (1000, 1), (1000, 7), (10_000_000, 50_000)])
def test_reports_are_few_and_the_last_is_among_them(
    metrics: tuple[str, ...], steps: int, every: int, tmp_path: Path
) -> None:
    file = tmp_path / "output.metrics"
    reports = Reports(file, "123", steps, len(metrics))
    told = [step for step in range(0, steps + 1, every) if step < steps] + [steps]
    for step in told:
        for metric in metrics:
            reports.report(metric, 1 / 3e7, step)
    found = lines(file)
    assert file.stat().st_size <= MOST_BYTES
    for metric in metrics:
        at = [int(line["global_step"]) for line in found if metric in line]
        assert at == sorted(set(at))
        assert at[-1] == steps
        assert at[0] > 0
        # Not fewer than need be.
        assert len(at) >= min(len(told) - 1, 10)
    if steps <= 20 * every:
        assert [int(line["global_step"]) for line in found if "held_out_loss" in line] == told[1:][-len(found) :]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_ends_the_trial(value: float, tmp_path: Path) -> None:
    reports = Reports(tmp_path / "output.metrics", "1", 10)
    reports.report("held_out_loss", 0.5, 5)
    with pytest.raises(TrainingError, match=r"held_out_loss was (nan|inf) at step 10: the run has diverged"):
        reports.report("held_out_loss", value, 10)
    assert [line["held_out_loss"] for line in lines(tmp_path / "output.metrics")] == ["0.5"]


def test_a_file_that_cannot_be_written_is_told(method: DreamBoothLora, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(TrainingError, match=f"{METRIC_FILE}: .*taken/output.metrics cannot be written"):
        open_reports(method, {METRIC_FILE: str(tmp_path / "taken" / "output.metrics")})


WRITER = """
import sys
from pathlib import Path
from sdtune.training.hypertune import Reports

for number in range(200):
    reports = Reports(Path(sys.argv[1]) / str(number), "123", 30)
    for step in range(1, 31):
        reports.report("held_out_loss", 0.1234567, step)
"""


def test_a_reader_never_meets_a_torn_line(tmp_path: Path) -> None:
    """It would without the bound on the file: one read in two hundred, measured."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    newest = 0
    met = set()
    while writer.poll() is None:
        if (tmp_path / str(newest + 1)).exists():
            newest += 1
        try:
            found = (tmp_path / str(newest)).read_bytes()
        except FileNotFoundError:
            continue
        assert not found or found.endswith(b"\n")
        met.add((newest, len(found)))
    assert writer.returncode == 0
    assert len(met) > 50


def test_the_first_of_several_processes_alone_reports(
    method: DreamBoothLora, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "output.metrics"
    run.reports = Reports(file, "1", 4)
    monkeypatch.setattr(type(run), "is_first", property(lambda self: False))
    run.tell(events.Measure("held_out_loss", 4, 0.25))
    assert not file.exists()
    monkeypatch.setattr(type(run), "is_first", property(lambda self: True))
    run.tell(events.Measure("another", 4, 0.5))
    run.tell(events.Measure("held_out_loss", 4, 0.25))
    assert [line["held_out_loss"] for line in lines(file)] == ["0.25"]


def test_kohya_has_room_for_its_own_average(tmp_path: Path) -> None:
    method = KohyaNativeLora.from_settings({"max_train_steps": 1000})
    reports = open_reports(method, {METRIC_FILE: str(tmp_path / "metrics")})
    assert reports
    for step in range(1, 1001):
        reports.report("held_out_loss", 0.1, step)
        reports.report("avr_loss", 0.2, step)
    found = lines(tmp_path / "metrics")
    assert {"held_out_loss", "avr_loss"} <= set().union(*found)
    assert [int(line["global_step"]) for line in found[-2:]] == [1000, 1000]
    assert (tmp_path / "metrics").stat().st_size <= MOST_BYTES


def test_kohya_reports_both_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the launcher that runs inside of sd-scripts, around the stand-in for it."""
    monkeypatch.setenv(FOLDER, str(FAKE))
    monkeypatch.setenv(PYTHON, sys.executable)
    monkeypatch.setenv("FAKE", "learn")
    dataset = tmp_path / "data" / "3_sks cat"
    dataset.mkdir(parents=True)
    Image.new("RGB", (96, 64), "red").save(dataset / "a.png")
    file = tmp_path / "output.metrics"
    args = arguments(tmp_path, dataset.parent, num_samples=0, sample_every=0, held_out_every=2)
    command = [sys.executable, "-m", "sdtune.training", *args, "--trials"]
    environment = {**os.environ, TRIAL_ID: "2", METRIC_FILE: str(file)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = [event for line in ran.stdout.splitlines() if (event := events.parse(line))]
    measured = {event.step: event.value for event in told if isinstance(event, events.Measure)}
    found = lines(file)
    assert {int(line["global_step"]): float(line["held_out_loss"]) for line in found if "held_out_loss" in line} == {
        step: value for step, value in measured.items() if step
    }
    averages = {int(line["global_step"]): float(line["avr_loss"]) for line in found if "avr_loss" in line}
    assert 5 in averages
    assert all(value > 0 for value in averages.values())


def test_places_and_seeds_of_trials() -> None:
    assert output_of_trial("gs://bucket/study", trial_id({TRIAL_ID: "7"})) == "gs://bucket/study/trials/7"
    assert output_of_trial("/runs/study/", "7") == "/runs/study/trials/7"
    assert seed_of_trial(42, "7") == 49
    assert seed_of_trial(2**32 - 1, "2") == 1


@pytest.mark.parametrize("found", ["", "..", "a/b", "-1", "x" * 100])
def test_a_trial_without_a_name_for_a_folder_is_refused(found: str) -> None:
    with pytest.raises(RecipeError, match=TRIAL_ID):
        trial_id({TRIAL_ID: found})


@pytest.fixture
def trial(entry_point: EntryPoint, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    """The entry point as a trial has it: exit code, events, and what else was printed."""

    def run(settings: dict[str, Any], dataset: Path, output: Path, *more: str, **environment: str) -> Trained:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return entry_point(arguments_of(settings, dataset, output, "--trials", *more))

    return run


def test_a_trial_writes_beside_the_others_and_reports(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path, trial: Callable[..., Trained]
) -> None:
    """As Vertex AI starts it: the tuned values after our own arguments, a whole number as 2.0."""
    file = tmp_path / "output.metrics"
    settings = {**settings, "num_samples": 0, "held_out_every": 2}
    code, told, errors = trial(
        settings, pictures(), tmp_path / "study", "--seed-per-trial", "--learning_rate=0.002", "--rank=2.0",
        **{TRIAL_ID: "12", METRIC_FILE: str(file)},
    )  # fmt: skip
    assert code == 0, errors
    recipe = (tmp_path / "study" / "trials" / "12" / "recipe.yaml").read_text()
    assert "learning_rate: 0.002\n" in recipe
    assert "rank: 2\n" in recipe
    assert "seed: 54\n" in recipe
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["trials"]
    measured = {event.step: event.value for event in told if isinstance(event, events.Measure)}
    reported = {int(line["global_step"]): float(line["held_out_loss"]) for line in lines(file)}
    assert reported == {step: value for step, value in measured.items() if step}
    assert set(reported) == {2, 4}
    assert {line["trial"] for line in lines(file)} == {"12"}


def test_a_trial_that_is_stopped_has_reported_what_it_measured(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    """Also in place of what an earlier try of the same trial left."""
    file = tmp_path / "output.metrics"
    file.write_text("of earlier\n")
    method = DreamBoothLora.from_settings({**settings, "num_samples": 0, "max_train_steps": 200, "held_out_every": 8})
    job = plan_training(method, str(pictures()), str(tmp_path / "out"))
    process = subprocess.Popen(
        [sys.executable, "-m", "sdtune.training", *job.args],
        stdout=subprocess.PIPE, text=True, env={**os.environ, TRIAL_ID: "1", METRIC_FILE: str(file)},
    )  # fmt: skip
    assert process.stdout
    measured: dict[int, float] = {}
    for line in process.stdout:
        event = events.parse(line)
        if isinstance(event, events.Measure):
            measured[event.step] = event.value
            # It is there before it is told.
            reported = {int(line["global_step"]): float(line["held_out_loss"]) for line in lines(file)}
            assert set(reported.items()) <= set(measured.items())
            if reported:
                process.terminate()
    assert process.wait() == TERMINATED
    reported = {int(line["global_step"]): float(line["held_out_loss"]) for line in lines(file)}
    assert len(reported) == 1
    assert set(reported.items()) <= set(measured.items())


def test_a_trial_that_fails_reports_nothing(
    settings: dict[str, Any], tmp_path: Path, trial: Callable[..., Trained]
) -> None:
    file = tmp_path / "output.metrics"
    code, told, _ = trial(settings, tmp_path / "missing", tmp_path / "study", **{TRIAL_ID: "1", METRIC_FILE: str(file)})
    assert code == DatasetError.exit_code
    assert isinstance(told[-1], events.Failed)
    assert not file.exists() or file.read_text() == ""


def test_a_run_that_is_no_trial_is_refused_as_one(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path, trial: Callable[..., Trained]
) -> None:
    code, told, _ = trial(settings, pictures(), tmp_path / "study")
    assert code == RecipeError.exit_code
    assert told == [
        events.Failed(
            "recipe",
            f"trials: found nothing in {TRIAL_ID}, wanted the number of a trial, which a search sets; "
            "leave --trials out of a run that is none.",
        )
    ]
    assert not (tmp_path / "study").exists()
