"""Jobs by Google's own client, against a server that checks them as Vertex AI does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sdtune.backends.registry import open_archive, open_backend
from sdtune.backends.vertex.backend import VertexBackend
from sdtune.errors import CapacityError, JobError, ProjectError
from sdtune.jobs.backend import JobEnd, Submitted
from sdtune.jobs.machines import cpu_machine
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import JobSpec
from tests.servers.cloud import Cloud, loopback_cloud

JOB = JobSpec("dog_lora", "train", "dreambooth-lora", "diffusers", "gs://bkt/dog_lora", ("--output=gs://bkt/dog_lora",))
SCRIPT = "import sys, time; print('hello'); time.sleep({}); sys.exit({})"


@pytest.fixture(scope="module")
def server() -> Iterator[Cloud[Any]]:
    with loopback_cloud(delays={}) as cloud:
        yield cloud


@pytest.fixture
def cloud(server: Cloud[Any], monkeypatch: pytest.MonkeyPatch) -> Cloud[Any]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    # Nobody waits between tries.
    monkeypatch.setattr("sdtune.backends.vertex.regions.time.sleep", lambda seconds: None)
    # Jobs run a script of the test in place of the trainer.
    monkeypatch.setattr("sdtune.backends.vertex.specs.COMMAND", ("python", "-c"))
    server.vertex.requests.clear()
    server.vertex.no_more_faults()
    server.storage.buckets["bkt"] = {}
    return server


def backend(**settings: Any) -> VertexBackend:
    opened = open_backend("vertex", Placement.from_settings({"project": "my-project", **settings}))
    assert isinstance(opened, VertexBackend)
    return opened


def job(name: str = "dog_lora", seconds: float = 0, exit_code: int = 0) -> JobSpec:
    args = (SCRIPT.format(seconds, exit_code), f"--output=gs://bkt/{name}")
    run_id = f"{name}-{time.monotonic_ns()}"
    return replace(JOB, name=name, output=f"gs://bkt/{name}", args=args, machine=cpu_machine(), run_id=run_id)


def made(cloud: Cloud[Any], name: str) -> list[Any]:
    return [found for found in cloud.vertex.jobs.values() if found.message.display_name == name]


def ended(archive: Any, submitted: Submitted) -> JobEnd:
    deadline = time.monotonic() + 20
    while not archive.find(submitted.number).has_ended:
        assert time.monotonic() < deadline
        time.monotonic()
    end: JobEnd = archive.wait(submitted.job_id)
    return end


def test_a_job_is_made_and_found_again(cloud: Cloud[Any]) -> None:
    place = backend()
    submitted = place.submit(job("first"))
    assert submitted.region == "us-central1"
    assert submitted.job_id.endswith(f"/customJobs/{submitted.number}")
    archive = open_archive(Placement(project="my-project"))
    for name in (submitted.number, submitted.job_id, "first"):
        assert archive.find(name).number == submitted.number
    assert ended(archive, submitted) == JobEnd(0)
    with pytest.raises(JobError, match="there is no job 404 in us-central1; sdtune jobs list"):
        archive.find("404")
    with pytest.raises(JobError, match="no job of sdtune is called 'nobody'"):
        archive.find("nobody")


def test_the_exit_code_of_the_process_comes_back(cloud: Cloud[Any]) -> None:
    place = backend()
    end = ended(open_archive(place.placement), place.submit(job("fails", exit_code=5)))
    assert end.exit_code == 5
    assert "ended with exit code 5" in end.reason
    assert not end.no_capacity


def test_a_running_job_is_cancelled_and_one_that_has_ended_is_not(cloud: Cloud[Any]) -> None:
    place = backend()
    submitted = place.submit(job("long", seconds=60))
    place.cancel(submitted.job_id)
    archive = open_archive(place.placement)
    assert ended(archive, submitted) == JobEnd(None, "the job was cancelled.")
    with pytest.raises(JobError, match=r"has ended already \(cancelled\); there is nothing to cancel"):
        place.cancel(submitted.job_id)


def test_an_answer_that_was_lost_makes_no_second_job(cloud: Cloud[Any]) -> None:
    cloud.vertex.cut("POST", "customJobs$", times=1)
    submitted = backend().submit(job("cut"))
    assert len(made(cloud, "cut")) == 1
    assert submitted.number in cloud.vertex.jobs


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_errors_that_pass_are_waited_for(cloud: Cloud[Any], status: int) -> None:
    cloud.vertex.fail("POST", "customJobs$", status, times=2)
    backend().submit(job(f"after-{status}"))
    assert len(made(cloud, f"after-{status}")) == 1


def test_errors_that_stay_are_told(cloud: Cloud[Any]) -> None:
    cloud.vertex.fail("POST", "customJobs$", 429)
    with pytest.raises(JobError, match="the job cannot be submitted"):
        backend().submit(job("never"))
    assert not made(cloud, "never")


def test_a_job_that_is_refused_says_why(cloud: Cloud[Any]) -> None:
    bad = replace(job(), machine=replace(cpu_machine(), machine_type="c3-standard-4"))
    with pytest.raises(JobError, match=r"the job cannot be submitted: .*c3-standard-4"):
        backend().submit(bad)
    cloud.vertex.fail("POST", "customJobs$", 403, 1, "Permission 'aiplatform.customJobs.create' denied on resource x")
    with pytest.raises(ProjectError, match=r"you lack the permission aiplatform\.customJobs\.create"):
        backend().submit(job())


def test_the_next_region_is_tried_where_the_quota_is_used_up(cloud: Cloud[Any]) -> None:
    message = "The following quota metrics exceed quota limits: aiplatform.googleapis.com/custom_model_training_cpus"
    cloud.vertex.fail("POST", "us-central1/customJobs$", 429, 2, message)
    place = backend(region="us-central1,europe-west4")
    assert place.submit(job("moved")).region == "europe-west4"
    assert "europe-west4" in place.place
    with pytest.raises(
        CapacityError, match="the quota custom_model_training_cpus of project my-project in us-central1"
    ):
        backend().submit(job())


def test_jobs_are_listed_newest_first_with_one_call_a_page(cloud: Cloud[Any]) -> None:
    place = backend(region="asia-east1")
    for number in range(3):
        place.submit(job(f"listed-{number}"))
    archive = open_archive(place.placement)
    cloud.vertex.requests.clear()
    assert [found.name for found in archive.jobs()] == ["listed-2", "listed-1", "listed-0"]
    assert [request.method for request in cloud.vertex.requests] == ["GET"]
    assert [found.name for found in archive.jobs(method="dreambooth-lora")] == ["listed-2", "listed-1", "listed-0"]
    assert not list(archive.jobs(method="text-to-image"))
    assert not list(archive.jobs(state="paused"))


def test_no_call_is_made_without_a_project(cloud: Cloud[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from sdtune.errors import RecipeError

    with pytest.raises(RecipeError, match="project: missing"):
        open_archive(Placement())


def test_an_address_that_is_not_of_this_machine_gets_nothing(
    cloud: Cloud[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", "http://10.1.2.3:80/")
    with pytest.raises(ProjectError, match="plain http to another machine"):
        backend().submit(job())


def test_no_token_goes_to_an_address_that_was_changed(cloud: Cloud[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> Any:
        raise AssertionError("credentials were asked for")

    monkeypatch.setattr("sdtune.backends.vertex.google.default_credentials", forbidden)
    submitted = backend().submit(job("anonymous"))
    open_archive(Placement(project="my-project")).find(submitted.number)
    assert not any("Authorization" in request.headers for request in cloud.vertex.requests)
