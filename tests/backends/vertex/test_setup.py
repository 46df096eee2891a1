"""A project made ready, on servers that make what they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sdtune.backends.vertex.setup import VertexSetup
from sdtune.errors import ProjectError
from sdtune.jobs.placement import Placement
from tests.backends.vertex.quick import without_waiting
from tests.servers.build import BucketServer, BuildServer

PLACEMENT = Placement(project="my-project")
BUCKET = "my-project-sdtune"


@pytest.fixture
def storage() -> Iterator[BucketServer]:
    with BucketServer() as server:
        yield server


def outcomes(placement: Placement = PLACEMENT) -> list[tuple[str, str]]:
    """Without those that say that something is under way."""
    done = VertexSetup(placement, pause=lambda seconds: None).set_up()
    return [(found.resource.name, found.outcome) for found in done if found.outcome != "creating"]


@pytest.fixture
def fresh(storage: BucketServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[BuildServer]:
    """A project that has nothing but one of the APIs."""
    with BuildServer(storage) as server:
        server.services.enabled["my-project"] = {"logging.googleapis.com"}
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_fresh_project_gets_what_it_lacks_and_only_once(fresh: BuildServer, storage: BucketServer) -> None:
    fresh.operations.slow = 3
    there, *created = outcomes()
    assert there == ("logging.googleapis.com", "there")
    assert [outcome for _, outcome in created] == ["created"] * 8
    assert len(fresh.services.enabled["my-project"]) == 7
    assert [name for name, _ in created[-2:]] == ["sdtune in us-central1", f"gs://{BUCKET} in us-central1"]
    (repository,) = fresh.registry.repositories.values()
    assert repository["format"] == "DOCKER"
    made = storage.made[BUCKET]
    assert made["location"].lower() == "us-central1"
    assert made["iamConfiguration"]["uniformBucketLevelAccess"]["enabled"] is True
    assert made["iamConfiguration"]["publicAccessPrevention"] == "enforced"

    before = len([request for request in fresh.requests if request.method != "GET"])
    assert {outcome for _, outcome in outcomes()} == {"there"}
    assert len([request for request in fresh.requests if request.method != "GET"]) == before
    assert len(storage.made) == 1


def test_every_resource_is_announced_and_none_is_asked_for(fresh: BuildServer, storage: BucketServer) -> None:
    before = len(fresh.requests) + len(storage.requests)
    announced = [resource.name for resource in VertexSetup(PLACEMENT).resources()]
    assert len(fresh.requests) + len(storage.requests) == before
    assert sorted(name for name, _ in outcomes()) == sorted(announced)


def test_an_api_that_was_just_switched_on_may_need_a_moment(fresh: BuildServer) -> None:
    text = "Artifact Registry API has not been used in project 1 before or it is disabled."
    fresh.fail("GET", "/repositories/sdtune$", 403, times=2, message=text)
    assert ("sdtune in us-central1", "created") in outcomes()
    fresh.fail("GET", "/repositories/sdtune$", 403, times=1, message=text)
    with pytest.raises(ProjectError, match="gcloud services enable"):  # nothing was switched on this time
        outcomes()


def test_answers_that_were_lost_make_nothing_fail(
    fresh: BuildServer, storage: BucketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there the second time was made the first time."""
    without_waiting(monkeypatch)
    fresh.cut("POST", ":batchEnable$")
    fresh.cut("POST", "/repositories$")
    storage.drop("POST", r"/storage/v1/b\?")
    _, *created = outcomes()
    assert [outcome for _, outcome in created] == ["created"] * 8
    assert (len(fresh.registry.repositories), list(storage.made)) == (1, [BUCKET])


def test_what_cannot_be_made_is_told(fresh: BuildServer, storage: BucketServer) -> None:
    storage.taken.add(BUCKET)
    with pytest.raises(ProjectError, match=rf"the name {BUCKET} is taken.*--bucket"):
        outcomes()
    fresh.registry.repositories.clear()
    fresh.registry.repository("my-project", "us-central1", "sdtune", kind="PYTHON")
    with pytest.raises(ProjectError, match="is for PYTHON, wanted DOCKER; name another one: --repository"):
        outcomes()
    fresh.fail("GET", "batchGet", 403, message="Permission 'serviceusage.services.get' denied on resource")
    with pytest.raises(ProjectError, match=r"roles/serviceusage\.serviceUsageAdmin"):
        outcomes()


def test_a_bucket_in_another_place_is_told(fresh: BuildServer, storage: BucketServer) -> None:
    storage.put(BUCKET, "x", b"")
    storage.locations[BUCKET] = "EU"
    notes: dict[str, Any] = {done.resource.kind: done.note for done in VertexSetup(PLACEMENT, lambda _: None).set_up()}
    assert "it lies in EU: what jobs in us-central1 read of it is slower" in notes["bucket"]
