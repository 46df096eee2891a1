"""A search on this machine: what is tried, kept, stopped and taken up again. Its trials are stand-ins."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdtune.backends.local import backend as local_backend
from sdtune.backends.local import studies
from sdtune.backends.local.optuna_study import OptunaStudy
from sdtune.backends.local.studies import LocalStudies
from sdtune.backends.local.trial_process import LOG_FILE, METRIC_FILE, identity, read_reports
from sdtune.errors import JobError, ProjectError, RecipeError
from sdtune.jobs.search_space import Parameter, Parent, SearchSpace
from sdtune.jobs.spec import plan_training
from sdtune.jobs.study import Measurement, Study, StudyRecord
from sdtune.methods.dreambooth import DreamBoothLora

STAND_IN = Path(__file__).with_name("stand_in_trial.py")
RATE = Parameter("learning_rate", "double", low=1e-5, high=1e-1, scale="log")
RANK = Parameter("rank", "discrete", values=(4, 8, 16, 32))


def a_study(output: Path, *parameters: Parameter, settings: dict[str, Any] | None = None, **more: Any) -> Study:
    recipe = {"instance_prompt": "a photo of sks cat", "max_train_steps": 20, "held_out_every": 5, **(settings or {})}
    job = plan_training(DreamBoothLora.from_settings(recipe), "/data", str(output))
    space = SearchSpace(parameters or (RATE, RANK))
    # Drawn at random: a Gaussian process would import torch in every test.
    said = {"algorithm": "random", "max_trials": 5, "parallel_trials": 2, "max_failed_trials": 0, **more}
    return Study(name=output.name, method="dreambooth-lora", space=space, metric="held_out_loss", job=job, **said)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_ins(monkeypatch.setattr)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def use_stand_ins(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Trials run the stand-in in place of sdtune.training, with all else as it is."""

    def render(backend: Any, job: Any) -> dict[str, Any]:
        return {"command": [sys.executable, str(STAND_IN), *job.args], "environment": {"PYTHONUNBUFFERED": "1"}}

    set_attribute(local_backend.LocalBackend, "render", render)


def told(monkeypatch: pytest.MonkeyPatch, **trials: dict[str, Any]) -> None:
    """What the stand-ins do; trial_3 for one, all for all."""
    by_trial = {"*" if name == "all" else name.removeprefix("trial_"): does for name, does in trials.items()}
    monkeypatch.setenv("STAND_IN", json.dumps(by_trial))


def run(study: Study) -> StudyRecord:
    """To its end."""
    place = LocalStudies()
    return list(place.follow(place.submit(study).job_id))[-1]


def starts(study: Study, trial: str) -> list[list[str]]:
    """Each start of a trial: its process, GPU, learning rate, seed."""
    file = Path(study.output) / "trials" / trial / "starts.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def parameters(record: StudyRecord) -> list[dict[str, Any]]:
    return [dict(trial.parameters) for trial in record.trials]


def test_a_search_runs_to_its_end(tmp_path: Path) -> None:
    study = a_study(tmp_path / "study", seed_per_trial=True)
    place = LocalStudies()
    submitted = place.submit(study)
    seen = list(place.follow(submitted.job_id))
    assert max(sum(trial.state == "active" for trial in record.trials) for record in seen) == 2
    assert {record.state for record in seen[:-1]} == {"running"}
    record = seen[-1]
    assert (record.state, record.error) == ("succeeded", "")
    assert [trial.id for trial in record.trials] == ["1", "2", "3", "4", "5"]
    for trial in record.trials:
        assert trial.state == "succeeded"
        rate = float(trial.parameters["learning_rate"])
        assert RATE.low <= rate <= RATE.high
        assert trial.parameters["rank"] in RANK.values
        wanted = abs(math.log10(rate) + 3)
        assert [(one.step, one.metrics["held_out_loss"]) for one in trial.measurements] == [
            (step, pytest.approx(wanted + 1 / step)) for step in (5, 10, 15, 20)
        ]
        assert trial.final == trial.measurements[-1]
        assert trial.started and trial.ended and trial.started < trial.ended  # noqa: PT018
        (start,) = starts(study, trial.id)
        assert (start[0], float(start[2]), int(start[3])) == (trial.job_id, rate, 42 + int(trial.id))
        log = (Path(study.output) / "trials" / trial.id / LOG_FILE).read_text()
        assert '"event": "finished"' in log
    assert record.best
    assert record.value_of(record.best) == min(record.value_of(trial) or 0 for trial in record.trials)
    # The same when it is looked for later, from elsewhere.
    assert place.find(study.output) == record
    assert (record.study_id, record.number) == (study.output, submitted.number)
    assert record.space == study.space
    assert record.args == study.trial_job.args
    assert (Path(study.output) / ".sdtune").exists()


def test_the_same_study_tries_the_same(tmp_path: Path) -> None:
    first, second = (run(a_study(tmp_path / name, max_trials=4)) for name in ("a", "b"))
    assert parameters(first) == parameters(second)
    other = run(a_study(tmp_path / "c", settings={"seed": 7}, max_trials=4))
    assert parameters(other) != parameters(first)


def best_of_twelve(algorithm: str, seed: int, folder: Path) -> float:
    """Of a smooth loss that is 0 at its least, without processes."""
    study = a_study(folder, algorithm=algorithm, max_trials=12, settings={"seed": seed})
    folder.mkdir()
    kept = OptunaStudy(folder)
    kept.begin(study)
    found = []
    while asked := kept.ask():
        rate, rank = float(asked.values["learning_rate"]), float(asked.values["rank"])
        found.append((math.log10(rate) + 3) ** 2 + 0.01 * abs(math.log2(rank) - 4))
        kept.report(asked.trial_id, (Measurement(20, {"held_out_loss": found[-1]}),))
        kept.end(asked.trial_id, "")
    return min(found)


def test_the_default_learns_from_earlier_trials(tmp_path: Path) -> None:
    """Measured with seeds 1 to 8: at most 0.0004, and at random at least 0.02."""
    learned = best_of_twelve("default", 1, tmp_path / "default")
    drawn = best_of_twelve("random", 1, tmp_path / "random")
    assert learned < 0.2 * drawn


DRIVER = """
import json, sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from tests.backends import test_local_studies as tests
tests.use_stand_ins(setattr)
study = tests.a_study(Path(sys.argv[1]), **json.loads(sys.argv[2]))
place = tests.LocalStudies()
try:
    for record in place.follow(place.submit(study).job_id):
        print(record.state, *(trial.state for trial in record.trials), flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


def drive(study_folder: Path, **more: Any) -> subprocess.Popen[str]:
    """A launcher in a process of its own."""
    script = DRIVER.format(root=str(Path(__file__).parents[2]))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(study_folder), json.dumps(more)], stdout=subprocess.PIPE, text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_goes_on_where_it_was_stopped(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By force, trials outlive their launcher, and must be gone before they run again; by Ctrl-C it ends them."""
    undisturbed = run(a_study(tmp_path / "undisturbed"))
    study = a_study(tmp_path / "study")
    monkeypatch.setattr(local_backend, "SECONDS_TO_STOP", 5.0)
    waits = {"wait_at": 10, "for": str(tmp_path / "go on")}
    told(monkeypatch, trial_3=waits, trial_4=waits)
    launcher = drive(tmp_path / "study")

    def both_wait() -> bool:
        if not (tmp_path / "study" / studies.DATABASE).exists() or not starts(study, "4"):
            return False
        trials = LocalStudies().find(study.output).trials
        return len(trials) == 4 and all(len(trial.measurements) == 1 for trial in trials[2:])

    wait_for(both_wait)
    assert LocalStudies().find(study.output).state == "running"
    with pytest.raises(JobError, match="a search is at work in"):
        LocalStudies().submit(study)
    orphans = [int(starts(study, trial)[0][0]) for trial in ("3", "4")]
    launcher.send_signal(number)
    assert launcher.wait(30) == (130 if number == signal.SIGINT else -signal.SIGKILL)
    alive = [pid for pid in orphans if identity(pid)]
    assert len(alive) == (0 if number == signal.SIGINT else 2)

    left = LocalStudies().find(study.output)
    assert left.state == "cancelled"
    assert "goes on" in left.error
    assert [trial.state for trial in left.trials] == ["succeeded", "succeeded", "requested", "requested"]

    told(monkeypatch)
    record = run(study)
    assert not [pid for pid in alive if identity(pid) and _state(pid) != "Z"]
    assert record.state == "succeeded"
    # Nothing was drawn anew for having been stopped, nothing lost, nothing run twice that had ended.
    assert parameters(record) == parameters(undisturbed)
    assert [record.value_of(trial) for trial in record.trials] == [
        undisturbed.value_of(trial) for trial in undisturbed.trials
    ]
    assert [len(starts(study, str(trial))) for trial in range(1, 6)] == [1, 1, 2, 2, 1]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def test_a_trial_that_kills_its_search_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, trial_1={"wait_at": 5, "for": str(tmp_path / "never")})
    study = a_study(tmp_path / "study", max_trials=2, parallel_trials=1)
    for attempt in range(1, 4):
        launcher = drive(tmp_path / "study", max_trials=2, parallel_trials=1)
        wait_for(lambda wanted=attempt: len(starts(study, "1")) == wanted and LocalStudies().find(study.output).trials)
        launcher.kill()
        launcher.wait()
    record = run(study)
    assert [trial.state for trial in record.trials] == ["infeasible", "succeeded"]
    assert record.trials[0].reason == "its search died 3 times while it ran."
    assert len(starts(study, "1")) == 3


def test_it_can_be_cancelled_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, all={"wait_at": 5, "for": str(tmp_path / "never")})
    study = a_study(tmp_path / "study")
    launcher = drive(tmp_path / "study")
    wait_for(lambda: starts(study, "2"))
    watched = LocalStudies().follow(study.output)
    assert next(watched).state == "running"
    LocalStudies().cancel(study.output)
    launcher.wait(10)
    assert [record.state for record in watched][-1] == "cancelled"
    wait_for(lambda: all(_state(int(starts(study, trial)[0][0])) in ("Z", "gone") for trial in ("1", "2")))
    with pytest.raises(JobError, match="is not running: cancelled"):
        LocalStudies().cancel(study.output)


def test_more_trials_may_be_asked_for_and_nothing_else_changed(tmp_path: Path) -> None:
    study = a_study(tmp_path / "study", max_trials=2)
    first = run(study)
    wider = replace(study, space=SearchSpace((replace(RATE, low=1e-6), replace(RANK, values=(4, 8)))))
    for act in (LocalStudies().check, LocalStudies().submit):
        with pytest.raises(RecipeError) as refused:
            act(wider)
        assert str(refused.value) == (
            f"{study.output} holds another search, which cannot go on with other settings:\n"
            "  tune learning_rate: 1e-05 to 0.1, log then, 1e-06 to 0.1, log now\n"
            "  tune rank: 4, 8, 16, 32 then, 4, 8 now\n"
            "Give the same again (more trials may be asked for), or another --output."
        )
    longer = a_study(tmp_path / "study", settings={"max_train_steps": 40}, seed_per_trial=True, measurement="best")
    with pytest.raises(RecipeError) as refused:
        LocalStudies().check(longer)
    assert "  measurement: last then, best now\n" in str(refused.value)
    assert "  max_train_steps: 20 then, 40 now\n" in str(refused.value)
    assert "  seed-per-trial: nothing then, asked for now\n" in str(refused.value)

    more = replace(study, max_trials=4)
    assert LocalStudies().check(more) == [f"{study.output} holds this search already: it goes on after 2 trials."]
    record = run(more)
    assert len(record.trials) == 4
    assert record.trials[:2] == first.trials
    # And once more: there is nothing left to do.
    assert run(more).trials == record.trials


def test_what_is_no_study_is_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no search is kept in"):
        LocalStudies().find(str(tmp_path))
    (tmp_path / "study.db").write_text("not a database, and long enough to be looked at as one")
    with pytest.raises(JobError, match=r"study\.db cannot be read as a study: "):
        LocalStudies().find(str(tmp_path))


def test_one_whose_launcher_died_at_once_has_not_begun(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    OptunaStudy(tmp_path / "study")
    with pytest.raises(JobError, match="has not begun; start it again"):
        LocalStudies().find(str(tmp_path / "study"))
    assert run(a_study(tmp_path / "study", max_trials=1)).state == "succeeded"


def test_those_below_this_folder_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("out/older", "newer"):
        run(a_study(tmp_path / name, max_trials=1))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.db").write_text("not a database, and long enough to be looked at as one")
    monkeypatch.chdir(tmp_path)
    assert [record.name for record in LocalStudies().studies()] == ["newer", "older"]


@pytest.mark.parametrize(
    ("rule", "why"),
    [("median", "worse than the median of the others"), ("decay-curve", "hardly a chance to become the best")],
)
def test_early_stopping_ends_a_trial_that_promises_little(
    rule: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four trials to judge by; the fifth is much worse, and does not come to its end."""
    told(monkeypatch, trial_5={"worse": 10.0, "wait_at": 15, "for": str(tmp_path / "never")})
    study = a_study(tmp_path / "study", early_stopping=rule, parallel_trials=1, max_trials=6)
    place = LocalStudies()
    seen = list(place.follow(place.submit(study).job_id))
    record = seen[-1]
    assert record.state == "succeeded"
    stopped = record.trials[4]
    assert "stopping" in {item.trials[4].state for item in seen if len(item.trials) > 4}
    assert stopped.state == "succeeded"
    assert stopped.reason in {f"stopped early at step {step}: {why}." for step in (5, 10)}
    assert [one.step for one in stopped.measurements] == [5, 10]
    assert stopped.final == stopped.measurements[-1]
    assert record.best != stopped
    assert all(trial.reason == "" for trial in record.trials[:4])


def test_a_trial_is_not_stopped_while_it_saves_its_result(tmp_path: Path) -> None:
    """However bad its last measurement is; nor in its first quarter."""
    folder = tmp_path / "study"
    folder.mkdir()
    kept = OptunaStudy(folder)
    kept.begin(a_study(folder, early_stopping="median", max_trials=5, settings={"held_out_every": 1}))
    for number in range(1, 6):
        asked = kept.ask()
        assert asked
        if number < 5:
            kept.report(asked.trial_id, tuple(Measurement(step, {"held_out_loss": 0.1}) for step in (1, 4, 5, 20)))
            kept.end(asked.trial_id, "")
    assert not kept.report("5", (Measurement(4, {"held_out_loss": 9.0}),))
    assert not kept.report("5", (Measurement(4, {"held_out_loss": 9.0}), Measurement(20, {"held_out_loss": 9.0})))


@pytest.mark.parametrize(
    ("settings", "more", "said"),
    [
        ({"held_out_every": 0}, {"early_stopping": "median"}, "give --held-out-every, such as 1."),
        ({"held_out_every": 20}, {"early_stopping": "decay-curve"}, "with held_out_every 20 they report at their end"),
        ({}, {"algorithm": "grid"}, "tune learning_rate: a grid needs values"),
    ],
)
def test_what_cannot_be_done_here_is_refused(
    settings: dict[str, Any], more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        LocalStudies().submit(a_study(tmp_path / "study", settings=settings, **more))
    assert not (tmp_path / "study").exists()


def test_a_bucket_is_no_folder_of_a_search_here(tmp_path: Path) -> None:
    study = a_study(tmp_path / "study")
    with pytest.raises(RecipeError, match="output: gs://bucket/study is in a bucket"):
        LocalStudies().check(replace(study, job=replace(study.job, output="gs://bucket/study")))


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ProjectError, match=r"does not have optuna and scipy; install it with: pip install 'sdtune\[hpo\]'"
    ):
        LocalStudies().check(a_study(tmp_path / "study"))


def test_the_limit_of_failed_trials_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(
        monkeypatch, trial_1={"fail": "the base model is broken"}, trial_2={"crash": 7}, trial_3={"silent": True},
        trial_4={"wait_at": 5, "for": str(tmp_path / "never")},
    )  # fmt: skip
    study = a_study(tmp_path / "study", max_failed_trials=3, max_trials=8)
    record = run(study)
    assert record.state == "failed"
    assert record.error.startswith("3 trials failed; with max_failed_trials 3 the search ends at 3. The last: trial ")
    by_id = {trial.id: trial for trial in record.trials}
    assert by_id["1"].reason == "the base model is broken"
    assert by_id["2"].reason == "it ended with exit code 7 and without its result. Its last line: about to crash"
    assert by_id["3"].reason == "it ended without having reported held_out_loss."
    assert [by_id[name].state for name in "123"] == ["infeasible"] * 3
    assert all(by_id[name].final is None for name in "123")
    # What ran beside them was stopped, and is no failure: with a larger limit it runs again.
    assert by_id["4"].state == "requested"
    told(monkeypatch)
    record = run(replace(study, max_failed_trials=4))
    assert record.state == "succeeded"
    assert len(record.ranked) == 5


@pytest.mark.parametrize(("max_trials", "failed"), [(2, 2), (4, 3), (10, 5)])
def test_without_a_limit_half_of_them_may_fail(
    max_trials: int, failed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, all={"crash": 1})
    record = run(a_study(tmp_path / "study", max_trials=max_trials, parallel_trials=1))
    assert record.state == "failed"
    assert len(record.trials) == failed


@pytest.mark.parametrize(("measurement", "counts"), [("last", 20), ("best", 5)])
def test_a_larger_goal_and_what_counts(measurement: str, counts: int, tmp_path: Path) -> None:
    """The loss of the stand-in falls: the largest is its first, and the last its least."""
    record = run(a_study(tmp_path / "study", goal="maximize", measurement=measurement, max_trials=2))
    assert record.best
    assert record.best.final
    assert record.best.final.step == counts
    values = [record.value_of(trial) or 0 for trial in record.trials]
    assert record.value_of(record.best) == max(values)


def test_each_trial_sees_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many trials at a time as there are GPUs, whatever was asked; CUDA_VISIBLE_DEVICES narrows them."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    study = a_study(tmp_path / "study", parallel_trials=8, max_trials=8)
    assert LocalStudies().check(study) == ["This machine has 3 GPUs, so 3 at a time, not 8."]
    run(study)
    used = {starts(study, str(trial))[0][1] for trial in range(1, 9)}
    assert used == {"0", "1", "2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert studies.slots(study) == [{"CUDA_VISIBLE_DEVICES": "2"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(studies.slots(study)) == 8


def test_without_one_they_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(studies, "visible_gpus", list)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert studies.slots(a_study(tmp_path / "study", parallel_trials=3)) == [{"OMP_NUM_THREADS": "2"}] * 3


def test_a_grid_is_tried_point_by_point(tmp_path: Path) -> None:
    space = (
        Parameter("rank", "discrete", values=(4, 8)),
        Parameter("train_text_encoder", "categorical", values=("false", "true")),
        Parameter("text_encoder_lr", "discrete", values=(1e-5, 1e-4), parent=Parent("train_text_encoder", ("true",))),
        Parameter("train_batch_size", "integer", low=1, high=2, scale="reverse-log"),
    )
    study = a_study(tmp_path / "study", *space, algorithm="grid", max_trials=20)
    assert LocalStudies().check(study) == ["The grid has 12 points, so there will be 12 trials."]
    record = run(study)
    tried = parameters(record)
    assert len(tried) == 12
    assert len({json.dumps(one, sort_keys=True) for one in tried}) == 12
    assert all(("text_encoder_lr" in one) == (one["train_text_encoder"] == "true") for one in tried)
    assert record.state == "succeeded"


def test_a_setting_that_does_not_matter_is_not_given(tmp_path: Path) -> None:
    space = (
        Parameter("train_text_encoder", "categorical", values=("false", "true")),
        Parameter(
            "text_encoder_lr",
            "double",
            low=1e-6,
            high=1e-3,
            scale="log",
            parent=Parent("train_text_encoder", ("true",)),
        ),
    )
    record = run(a_study(tmp_path / "study", *space, algorithm="default", max_trials=8))
    assert record.state == "succeeded", record.error
    kinds = {one["train_text_encoder"] for one in parameters(record)}
    assert kinds == {"false", "true"}
    assert all(("text_encoder_lr" in one) == (one["train_text_encoder"] == "true") for one in parameters(record))


def test_a_report_that_is_not_whole_yet_is_left(tmp_path: Path) -> None:
    file = tmp_path / METRIC_FILE
    line = '{"checkpoint_path": "", "global_step": "5", "held_out_loss": "0.5", "timestamp": 1.5, "trial": "1"}\n'
    file.write_text(line + line.replace("held_out_loss", "avr_loss").replace("0.5", "0.25") + line[:40])
    assert read_reports(file) == (Measurement(5, {"held_out_loss": 0.5, "avr_loss": 0.25}),)
    assert read_reports(tmp_path / "none") == ()


def test_what_would_be_started_can_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "visible_gpus", list)
    study = a_study(tmp_path / "study")
    place = LocalStudies()
    rendered = place.render(study)
    assert rendered["command"][-len(study.trial_job.args) :] == list(study.trial_job.args)
    assert rendered["environment"]["CLOUD_ML_TRIAL_ID"] == "1"
    assert rendered["parameters"] == {"learning_rate": "1e-05 to 0.1, log", "rank": "4, 8, 16, 32"}
    text = place.as_text(rendered)
    assert "  learning_rate: 1e-05 to 0.1, log\n" in text
    assert text.endswith(f"  2 at a time, kept in sqlite:///{study.output}/study.db")
    assert not (tmp_path / "study").exists()
