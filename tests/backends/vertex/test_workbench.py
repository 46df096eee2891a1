"""Instances are made once, whatever becomes of an answer; waited for to the end; and errors say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sdtune.backends.vertex import workbench
from sdtune.backends.vertex.workbench import VertexWorkbenches
from sdtune.errors import CapacityError, JobError, ProjectError, SdtuneError
from sdtune.jobs.placement import Placement
from sdtune.jobs.workbench import InstanceSpec, NoQuotaError, WorkbenchSettings
from tests.backends.vertex.quick import without_waiting
from tests.servers.faults import Chance
from tests.servers.notebooks import NotebooksServer

ZONE = "us-central1-a"
FULL = f"projects/my-project/locations/{ZONE}/instances/cat"
OURS = {"labels": {"sdtune": "0-1-0", "sdtune-run": "another"}}
PLACEMENT = Placement(project="my-project")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotebooksServer]:
    with NotebooksServer(slow=3) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def place(server: NotebooksServer, pauses: list[float]) -> VertexWorkbenches:
    return VertexWorkbenches(PLACEMENT, pause=pauses.append)


def rendered(place: VertexWorkbenches, **given: Any) -> dict[str, Any]:
    settings = WorkbenchSettings.from_settings(given)
    return place.render(InstanceSpec("cat", settings, PLACEMENT, settings.choose_machine(), (ZONE,), "run-1"), ZONE)


def made(server: NotebooksServer) -> int:
    """How many instances were begun, whatever was answered."""
    return sum(operation.verb == "create" for operation in server.operations.values())


def states(place: VertexWorkbenches, operation: str, until: str) -> list[str]:
    return [change.state for change in place.follow(FULL, operation, until)]


# --- made once -------------------------------------------------------------------------------------------------------


def test_an_instance_is_made_and_waited_for_until_it_can_be_opened(
    server: NotebooksServer, place: VertexWorkbenches
) -> None:
    operation = place.create(rendered(place, gpu="h100", gpus=8))
    assert states(place, operation, "active") == ["initializing", "provisioning", "active"]
    record = place.get(FULL)
    assert record
    assert record.is_ready
    assert (record.run_id, record.gpu, record.gpus) == ("run-1", "NVIDIA_H100_80GB", 8)


@pytest.mark.parametrize("fault", ["cut", "reset", "late", "torn", "garbled"])
def test_a_lost_answer_makes_nothing_twice(fault: str, server: NotebooksServer, place: VertexWorkbenches) -> None:
    server.befall(fault, "POST", "/instances$", times=2, seconds=0.05)
    operation = place.create(rendered(place))
    assert states(place, operation, "active")[-1] == "active"
    assert made(server) == 1
    sent = [request.query["requestId"] for request in server.requests if request.method == "POST"]
    assert len(sent) == 3
    assert len(set(sent)) == 1


def test_an_instance_that_is_there_after_a_lost_answer_is_known_by_its_mark(
    server: NotebooksServer, place: VertexWorkbenches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the service forgot the request's id."""
    server.cut("POST", "/instances$")
    monkeypatch.setattr("uuid.uuid4", lambda: "")
    assert place.create(rendered(place)) == ""
    assert states(place, "", "active")[-1] == "active"
    assert made(server) == 1


def test_anothers_instance_of_the_same_name_is_left_alone(server: NotebooksServer, place: VertexWorkbenches) -> None:
    server.put("cat", **OURS)
    with pytest.raises(JobError, match=rf"an instance cat in {ZONE} already; choose another name, or delete it"):
        place.create(rendered(place))
    assert made(server) == 0


def test_what_passes_is_asked_again_and_in_the_end_told(
    server: NotebooksServer, place: VertexWorkbenches, pauses: list[float]
) -> None:
    server.fail("POST", "/instances$", 503, times=3)
    server.fail("POST", "/instances$", 429, times=1, retry_after=20)
    assert place.create(rendered(place))
    assert pauses == [1, 2, 4, 20]
    pauses.clear()
    server.fail("POST", ":stop$", 503, message="The service is tired.")
    place.follow(FULL, "", "active")
    with pytest.raises(JobError, match=r"the instance cannot be stopped: The service is tired\."):
        place.stop(FULL)
    assert 100 < sum(pauses) <= 120


def test_an_order_waits_until_the_one_before_is_done(server: NotebooksServer, place: VertexWorkbenches) -> None:
    server.put("cat", **OURS)
    operation = place.stop(FULL)
    pause, place._pause = place._pause, lambda seconds: list(place.follow(FULL, operation, "stopped"))
    assert place.delete(FULL)
    place._pause = pause
    with pytest.raises(JobError, match=r"cat is at something else; run the same command once that is done"):
        place.start(FULL)


@pytest.mark.parametrize(("verb", "state", "until"), [("start", "STOPPED", "active"), ("stop", "ACTIVE", "stopped")])
def test_an_order_whose_answer_was_lost_is_not_given_twice(
    verb: str, state: str, until: str, server: NotebooksServer, place: VertexWorkbenches
) -> None:
    server.put("cat", state=state, **OURS)
    server.cut("POST", f":{verb}$")
    assert getattr(place, verb)(FULL) == ""
    assert states(place, "", until)[-1] == until
    assert len(server.operations) == 1


@pytest.mark.parametrize("seed", range(8))
def test_on_a_bad_line_all_is_done_once(
    seed: int, server: NotebooksServer, place: VertexWorkbenches, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_waiting(monkeypatch)
    # Not "late": an order that comes after the next one is one that nobody can tell from a new one.
    kinds = ("status", "reset", "cut", "torn", "garbled")
    server.chance = Chance(seed, rate=0.35, kinds=kinds, statuses=(429, 500, 502, 503, 504))
    assert states(place, place.create(rendered(place)), "active")[-1] == "active"
    assert states(place, place.stop(FULL), "stopped")[-1] == "stopped"
    assert states(place, place.start(FULL), "active")[-1] == "active"
    assert states(place, place.delete(FULL), "deleted")[-1] == "deleted"
    assert server.chance.befell.total() > 5
    assert [operation.verb for operation in server.operations.values()] == ["create", "stop", "start", "delete"]


def test_a_refusal_after_a_lost_answer_is_no_success(server: NotebooksServer, place: VertexWorkbenches) -> None:
    server.befall("reset", "POST", "/instances$")
    server.fail("POST", "/instances$", 400, message="The machine has no such disk.")
    with pytest.raises(JobError, match="The machine has no such disk"):
        place.create(rendered(place))


def test_deleting_what_is_gone_is_no_error(server: NotebooksServer, place: VertexWorkbenches) -> None:
    server.put("cat", **OURS)
    assert states(place, place.delete(FULL), "deleted") == ["stopping", "deleted"]
    assert place.delete(FULL) == ""
    assert place.get(FULL) is None
    assert states(place, "", "deleted") == ["deleted"]


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_an_instance_is_ready_only_once_it_has_its_address(server: NotebooksServer, place: VertexWorkbenches) -> None:
    server.url_is_late = 3
    list(place.follow(FULL, place.create(rendered(place)), "active"))
    record = place.get(FULL)
    assert record
    assert record.url.startswith("https://")


def test_an_address_that_does_not_come_is_not_waited_for_for_ever(
    server: NotebooksServer, place: VertexWorkbenches, pauses: list[float]
) -> None:
    server.url_is_late = 1_000_000
    assert states(place, place.create(rendered(place)), "active")[-1] == "active"
    assert workbench.SETTLES_WITHIN <= sum(pauses) < workbench.SETTLES_WITHIN + 60


def test_what_never_ends_is_left_with_a_hint(
    server: NotebooksServer, place: VertexWorkbenches, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workbench, "LONGEST", 300.0)
    operation = place.create(rendered(place))
    server.slow = 1_000_000
    server.operations[operation].step = 1
    server.instances[FULL]["state"] = "PROVISIONING"
    with pytest.raises(JobError, match=r"not become active within 5 min; it is provisioning.*artifactregistry.reader"):
        list(place.follow(FULL, operation, "active"))
    assert sum(pauses) == 300


def test_an_instance_that_stays_as_it_was_is_not_waited_for(server: NotebooksServer, place: VertexWorkbenches) -> None:
    server.put("cat", state="STOPPED", **OURS)
    with pytest.raises(JobError, match="does not become active: it is stopped, and nothing is done about it"):
        list(place.follow(FULL, "", "active"))


def test_a_line_that_is_down_meanwhile_is_no_end(server: NotebooksServer, place: VertexWorkbenches) -> None:
    operation = place.create(rendered(place))
    server.fail("GET", "/operations/", 503, times=1)
    server.befall("cut", "GET", "/instances/cat$", times=1)
    assert states(place, operation, "active")[-1] == "active"


def test_an_operation_that_is_forgotten_has_ended(server: NotebooksServer, place: VertexWorkbenches) -> None:
    server.put("cat", **OURS)
    assert states(place, f"projects/my-project/locations/{ZONE}/operations/old", "active") == ["active"]


@pytest.mark.parametrize(
    ("code", "said", "kind", "words"),
    [
        (8, "Quota 'NVIDIA_L4_GPUS' exceeded.  Limit: 0.0 in region us-central1.", NoQuotaError,
         "does not become active: the quota NVIDIA_L4_GPUS of project my-project in us-central1 does not suffice"),
        (7, "Quota 'NVIDIA_L4_GPUS' exceeded.  Limit: 1.0 in region us-central1.", NoQuotaError, "does not suffice"),
        (10, "Failed to perform tenant project creation", JobError, "run the same command again in a few minutes"),
        (13, "An internal error has occurred.", JobError, "does not become active: An internal error has occurred."),
    ],
)  # fmt: skip
def test_an_operation_that_fails_says_why(
    code: int, said: str, kind: type[SdtuneError], words: str, server: NotebooksServer, place: VertexWorkbenches
) -> None:
    server.script("create", code=code, message=said)
    operation = place.create(rendered(place))
    with pytest.raises(kind) as told:
        list(place.follow(FULL, operation, "active"))
    assert words in str(told.value)


# --- what there is ---------------------------------------------------------------------------------------------------


def test_all_zones_and_all_pages_are_listed_newest_first(server: NotebooksServer, place: VertexWorkbenches) -> None:
    for number in range(230):
        zone = "europe-west4-a" if number % 2 else ZONE
        server.put(f"cat-{number}", zone, createTime=f"2026-11-25T10:{number // 60:02}:{number % 60:02}Z")
    server.unreachable = ["projects/my-project/locations/us-west1-b"]
    found = place.instances()
    assert [record.name for record in found.records] == [f"cat-{number}" for number in reversed(range(230))]
    assert found.unreachable == ("us-west1-b",)
    assert {record.zone for record in place.instances(ZONE).records} == {ZONE}


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "said", "kind", "words"),
    [
        (429, "Quota 'NVIDIA_T4_GPUS' exceeded.  Limit: 0.0 in region us-central1.", NoQuotaError,
         ["quota NVIDIA_T4_GPUS", "us-central1 does not suffice", "service=compute.googleapis.com", "--zone A,B"]),
        (403, "Quota 'GPUS_ALL_REGIONS' exceeded.  Limit: 0.0 globally.", ProjectError,
         ["GPUS_ALL_REGIONS", "counts in all regions together", "service=compute.googleapis.com"]),
        (503, "The zone 'projects/p/zones/us-central1-a' does not have enough resources available to fulfill the "
              "request.  '(resource type:compute)'.", CapacityError, ["us-central1-a has no such machine free"]),
        (400, "A g2-standard-8 VM instance with 1 nvidia-l4 accelerator(s) is currently unavailable in the "
              "us-central1-a zone. Consider trying your request in another zone.", CapacityError, ["no such machine"]),
        (404, "The resource 'projects/p/zones/us-central1-a/acceleratorTypes/nvidia-tesla-v100' was not found",
         CapacityError, ["us-central1-a has no GPU nvidia-tesla-v100 at all", "gcloud compute accelerator-types list"]),
        (404, "The resource 'projects/p/zones/us-central1-a/machineTypes/a2-highgpu-1g' was not found", CapacityError,
         ["has no machine type a2-highgpu-1g at all", "gcloud compute machine-types list"]),
        (403, "The user does not have access to service account 'nb@p.iam.gserviceaccount.com'.  User: 'ann'.  Ask a "
              "project owner to grant you the iam.serviceAccounts.actAs permission", ProjectError,
         ["let an instance act as nb@p.iam.gserviceaccount.com;", "roles/iam.serviceAccountUser"]),
        (403, "Permission 'notebooks.instances.create' denied on resource 'projects/p'", ProjectError,
         ["you lack the permission notebooks.instances.create", "--role=roles/notebooks.runner"]),
        (403, "Permission 'notebooks.instances.delete' denied on resource 'projects/p'", ProjectError,
         ["--role=roles/notebooks.admin"]),
        (403, "Notebooks API has not been used in project 1 before or it is disabled. Enable it by visiting "
              "https://console.developers.google.com/apis/api/notebooks.googleapis.com/overview", ProjectError,
         ["gcloud services enable notebooks.googleapis.com --project=my-project"]),
        (400, "Constraint constraints/compute.vmExternalIpAccess violated for p.", JobError, ["--no-public-ip"]),
        (400, "Unable to delegate the access of CMEK. Please try again later.", JobError,
         ["--kms-key", "roles/cloudkms.cryptoKeyEncrypterDecrypter"]),
        (400, "Something that nobody has met yet.", JobError, ["cannot be made: Something that nobody has met yet."]),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(
    status: int, said: str, kind: type[SdtuneError], words: list[str], server: NotebooksServer,
    place: VertexWorkbenches, pauses: list[float],
) -> None:  # fmt: skip
    server.fail("POST", "/instances$", status, message=said)
    with pytest.raises(SdtuneError) as told:
        place.create(rendered(place))
    assert type(told.value) is kind
    assert all(word in str(told.value) for word in words), told.value
    # Some say 429 or 503, and would be asked for again in vain.
    assert not pauses
