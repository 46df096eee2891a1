"""Errors as users of Vertex AI meet them, in words that say what to do."""

from __future__ import annotations

import pytest
import requests
from google.api_core import exceptions as api
from google.auth.exceptions import RefreshError

from sdtune.backends.vertex.reasons import Place, Reason, explained, translate
from sdtune.errors import JobError, ProjectError

PLACE = Place("my-project", "us-central1")

MESSAGES = [
    (
        "429 POST https://us-central1-aiplatform.googleapis.com/v1/projects/p/locations/us-central1/customJobs: The "
        "following quota metrics exceed quota limits: aiplatform.googleapis.com/custom_model_training_nvidia_l4_gpus",
        ["the quota custom_model_training_nvidia_l4_gpus of project my-project in us-central1", "--spot"],
        True,
    ),
    (
        "The following quota metrics exceed quota limits: "
        "aiplatform.googleapis.com/custom_model_training_preemptible_nvidia_t4_gpus",
        ["custom_model_training_preemptible_nvidia_t4_gpus", "try another --gpu, or more regions (--region A,B)."],
        True,
    ),
    (
        "Resources are insufficient in region: us-central1. Please try a different region or use a different "
        "accelerator. If you are using a custom job, you can reserve capacity.",
        ["us-central1 has no such machine free at present", "flex-start"],
        True,
    ),
    (
        "Permission 'aiplatform.customJobs.create' denied on resource '//aiplatform.googleapis.com/projects/p' (or it "
        "may not exist).",
        ["you lack the permission aiplatform.customJobs.create", "--role=roles/aiplatform.user"],
        False,
    ),
    (
        "You do not have permission to act as service_account: trainer@p.iam.gserviceaccount.com.",
        ["act as trainer@p.iam.gserviceaccount.com;", "--role=roles/iam.serviceAccountUser"],
        False,
    ),
    (
        "Vertex AI API has not been used in project 123 before or it is disabled. Enable it by visiting "
        "https://console.developers.google.com/apis/api/aiplatform.googleapis.com/overview?project=123 then retry.",
        ["gcloud services enable aiplatform.googleapis.com --project=my-project"],
        False,
    ),
    (
        'Error loading image "us-docker.pkg.dev/p/r/i:t": the image does not exist or Vertex AI does not have '
        "permission to access it.",
        ["the container image cannot be had", "roles/artifactregistry.reader"],
        False,
    ),
    (
        "400 Vertex AI Service Agent service-1@gcp-sa-aiplatform-cc.iam.gserviceaccount.com does not have permission "
        "to access Artifact Registry repository projects/p/locations/us-central1/repositories/r.",
        ["let service-1@gcp-sa-aiplatform-cc.iam.gserviceaccount.com read its repository"],
        False,
    ),
    (
        "Replicas low on memory: workerpool0. Specify a machine with larger memory and try again.",
        ["the machine ran out of memory", "--machine-type"],
        False,
    ),
    ("NETWORK_NOT_PEERED: the network is not peered", ["gcloud services vpc-peerings connect"], False),
    (
        "The replica workerpool0-0 exited with a non-zero status of 5. Termination reason: Error. \n"
        "Traceback\nlast line",
        ["ended with exit code 5", "  | last line"],
        False,
    ),
    (
        "The replica workerpool0-0 exited with a non-zero status of 137. Termination reason: OOMKilled.",
        ["ran out of memory", "--machine-type"],
        False,
    ),
    (
        "400 List of found errors:\t1.Field: job_spec.worker_pool_specs[0].replica_count; Message: must be 1.\t"
        "2.Field: display_name; Message: required.\t",
        [
            "Vertex AI refuses the job:\n  job_spec.worker_pool_specs[0].replica_count: must be 1.\n"
            "  display_name: required."
        ],
        False,
    ),
    ("400 something that nobody foresaw", ["something that nobody foresaw"], False),
]


@pytest.mark.parametrize(("message", "words", "no_capacity"), MESSAGES)
def test_a_message_says_what_to_do(message: str, words: list[str], no_capacity: bool) -> None:
    reason = translate(message, PLACE)
    for part in words:
        assert part in reason.text
    assert reason.no_capacity is no_capacity
    assert "POST http" not in reason.text


def test_the_exit_code_of_the_process_is_found() -> None:
    message = "The replica workerpool0-0 exited with a non-zero status of {}. Termination reason: Error."
    assert translate(message.format(5), PLACE).exit_code == 5
    assert translate(message.format(137), PLACE).exit_code == 137
    assert translate("nothing", PLACE) == Reason("nothing")


def test_who_waits_already_is_not_told_to_wait() -> None:
    assert "flex-start" not in translate(MESSAGES[2][0], Place("p", "r", "flex-start")).text


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RefreshError("invalid_grant"), ProjectError, "renew them with: gcloud auth application-default login"),
        (api.Unauthorized("no"), ProjectError, "Log in with"),
        (api.Forbidden("Permission 'a.b.c' denied"), ProjectError, "you lack the permission a.b.c"),
        (api.NotFound("no such job"), JobError, "the job cannot be looked at: no such job"),
        (requests.ConnectionError("refused"), JobError, "the job cannot be looked at: refused"),
    ],
)
def test_googles_exceptions_are_ours(error: Exception, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words), explained("the job cannot be looked at", PLACE):
        raise error
