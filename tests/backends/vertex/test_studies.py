"""Studies by Google's own client, against a server that checks them as Vertex AI does and runs their trials."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sdtune.backends.registry import open_studies
from sdtune.backends.vertex.jobs import VertexJobs
from sdtune.backends.vertex.studies import VertexStudies
from sdtune.commands.hpo import raise_if_failed
from sdtune.errors import CapacityError, JobError, ProjectError, RecipeError
from sdtune.jobs.backend import LogLine
from sdtune.jobs.search_space import Parameter, SearchSpace
from sdtune.jobs.study import Study, StudyRecord
from tests.backends.vertex.study_examples import GRID, placement, study
from tests.servers.cloud import Cloud, loopback_cloud
from tests.servers.services import ServicesServer

L4 = "aiplatform.googleapis.com/custom_model_training_nvidia_l4_gpus"
# A trainer whose loss is known beforehand: least at a learning rate of 1e-4, noisy in between. What it is to do stands
# in a variable of the job.
TRAINER = """
import json, math, os, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
assert "--trials" in sys.argv, sys.argv
rate, rank, trial = float(options["learning_rate"]), float(options["rank"]), os.environ["CLOUD_ML_TRIAL_ID"]
does = os.environ.get("DOES", "")
if does == "fails at 8" and rank == 8:
    sys.exit("no luck with rank 8")
loss = (math.log10(rate) + 4) ** 2 + rank / 1000
steps = {10: loss + 1, 20: loss - 0.5, 30: loss}
if does == "hangs at 1e-2" and rate == 1e-2:
    steps = {10: loss, 20: loss}
with open(os.environ["CLOUD_ML_HP_METRIC_FILE"], "a") as file:
    for step, value in steps.items() if does != "silent at 8" or rank != 8 else ():
        said = {"timestamp": 1.5, "trial": trial, "held_out_loss": str(value), "global_step": str(step)}
        file.write(json.dumps(said) + "\\n")
        file.flush()
    file.write('{"timestamp": 2, "tri')
print("my output is", os.environ["AIP_CHECKPOINT_DIR"])
while does == "hangs" or (does == "hangs at 1e-2" and rate == 1e-2):
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Cloud[Any]]:
    with loopback_cloud(delays={}) as cloud:
        yield cloud


@pytest.fixture
def cloud(server: Cloud[Any], monkeypatch: pytest.MonkeyPatch) -> Cloud[Any]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sdtune.backends.vertex.specs.COMMAND", ("python", "-c", TRAINER))
    monkeypatch.setattr("sdtune.backends.vertex.studies.SOONEST", 0.05)
    monkeypatch.setattr("sdtune.backends.vertex.studies.LATEST", 0.05)
    server.vertex.requests.clear()
    server.storage.buckets["bkt"] = {}
    return server


def studies(**settings: Any) -> VertexStudies:
    opened = open_studies("vertex", placement(**settings))
    assert isinstance(opened, VertexStudies)
    return opened


def run(wanted: Study, **settings: Any) -> tuple[StudyRecord, list[StudyRecord]]:
    """To its end: how it ended, and all that was seen of it."""
    place = studies(**settings)
    seen = list(place.follow(place.submit(wanted).job_id))
    return seen[-1], seen


def trained(cloud: Cloud[Any], record: StudyRecord) -> Any:
    return cloud.vertex.studies.made[record.number]


def test_trials_run_side_by_side_and_the_best_is_found(cloud: Cloud[Any]) -> None:
    record, seen = run(study("best", max_trials=5))
    raise_if_failed(record)
    assert (record.state, len(record.trials)) == ("succeeded", 5)
    there = trained(cloud, record)
    assert there.most == 2
    assert all(sum(trial.state == "active" for trial in one.trials) <= 2 for one in seen)
    for trial in record.trials:
        assert trial.state == "succeeded"
        loss = (math.log10(float(trial.parameters["learning_rate"])) + 4) ** 2 + float(trial.parameters["rank"]) / 1000
        assert [one.step for one in trial.measurements] == [10, 20, 30]
        assert record.value_of(trial) == pytest.approx(loss)  # the last, although the one before it was less
        assert trial.parameters["rank"] in (4, 8)
        assert isinstance(trial.parameters["rank"], int)
        assert trial.started
        assert trial.ended
        assert record.folder_of(trial) == f"gs://bkt/best/trials/{trial.id}"
        # The process had what Vertex AI appends, and a folder of its own.
        job = cloud.vertex.job(trial.job_id).message
        args = job.job_spec.worker_pool_specs[0].container_spec.args
        assert args[-2:] == [
            f"--learning_rate={trial.parameters['learning_rate']}", f"--rank={float(trial.parameters['rank'])}"
        ]  # fmt: skip
        assert f"my output is gs://bkt/best/trials/{trial.id}/checkpoints/" in lines_of(job.name)
    best = min(record.trials, key=lambda trial: record.value_of(trial) or 0.0)
    assert record.best == best
    assert [record.value_of(trial) for trial in record.ranked] == sorted(map(record.value_of, record.trials))  # type: ignore[type-var]


def lines_of(job_id: str) -> list[str]:
    """What a trial's process printed."""
    said = VertexJobs(placement()).read_logs(job_id, follow=False)
    return [line.text for line in said if isinstance(line, LogLine)]


def test_the_best_measurement_counts_only_if_that_was_asked(cloud: Cloud[Any]) -> None:
    record, _ = run(study("luck", max_trials=1, parallel_trials=1, measurement="best"))
    assert record.best
    assert record.best.final
    assert record.best.final.step == 20
    assert record.measurement == "best"


def test_a_grid_is_tried_point_by_point_and_ends(cloud: Cloud[Any]) -> None:
    record, _ = run(study("grid", GRID, max_trials=20, algorithm="grid"))
    tried = [(trial.parameters["learning_rate"], trial.parameters["rank"]) for trial in record.trials]
    assert tried == [(rate, rank) for rate in (1e-4, 1e-3, 1e-2) for rank in (4, 5)]
    assert record.state == "succeeded"
    assert record.best
    assert record.best.parameters == {"learning_rate": 1e-4, "rank": 4}


def test_trials_that_do_badly_are_ended_early(cloud: Cloud[Any]) -> None:
    options = {"algorithm": "grid", "early_stopping": "median", "parallel_trials": 1, "max_trials": 5}
    record, _ = run(study("early", GRID, **options), env=["DOES=hangs at 1e-2"])
    *_, last = record.trials
    # It would go on for ever.
    assert last.parameters["learning_rate"] == 1e-2
    assert (record.state, last.state, len(last.measurements)) == ("succeeded", "succeeded", 2)
    assert record.early_stopping == "median"


def test_too_many_failures_end_the_study_and_what_was_found_is_kept(cloud: Cloud[Any]) -> None:
    space = SearchSpace((Parameter("learning_rate", "discrete", values=(1e-4, 1e-3)), GRID["rank"]))
    space = SearchSpace((replace(space["rank"], low=7, high=8), space["learning_rate"]))
    options = {"algorithm": "grid", "parallel_trials": 1, "max_failed_trials": 2, "max_trials": 4}
    record, _ = run(study("failing", space, **options), env=["DOES=fails at 8"])
    assert record.state == "failed"
    assert [trial.state for trial in record.trials] == ["succeeded", "succeeded", "infeasible", "infeasible"]
    assert "no luck with rank 8" in record.trials[2].reason
    assert record.best
    assert record.best.id == "1"
    with pytest.raises(JobError, match=r"ended as failed: .*\n  \| no luck with rank 8"):
        raise_if_failed(record)


def test_a_trial_that_reports_nothing_is_no_candidate(cloud: Cloud[Any]) -> None:
    space = SearchSpace(
        (Parameter("rank", "integer", low=7, high=8), Parameter("learning_rate", "discrete", values=(1e-4,)))
    )
    record, _ = run(study("silent", space, algorithm="grid", parallel_trials=1), env=["DOES=silent at 8"])
    assert [trial.state for trial in record.trials] == ["succeeded", "infeasible"]
    assert record.trials[1].final is None
    assert record.trials[1].reason
    assert record.ranked == [record.trials[0]]


def test_a_study_is_cancelled_with_its_trials(cloud: Cloud[Any]) -> None:
    place = studies(env=["DOES=hangs"])
    submitted = place.submit(study("endless"))
    for record in place.follow(submitted.job_id):
        if sum(bool(trial.measurements) for trial in record.trials) == 2:
            break
    # What runs has measured something, but nothing of it counts yet.
    assert record.best is None
    assert record.trials[0].latest
    place.cancel(submitted.job_id)
    last = list(place.follow(submitted.job_id))[-1]
    assert last.state == "cancelled"
    assert all(job.ended for job in trained(cloud, last).jobs.values())
    with pytest.raises(JobError, match="has ended already"):
        place.cancel(submitted.job_id)
    with pytest.raises(JobError, match="was cancelled; what its trials found is kept"):
        raise_if_failed(last)


def test_a_study_is_made_once_whatever_becomes_of_the_answer(
    cloud: Cloud[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(cloud.vertex.studies.made)
    monkeypatch.setattr("sdtune.backends.vertex.regions.time.sleep", lambda seconds: None)
    cloud.vertex.cut("POST", "hyperparameterTuningJobs$")
    cloud.vertex.fail("POST", "hyperparameterTuningJobs$", 503, times=1)
    submitted = studies().submit(study("once", max_trials=1, parallel_trials=1))
    assert len(cloud.vertex.studies.made) == before + 1
    assert submitted.number in cloud.vertex.studies.made
    assert f"/us-central1/training/{submitted.number}?" in submitted.url


def test_where_there_is_no_quota_the_next_region_is_tried(cloud: Cloud[Any]) -> None:
    cloud.vertex.quota("europe-west4", L4.partition("/")[2], 0)
    small = study("elsewhere", max_trials=1, parallel_trials=1)
    assert studies(region=["europe-west4", "us-central1"]).submit(small).region == "us-central1"
    with pytest.raises(CapacityError, match=r"custom_model_training_nvidia_l4_gpus .* does not suffice"):
        studies(region="europe-west4").submit(small)


def test_a_study_is_found_by_number_name_and_output(cloud: Cloud[Any]) -> None:
    place = studies()
    submitted = place.submit(study("found-again", max_trials=1, parallel_trials=1))
    for name in (submitted.number, submitted.job_id, "found-again", "gs://bkt/found-again", "gs://bkt/found-again/"):
        assert place.find(name).study_id == submitted.job_id
    assert next(iter(place.studies())).number == submitted.number
    for unknown in ("123", "never-made"):
        with pytest.raises(JobError, match="--region says where else to look"):
            place.find(unknown)
    # A refusal is told in the user's terms.
    cloud.vertex.deny("aiplatform.hyperparameterTuningJobs.cancel")
    hanging = place.submit(study("denied"))
    with pytest.raises(ProjectError, match=r"hyperparameterTuningJobs\.cancel"):
        place.cancel(hanging.job_id)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServicesServer]:
    with ServicesServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.quotas = {L4: {"": 0, "us-central1": 4}}
        yield server


def test_the_gpus_of_all_trials_at_a_time_are_held_against_the_quota(services: ServicesServer) -> None:
    assert studies().check(study("fits", parallel_trials=4)) == []
    with pytest.raises(RecipeError) as refused:
        studies(replicas=2).check(study("too much", parallel_trials=3))
    assert str(refused.value).startswith("parallel_trials: found 3, but l4: found 4 in us-central1")
    assert "wanted 6" in str(refused.value)
    assert studies().check(study("few", GRID, algorithm="grid")) == [
        "the grid has 6 points, and max_trials is 4: the fewer are tried."
    ]
    services.denied.add("serviceusage.quotas.get")
    (note,) = studies().check(study("not told"))
    assert note.startswith("whether the quota suffices for 2 trials at a time was not told")
