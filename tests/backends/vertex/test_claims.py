"""Two people who send jobs to one output, in turn, at once, and after one another's jobs have ended."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sdtune.backends.registry import open_studies
from sdtune.backends.storage import open_client
from sdtune.backends.vertex import claims
from sdtune.backends.vertex.claims import Claim, claim_of, give_back, take, taken_by
from sdtune.errors import JobError, ProjectError, SdtuneError
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import new_run_id
from tests.backends.vertex.quick import without_waiting
from tests.backends.vertex.study_examples import study
from tests.backends.vertex.test_jobs import backend, job
from tests.servers.cloud import Cloud, loopback_cloud
from tests.servers.emulator import Emulator

OUTPUT = "gs://bkt/dog_lora"
PLACEMENT = Placement(project="my-project")


@pytest.fixture(scope="module")
def server() -> Iterator[Cloud[Any]]:
    with loopback_cloud(delays={"JOB_STATE_PENDING": 60}) as cloud:
        yield cloud


@pytest.fixture
def cloud(server: Cloud[Any], monkeypatch: pytest.MonkeyPatch) -> Cloud[Any]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    without_waiting(monkeypatch)
    server.storage.buckets["bkt"] = {}
    server.vertex.no_more_faults()
    for one in server.vertex.jobs.values():
        one.close()
    server.vertex.jobs.clear()
    return server


def a_job(**more: Any) -> Any:
    return replace(job("dog_lora"), run_id=new_run_id(), **more)


def mine(run_id: str = "") -> Claim:
    return claim_of(OUTPUT, PLACEMENT, run_id or new_run_id())


def test_who_comes_second_is_told_and_makes_no_job(cloud: Cloud[Any]) -> None:
    first = backend().submit(a_job())
    with pytest.raises(JobError) as told:
        backend().submit(a_job())
    assert list(cloud.vertex.jobs) == [first.number]
    assert f"{OUTPUT} is written to by job {first.number}, pending, which " in str(told.value)
    assert f"sdtune jobs cancel {first.number} --region us-central1 --project my-project" in str(told.value)
    # And so it is before anything is uploaded.
    reason = backend().why_not_written(OUTPUT)
    assert reason
    assert f"{OUTPUT} {reason}; choose another --output." == str(told.value)
    assert backend().why_not_written("gs://bkt/other") is None
    assert backend().why_not_written(f"{OUTPUT}/") == reason


def test_a_job_that_has_ended_holds_nothing(cloud: Cloud[Any]) -> None:
    first = backend().submit(a_job())
    backend().cancel(first.job_id)
    cloud.vertex.job(first.job_id).wait("JOB_STATE_CANCELLED")
    assert backend().why_not_written(OUTPUT) is None
    second = backend().submit(a_job())
    assert list(cloud.vertex.jobs) == [first.number, second.number]


def test_a_job_that_is_refused_holds_nothing(cloud: Cloud[Any]) -> None:
    cloud.vertex.fail("POST", "customJobs$", 400, times=1)
    with pytest.raises(JobError):
        backend().submit(a_job())
    assert not cloud.storage.buckets["bkt"]
    backend().submit(a_job())


def test_a_job_that_may_have_been_made_holds_its_output(cloud: Cloud[Any]) -> None:
    cloud.vertex.cut("POST", "customJobs$")
    cloud.vertex.fail("GET", "customJobs$", 403, times=1)
    with pytest.raises(JobError, match="may have been made all the same"):
        backend().submit(a_job())
    [number] = cloud.vertex.jobs
    with pytest.raises(JobError, match=f"is written to by job {number}"):
        backend().submit(a_job())


def test_the_next_region_of_the_same_command_is_no_stranger(cloud: Cloud[Any]) -> None:
    place = backend(region="us-central1,europe-west4")
    first = place.submit(a_job())
    cloud.vertex.job(first.job_id).cancel()
    place.try_elsewhere()
    assert place.submit(a_job()).region == "europe-west4"


def test_a_study_holds_its_output_too(cloud: Cloud[Any]) -> None:
    made = open_studies("vertex", PLACEMENT).submit(study("dog_lora"))
    with pytest.raises(JobError, match=f"{OUTPUT} is written to by job {made.number}.*sdtune hpo cancel {made.number}"):
        backend().submit(a_job())
    with pytest.raises(JobError, match="is written to by job"):
        open_studies("vertex", PLACEMENT).submit(study("dog_lora"))


def test_a_copy_to_a_share_writes_nothing_there(cloud: Cloud[Any]) -> None:
    backend().submit(a_job())
    assert backend().submit(a_job(task="sync-nfs")).number in cloud.vertex.jobs


@pytest.mark.parametrize("where", ["ours", "emulator"])
def test_of_many_at_once_one_wins(cloud: Cloud[Any], where: str, request: pytest.FixtureRequest) -> None:
    if where == "emulator":
        emulator = Emulator()
        emulator.__enter__()
        request.addfinalizer(emulator.__exit__)
        open_client("my-project").create_bucket("bkt")
    outcomes: list[Claim | SdtuneError] = []

    def go(claim: Claim) -> None:
        try:
            outcomes.append(take(claim))
        except SdtuneError as error:
            outcomes.append(error)

    def race(number: int) -> list[Claim]:
        outcomes.clear()
        threads = [threading.Thread(target=go, args=(mine(),)) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in outcomes:
            assert isinstance(one, Claim) or "is being submitted" in str(one) or "by several" in str(one)
        return [one for one in outcomes if isinstance(one, Claim)]

    [winner] = race(8)
    # What was left behind long ago is taken over, by one.
    long_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat(timespec="seconds")
    left = take(replace(winner, run_id=new_run_id(), at=long_ago), winner)
    [heir] = race(8)
    assert claims._read(left) == heir
    give_back(heir)
    assert claims._read(left) is None


def test_a_mark_that_was_left_behind_is_taken_over_by_one(cloud: Cloud[Any]) -> None:
    long_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    left = take(replace(mine(), at=long_ago))
    assert taken_by(OUTPUT) is None
    taken = take(mine())
    assert taken.generation != left.generation
    with pytest.raises(JobError, match="being submitted"):
        take(mine())
    # Who has lost it takes nothing away.
    give_back(left)
    assert claims._read(taken) == taken


def test_a_lost_answer_does_not_make_it_a_strangers(cloud: Cloud[Any]) -> None:
    cloud.storage.fail("POST", "uploadType", 503, times=1)
    claim = mine()
    first = take(claim)
    assert take(claim) == first


def test_a_job_of_a_project_that_cannot_be_seen_is_told(cloud: Cloud[Any]) -> None:
    take(replace(mine(), project="theirs"))
    cloud.vertex.fail("GET", "projects/theirs", 403, message="Permission 'aiplatform.customJobs.list' denied")
    told = taken_by(OUTPUT)
    assert told
    assert "(project theirs)" in told
    assert "whether it still runs cannot be seen from here: you lack the permission" in told
    assert "gcloud storage rm gs://bkt/sdtune/outputs/" in told


def test_what_is_no_mark_hinders_nobody(cloud: Cloud[Any]) -> None:
    cloud.storage.put("bkt", mine().address.removeprefix("gs://bkt/"), b"[]")
    assert taken_by(OUTPUT) is None
    assert take(mine()).generation


def test_the_mark_says_who_and_what(cloud: Cloud[Any]) -> None:
    claim = take(mine("0123456789abcdef"))
    [(name, stored)] = cloud.storage.buckets["bkt"].items()
    assert f"gs://bkt/{name}" == claim.address
    told = json.loads(stored.data)
    assert told == {
        "output": OUTPUT, "project": "my-project", "regions": ["us-central1"], "collection": "customJobs",
        "run_id": "0123456789abcdef", "by": claim.by, "at": claim.at,
    }  # fmt: skip
    assert "@" in claim.by


def test_no_bucket(cloud: Cloud[Any]) -> None:
    with pytest.raises(ProjectError, match="there is no bucket nobodys"):
        take(claim_of("gs://nobodys/x", PLACEMENT, "run"))
