"""Studies as they are sent, to a server that checks them as Vertex AI does; and beside those of the real gcloud."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.cloud.aiplatform_v1 import types

from sdtune.backends.vertex.studies import VertexStudies
from sdtune.backends.vertex.study_specs import study_record, study_spec, tuning_job
from sdtune.jobs.search_space import Parameter, Parent, SearchSpace, search_space, tunables
from sdtune.methods.catalog import METHODS
from tests.backends.vertex.study_examples import placement, plain, study
from tests.servers.cloud import Cloud, loopback_cloud
from tests.servers.vertex_json import ApiError, parse
from tests.servers.vertex_study_rules import check_study, new_study


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud[Any]]:
    # Trials that wait are not run.
    with loopback_cloud(delays={"JOB_STATE_QUEUED": 60.0}) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        found.storage.buckets["bkt"] = {}
        yield found


def test_every_kind_of_parameter_is_sent_as_the_service_names_it() -> None:
    space = SearchSpace(
        (
            Parameter("learning_rate", "double", low=1e-5, high=1e-3, scale="log"),
            Parameter("rank", "integer", low=4, high=64),
            Parameter("train_batch_size", "discrete", values=(1, 2, 4), scale="reverse-log"),
            Parameter("train_text_encoder", "categorical", values=("true", "false")),
            Parameter("text_encoder_lr", "double", low=1e-6, high=1e-4, parent=Parent("train_text_encoder", ("true",))),
            Parameter("lr_warmup_steps", "integer", low=0, high=9, parent=Parent("train_batch_size", (2, 4))),
        )
    )
    options = {"algorithm": "random", "early_stopping": "median", "measurement": "best"}
    assert study_spec(study("a", space, **options)) == {
        "metrics": [{"metricId": "held_out_loss", "goal": "MINIMIZE"}],
        "parameters": [
            {"parameterId": "learning_rate", "doubleValueSpec": {"minValue": 1e-5, "maxValue": 1e-3},
             "scaleType": "UNIT_LOG_SCALE"},
            {"parameterId": "rank", "integerValueSpec": {"minValue": "4", "maxValue": "64"},
             "scaleType": "UNIT_LINEAR_SCALE"},
            {"parameterId": "train_batch_size", "discreteValueSpec": {"values": [1.0, 2.0, 4.0]},
             "scaleType": "UNIT_REVERSE_LOG_SCALE",
             "conditionalParameterSpecs": [
                 {"parentDiscreteValues": {"values": [2, 4]},
                  "parameterSpec": {"parameterId": "lr_warmup_steps",
                                    "integerValueSpec": {"minValue": "0", "maxValue": "9"},
                                    "scaleType": "UNIT_LINEAR_SCALE"}}]},
            {"parameterId": "train_text_encoder", "categoricalValueSpec": {"values": ["true", "false"]},
             "conditionalParameterSpecs": [
                 {"parentCategoricalValues": {"values": ["true"]},
                  "parameterSpec": {"parameterId": "text_encoder_lr",
                                    "doubleValueSpec": {"minValue": 1e-6, "maxValue": 1e-4},
                                    "scaleType": "UNIT_LINEAR_SCALE"}}]},
        ],
        "measurementSelectionType": "BEST_MEASUREMENT",
        "algorithm": "RANDOM_SEARCH",
        "medianAutomatedStoppingSpec": {"useElapsedDuration": False},
    }  # fmt: skip


def test_trials_are_the_runs_that_train_would_start_each_in_a_folder_of_its_own() -> None:
    wanted = study("cat", seed_per_trial=True)
    job = tuning_job(wanted, placement(service_account="a@b.iam.gserviceaccount.com", timeout="2h", spot=True))
    (pool,) = job["trialJobSpec"]["workerPoolSpecs"]
    args = pool["containerSpec"]["args"]
    assert args[:4] == ["train", "dreambooth-lora", "--trials", "--seed-per-trial"]
    assert [arg for arg in args if arg not in ("--trials", "--seed-per-trial")] == list(wanted.job.args)
    assert wanted.trial_args({"rank": 8})[-1] == "--rank=8"
    assert pool["machineSpec"] == {
        "machineType": "g2-standard-8", "acceleratorType": "NVIDIA_L4", "acceleratorCount": 1
    }  # fmt: skip
    assert job["trialJobSpec"]["scheduling"] == {"timeout": "7200s", "strategy": "SPOT"}
    assert job["trialJobSpec"]["baseOutputDirectory"] == {"outputUriPrefix": "gs://bkt/cat/trials"}
    assert (job["maxTrialCount"], job["parallelTrialCount"]) == (4, 2)
    assert "maxFailedTrialCount" not in job  # the service decides
    assert job["labels"]["sdtune-task"] == "hpo"
    assert tuning_job(replace(wanted, max_failed_trials=3), placement())["maxFailedTrialCount"] == 3


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [
    {}, {"algorithm": "random", "measurement": "best", "early_stopping": "decay-curve", "max_failed_trials": 2},
])  # fmt: skip
def test_the_space_of_every_method_is_accepted_and_comes_back_as_it_was(name: str, options: dict[str, Any]) -> None:
    method = METHODS[name]
    whole = {"lr_scheduler": "constant,linear,cosine_with_restarts", "adapter": "lora,oft"}
    tune = [f"{field}={whole[field]}" if field in whole else field for field in tunables(method)]
    wanted = study("all", search_space(method, tune), method=name, **options)
    again = plain(types.HyperparameterTuningJob(accepted(tuning_job(wanted, placement()))))
    record = study_record({**again, "name": "projects/1/locations/us-central1/hyperparameterTuningJobs/7"})
    assert {one.name: one for one in record.space} == {one.name: one for one in wanted.space}
    for field in ("name", "method", "metric", "goal", "output", "max_trials", "parallel_trials", "max_failed_trials",
                  "algorithm", "early_stopping", "measurement", "seed_per_trial"):  # fmt: skip
        assert getattr(record, field) == getattr(wanted, field), field
    assert record.args == wanted.trial_job.args
    assert record.places == {"region": ["us-central1"], "machine_type": "g2-standard-8", "gpu": "NVIDIA_L4", "gpus": 1}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda job: job.update(parallelTrialCount=5), "parallel_trial_count"),
        (lambda job: job.update(maxTrialCount=0, parallelTrialCount=0), "max_trial_count"),
        (lambda job: job["studySpec"].update(metrics=[]), "study_spec.metrics"),
        (lambda job: job["studySpec"]["metrics"][0].update(metricId="held out"), "study_spec.metrics"),
        (lambda job: job["studySpec"].update(observationNoise="LOW"), "observation_noise"),
        (lambda job: job["studySpec"].update(algorithm="GRID_SEARCH"), "double_value_spec"),
        (lambda job: first(job).update(doubleValueSpec={"minValue": 0, "maxValue": 1}), "double_value_spec"),
        (lambda job: first(job).update(doubleValueSpec={"minValue": 2, "maxValue": 1}), "double_value_spec"),
        (lambda job: first(job)["doubleValueSpec"].update(defaultValue=1e-4), "default_value"),
        (lambda job: job["studySpec"]["parameters"].append(first(job)), "parameter_id"),
        (lambda job: job["studySpec"]["parameters"][1].update(discreteValueSpec={"values": [8, 4]}), "values"),
        (lambda job: job["trialJobSpec"].update(workerPoolSpecs=[]), "worker_pool_specs"),
        (lambda job: first(job).update(scale="UNIT_LOG_SCALE"), "Unknown name"),
    ],
)
def test_the_server_refuses_what_the_service_refuses(change: Callable[[Any], None], field: str) -> None:
    job = tuning_job(study("a"), placement())
    change(job)
    with pytest.raises(ApiError, match=field):
        accepted(job)


def accepted(job: dict[str, Any]) -> Any:
    """The message, as the server reads it. ApiError if it does not take it."""
    message = new_study()
    parse(job, message, "hyperparameter_tuning_job")
    check_study(message, "us-central1", "123456789012")
    return message


def first(job: dict[str, Any]) -> dict[str, Any]:
    parameter: dict[str, Any] = job["studySpec"]["parameters"][0]
    return parameter


GUIDE = {
    "studySpec": {
        "metrics": [{"metricId": "avr_loss", "goal": "MINIMIZE"}],
        "parameters": [
            {"parameterId": "lr", "scaleType": "UNIT_LOG_SCALE",
             "doubleValueSpec": {"minValue": 1e-5, "maxValue": 1e-4}}
        ],
        "measurementSelectionType": "BEST_MEASUREMENT",
    },
    "trialJobSpec": {
        "workerPoolSpecs": [
            {"machineSpec": {"machineType": "g2-standard-8", "acceleratorType": "NVIDIA_L4", "acceleratorCount": 1},
             "replicaCount": 1,
             "containerSpec": {"imageUri": "us-central1-docker.pkg.dev/my-project/sd/sd-training:kohya"}}
        ]
    },
}  # fmt: skip


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_the_study_of_the_older_guide_is_sent_as_gcloud_sends_it(cloud: Cloud[Any], tmp_path: Path) -> None:
    """Its hpo.yaml, as the guide has it; and the same search as sdtune's."""
    (tmp_path / "hpo.yaml").write_text(yaml.safe_dump(GUIDE))
    ran = subprocess.run(
        ["gcloud", "ai", "hp-tuning-jobs", "create", "--region=us-central1", "--display-name=hpo",
         "--max-trial-count=5", "--parallel-trial-count=2", f"--config={tmp_path / 'hpo.yaml'}"],
        env={**os.environ, **cloud.environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    theirs = received(cloud)
    space = search_space(METHODS["kohya-dreambooth-lora"], ["learning_rate=1e-5:1e-4:log"])
    wanted = study(
        "hpo", space, method="kohya-dreambooth-lora", metric="avr_loss", measurement="best", max_trials=5
    )  # fmt: skip
    VertexStudies(placement(image="us-central1-docker.pkg.dev/my-project/sd/sd-training:kohya")).submit(wanted)
    ours = received(cloud)
    assert ours.pop("labels")
    (parameter,) = ours["studySpec"]["parameters"]
    # The guide's program calls it lr.
    parameter["parameterId"] = "lr"
    assert ours["studySpec"] == theirs["studySpec"]
    for job in (ours, theirs):
        (pool,) = job["trialJobSpec"].pop("workerPoolSpecs")
        assert pool["machineSpec"] == GUIDE["trialJobSpec"]["workerPoolSpecs"][0]["machineSpec"]
        assert pool["containerSpec"]["imageUri"].endswith("sd-training:kohya")
    assert set(ours.pop("trialJobSpec")) == {"scheduling", "baseOutputDirectory"}
    theirs.pop("trialJobSpec", None)
    del ours["studySpec"], theirs["studySpec"]
    assert ours == theirs


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_what_sdtune_would_send_is_accepted_by_gcloud_and_arrives_unchanged(cloud: Cloud[Any], tmp_path: Path) -> None:
    space = search_space(METHODS["dreambooth-lora"], ["train_text_encoder=true,false", "text_encoder_lr", "rank"])
    rendered = tuning_job(study("same", space, early_stopping="median"), placement())
    config = {name: rendered[name] for name in ("studySpec", "trialJobSpec")}
    (tmp_path / "hpo.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    ran = subprocess.run(
        ["gcloud", "ai", "hp-tuning-jobs", "create", "--region=us-central1", "--display-name=same",
         "--max-trial-count=4", "--parallel-trial-count=2", f"--config={tmp_path / 'hpo.yaml'}"],
        env={**os.environ, **cloud.environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    del rendered["labels"]
    assert received(cloud) == plain(types.HyperparameterTuningJob.from_json(json.dumps(rendered)))


def received(cloud: Cloud[Any]) -> dict[str, Any]:
    """The last study that the server was sent, in the published types."""
    made = [request for request in cloud.vertex.requests if request.method == "POST" and "cancel" not in request.path]
    return plain(types.HyperparameterTuningJob.from_json(json.dumps(made[-1].body)))
