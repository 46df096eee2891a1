"""The Vertex AI server's lists, and what befalls jobs where a test orders it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from google.api_core import exceptions
from google.cloud.aiplatform_v1 import JobServiceClient
from google.cloud.aiplatform_v1.types import AcceleratorType, CustomJob, JobState, ListCustomJobsRequest
from google.protobuf.field_mask_pb2 import FieldMask

from tests.servers.vertex import VertexServer
from tests.servers.vertex_examples import (
    ACCOUNT,
    FAST,
    FLEX,
    IMAGE,
    NETWORK,
    ON_L4,
    PARENT,
    POOL,
    REMOVED,
    Lines,
    changed,
    client_of,
    container,
    job,
    post,
    submit,
)
from tests.servers.vertex_rules import quota_use


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def server(lines: Lines) -> Iterator[VertexServer]:
    with VertexServer(logging=lines, delays=FAST) as server:
        yield server


@pytest.fixture
def client(server: VertexServer) -> JobServiceClient:
    return client_of(server)


def test_jobs_are_listed_in_pages_and_filtered(server: VertexServer, client: JobServiceClient) -> None:
    names = []
    for number in range(5):
        labels = {"method": "dreambooth-lora"} if number % 2 else {"made-by": "sdtune"}
        code = "raise SystemExit(1)" if number == 4 else ""
        names.append(submit(client, job(code, displayName=f"dog-{number}", labels=labels)))
    submit(client, job(), PARENT.replace("us-central1", "europe-west4"))
    for made in server.jobs.values():
        made.wait()

    def listed(text: str = "") -> list[str]:
        request = ListCustomJobsRequest(parent=PARENT, filter=text, page_size=2)
        return [found.display_name for found in client.list_custom_jobs(request)]

    before = len(server.requests)
    assert listed() == [f"dog-{number}" for number in (4, 3, 2, 1, 0)]
    assert len(server.requests) - before == 3
    middle = client.get_custom_job(name=names[2]).create_time.rfc3339()
    for text, wanted in {
        'labels.method="dreambooth-lora"': [3, 1],
        "labels.method=dreambooth-lora": [3, 1],
        "labels.made-by:*": [4, 2, 0],
        'state="JOB_STATE_FAILED"': [4],
        'state!="JOB_STATE_FAILED" AND labels.made-by:*': [2, 0],
        'display_name="dog-1" OR display_name="dog-2"': [2, 1],
        'NOT display_name:"dog-1*"': [4, 3, 2, 0],
        f'create_time>"{middle}"': [4, 3],
        f'create_time<="{middle}" AND display_name:"dog-*" AND labels.method:*': [1],
    }.items():
        assert listed(text) == [f"dog-{number}" for number in wanted], text
    request = ListCustomJobsRequest(parent=PARENT, read_mask=FieldMask(paths=["name", "labels"]))
    masked = list(client.list_custom_jobs(request))
    assert [found.name for found in masked] == names[::-1]
    assert masked[0].display_name == ""
    assert dict(masked[0].labels) == {"made-by": "sdtune"}


@pytest.mark.parametrize(
    "text",
    [
        "colour=red", "state=SUCCEEDED", "labels.x>1", "labels=1", 'create_time>"yesterday"', "display_name", "a b",
        'display_name="dog*"', "state:JOB_STATE_FAILED", 'labels.x:"y"',
    ],
)  # fmt: skip
def test_a_filter_that_is_none_is_refused(client: JobServiceClient, text: str) -> None:
    with pytest.raises(exceptions.BadRequest, match="filter"):
        list(client.list_custom_jobs(ListCustomJobsRequest(parent=PARENT, filter=text)))


def test_jobs_are_deleted_after_their_end(server: VertexServer, client: JobServiceClient) -> None:
    name = submit(client, job("import time; time.sleep(600)"))
    made = server.job(name)
    with pytest.raises(exceptions.BadRequest):
        client.delete_custom_job(name=name)
    made.cancel()
    made.wait()
    client.delete_custom_job(name=name).result(timeout=5)
    with pytest.raises(exceptions.NotFound, match="does not exist"):
        client.get_custom_job(name=name)


def test_a_job_belongs_to_its_project_and_region(client: JobServiceClient, server: VertexServer) -> None:
    server.projects["my-project"] = "123456789012"
    name = submit(client, job())
    assert name.startswith("projects/123456789012/")
    assert client.get_custom_job(name=name.replace("123456789012", "my-project")).name == name
    for other in (name.replace("us-central1", "us-east1"), name.replace("123456789012", "another-project")):
        with pytest.raises(exceptions.NotFound):
            client.get_custom_job(name=other)


def test_quota(server: VertexServer, client: JobServiceClient) -> None:
    server.quota("us-central1", "custom_model_training_nvidia_l4_gpus", 1)
    body = changed(f"{POOL}.containerSpec", container("import time; time.sleep(600)"), ON_L4)
    first = submit(client, body)
    with pytest.raises(exceptions.TooManyRequests, match="custom_model_training_nvidia_l4_gpus") as refused:
        submit(client, body)
    assert refused.value.message.endswith(
        "The following quota metrics exceed quota limits: "
        "aiplatform.googleapis.com/custom_model_training_nvidia_l4_gpus"
    )
    submit(client, body, PARENT.replace("us-central1", "us-east1"))
    submit(client, {**body, "jobSpec": {**body["jobSpec"], "scheduling": {"strategy": "SPOT"}}})
    client.cancel_custom_job(name=first)
    server.job(first).wait()
    submit(client, body)


@pytest.mark.parametrize(
    ("accelerator", "metric"),
    [
        ("NVIDIA_TESLA_T4", "t4"), ("NVIDIA_TESLA_A100", "a100"), ("NVIDIA_A100_80GB", "a100_80gb"),
        ("NVIDIA_H100_80GB", "h100"), ("NVIDIA_H100_MEGA_80GB", "h100_mega"), ("NVIDIA_H200_141GB", "h200"),
    ],
)  # fmt: skip
def test_metrics_of_quota(accelerator: str, metric: str) -> None:
    machine = {"accelerator_type": AcceleratorType[accelerator], "accelerator_count": 2}
    spec = CustomJob(job_spec={"worker_pool_specs": [{"machine_spec": machine, "replica_count": 3}]})
    assert quota_use(CustomJob.pb(spec).job_spec) == {f"custom_model_training_nvidia_{metric}_gpus": 6}


def test_stock_out(server: VertexServer, client: JobServiceClient) -> None:
    server.stock_out("us-central1", "NVIDIA_L4")
    name = submit(client, ON_L4)
    made = server.job(name)
    assert made.wait() == "JOB_STATE_FAILED"
    assert made.states == ["JOB_STATE_QUEUED", "JOB_STATE_PENDING", "JOB_STATE_FAILED"]
    error = client.get_custom_job(name=name).error
    assert error.code == 8
    assert error.message.startswith("Resources are insufficient in region: us-central1. Please try a different region")
    waiting = submit(client, changed("jobSpec.scheduling", {**FLEX, "maxWaitDuration": "0s"}, ON_L4))
    impatient = submit(client, changed("jobSpec.scheduling", {**FLEX, "maxWaitDuration": "1s"}, ON_L4))
    assert server.job(impatient).wait(timeout=10) == "JOB_STATE_FAILED"
    assert client.get_custom_job(name=waiting).state == JobState.JOB_STATE_PENDING
    assert server.job(submit(client, job())).wait() == "JOB_STATE_SUCCEEDED"


def test_images(server: VertexServer, client: JobServiceClient) -> None:
    server.no_repository("/my-project/secret/")
    with pytest.raises(exceptions.BadRequest, match="does not have permission to access Artifact Registry") as refused:
        submit(client, changed(f"{POOL}.containerSpec.imageUri", "us-central1-docker.pkg.dev/my-project/secret/x"))
    assert refused.value.message.endswith("projects/my-project/locations/us-central1/repositories/secret.")
    server.no_image("diffusers:1$")
    name = submit(client, job())
    assert server.job(name).wait() == "JOB_STATE_FAILED"
    assert IMAGE in client.get_custom_job(name=name).error.message


def test_memory(server: VertexServer, client: JobServiceClient) -> None:
    server.low_memory("^dog")
    name = submit(client, job())
    assert server.job(name).wait() == "JOB_STATE_FAILED"
    assert client.get_custom_job(name=name).error.message.startswith("Replicas low on memory: workerpool0.")


def test_permissions(server: VertexServer, client: JobServiceClient) -> None:
    server.no_act_as(ACCOUNT)
    with pytest.raises(exceptions.BadRequest, match=f"You do not have permission to act as service_account: {ACCOUNT}"):
        submit(client, changed("jobSpec.serviceAccount", ACCOUNT))
    server.deny("aiplatform.customJobs.create")
    with pytest.raises(
        exceptions.Forbidden, match=r"Permission 'aiplatform.customJobs.create' denied on resource"
    ) as no:
        submit(client, job())
    assert f"'//aiplatform.googleapis.com/{PARENT}'" in no.value.message
    assert no.value.reason == "IAM_PERMISSION_DENIED"
    assert list(client.list_custom_jobs(parent=PARENT)) == []


def test_faults(server: VertexServer, client: JobServiceClient) -> None:
    server.fail("POST", "/customJobs$", 503, times=1)
    with pytest.raises(exceptions.ServiceUnavailable):
        client.create_custom_job(parent=PARENT, custom_job=CustomJob.from_json(json.dumps(job())), retry=None)
    assert not server.jobs
    server.cut("POST", "/customJobs$")
    with pytest.raises((ConnectionError, exceptions.RetryError, OSError)):
        client.create_custom_job(parent=PARENT, custom_job=CustomJob.from_json(json.dumps(job())), retry=None)
    assert len(server.jobs) == 1, "the job was made, though its maker was not told"
    submit(client, job())
    assert len(server.jobs) == 2


def test_persistent_resources(server: VertexServer) -> None:
    body = changed("jobSpec.persistentResourceId", "mine", changed(f"{POOL}.machineSpec", REMOVED))
    assert post(server, body)[0] == 404
    server.persistent_resource("us-central1", "mine", NETWORK)
    assert post(server, body)[0] == 400
    assert post(server, changed("jobSpec.network", NETWORK, body))[0] == 200


def test_requests_are_kept(server: VertexServer, client: JobServiceClient) -> None:
    name = submit(client, job())
    (request,) = server.requests
    assert (request.method, request.path) == ("POST", f"/v1/{PARENT}/customJobs")
    assert request.body["displayName"] == "dog-lora"
    assert "Authorization" not in request.headers
    client.get_custom_job(name=name)
    assert server.requests[-1].path == f"/v1/{name}"
