"""Workbench instances by the Notebooks API, version 2: made once, started, stopped, deleted, and waited for."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from google.api_core import exceptions as api
from google.api_core.retry import Retry

from sdtune.backends.connections import may_be_done, passes, retry_after
from sdtune.backends.vertex.google import RETRY, Session, address_of
from sdtune.backends.vertex.specs import RUN_LABEL
from sdtune.backends.vertex.workbench_reasons import QUEUED, Facts, asking, reason_of
from sdtune.backends.vertex.workbench_specs import as_text, create_request, record_of
from sdtune.errors import CapacityError, JobError, ProjectError
from sdtune.jobs.backend import StateChange
from sdtune.jobs.placement import Placement
from sdtune.jobs.workbench import InstanceRecord, InstanceSpec, Listing

LONGEST_ASKED = 120.0
"""Seconds for which something is asked for again: quotas of requests are counted by the minute."""
SECONDS_BETWEEN_POLLS = 5.0
PATIENCE = RETRY.with_timeout(900)
"""For an instance that goes on meanwhile: a line that is down for a while is no reason to leave it."""
LONGEST = 40 * 60.0
"""Seconds until an instance is ready. Terraform's provider waits as long; minutes are usual."""
AT_REST = ("active", "stopped", "suspended")
SETTLES_WITHIN = 120.0
"""Seconds after an operation's end in which the state may still be the old one, and the address not there yet."""
WORDS = {
    "initializing": "initializing: the machine is made",
    "provisioning": "provisioning: the image, and with a GPU its driver, come onto it",
    "starting": "starting",
    "active": "active",
    "stopping": "stopping",
}


class VertexWorkbenches:
    """The instances of a project. See Workbenches. pause: waits so many seconds."""

    def __init__(self, placement: Placement, pause: Callable[[float], None] = time.sleep) -> None:
        self.placement = placement
        self.project = placement.project or ""
        self._pause = pause
        self._session = Session()

    @property
    def place(self) -> str:
        return f"project {self.project}"

    def render(self, spec: InstanceSpec, zone: str) -> dict[str, Any]:
        return create_request(spec, zone)

    def as_text(self, rendered: dict[str, Any]) -> str:
        return as_text(rendered, address_of("notebooks"))

    # What is there ---------------------------------------------------------------------------------------------------

    def instances(self, zone: str | None = None) -> Listing:
        # The - stands for all zones.
        parent = f"projects/{self.project}/locations/{zone or '-'}"
        query: dict[str, Any] = {"pageSize": 100}
        found: list[InstanceRecord] = []
        unreachable: list[str] = []
        with asking("instances cannot be listed", Facts(self.project, zone or self.placement.region[0])):
            while True:
                answer = self._session.call("notebooks", "GET", f"v2/{parent}/instances", query=query)
                found += map(record_of, answer.get("instances", ()))
                unreachable += answer.get("unreachable", ())
                if not (token := answer.get("nextPageToken")):
                    break
                query["pageToken"] = token
        found.sort(key=lambda record: record.created.timestamp() if record.created else 0.0, reverse=True)
        # Each page says it anew.
        return Listing(tuple(found), tuple(dict.fromkeys(zone.rpartition("/")[2] for zone in unreachable)))

    def get(self, instance_id: str) -> InstanceRecord | None:
        return self._get(instance_id, RETRY)

    def _get(self, instance_id: str, retry: Retry) -> InstanceRecord | None:
        with asking("the instance cannot be looked at", self._facts(instance_id)):
            try:
                return record_of(self._session.call("notebooks", "GET", f"v2/{instance_id}", retry=retry))
            except api.NotFound:
                return None

    # What is done to them --------------------------------------------------------------------------------------------

    def create(self, rendered: dict[str, Any]) -> str:
        parent, name, body = rendered["parent"], rendered["instanceId"], rendered["instance"]
        full = f"{parent}/instances/{name}"
        # Asked again under the same id, the API makes nothing twice.
        query = {"instanceId": name, "requestId": str(uuid.uuid4())}
        with asking("the instance cannot be made", self._facts(full)):
            try:
                return self._begin("POST", f"{parent}/instances", body, query)
            except api.Conflict:
                made = self.get(full)
                if made and made.run_id and made.run_id == body["labels"].get(RUN_LABEL):
                    return ""
                raise JobError(
                    f"there is an instance {name} in {full.split('/')[3]} already; choose another name, or delete it: "
                    f"sdtune workbench delete {name}"
                ) from None

    def start(self, instance_id: str) -> str:
        with asking("the instance cannot be started", self._facts(instance_id)):
            return self._begin("POST", f"{instance_id}:start", {}, order=True)

    def stop(self, instance_id: str) -> str:
        with asking("the instance cannot be stopped", self._facts(instance_id)):
            return self._begin("POST", f"{instance_id}:stop", {}, order=True)

    def delete(self, instance_id: str) -> str:
        with asking("the instance cannot be deleted", self._facts(instance_id)):
            try:
                return self._begin("DELETE", instance_id, None, {"requestId": str(uuid.uuid4())}, order=True)
            except api.NotFound:
                return ""

    def _begin(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        query: Mapping[str, str] | None = None,
        *,
        order: bool = False,
    ) -> str:
        """The operation that a request begins, by a request that may be repeated.

        order: to an instance that is there. Once an answer was lost, a refusal for what it is at says that the order
        was taken, and the operation, which is not known then, is empty.
        """
        waited, longest, doubt = 0.0, 1.0, False
        while True:
            try:
                answer = self._session.call("notebooks", method, f"v2/{path}", body, query=query, retry=None)
                return str(answer.get("name", ""))
            except Exception as error:
                busy = isinstance(error, api.Conflict) and QUEUED in str(error).lower()
                if doubt and order and (busy or isinstance(error, api.BadRequest)):
                    return ""  # it is at it, or was there already: the answer that was lost had said yes
                doubt = doubt or may_be_done(error)
                wait = max(longest, retry_after(error))
                if not (busy or _passes(error)) or waited + wait > LONGEST_ASKED:
                    raise
            self._pause(wait)
            waited, longest = waited + wait, min(2 * longest, 15.0)

    # Waiting ---------------------------------------------------------------------------------------------------------

    def follow(self, instance_id: str, operation: str, until: str) -> Iterator[StateChange]:
        what, facts = f"the instance does not become {until}", self._facts(instance_id)
        began, seen, going_on = time.monotonic(), "", bool(operation)
        waited = rested = 0.0
        while True:
            going_on = going_on and self._goes_on(operation, what, facts)
            record = self._get(instance_id, PATIENCE)
            state = record.state if record else "deleted"
            if state != seen:
                seen, rested = state, 0.0
                yield StateChange(state, WORDS.get(state, state), time.monotonic() - began)
            if not going_on:
                if record.is_ready if record and until == "active" else state == until:
                    return
                if state in AT_REST and rested >= SETTLES_WITHIN:
                    if state == until:
                        return  # it runs, and its address may come yet
                    raise JobError(f"{what}: it is {state}, and nothing is done about it any more.")
                if record is None:
                    raise JobError(f"{what}: there is no instance {facts.instance} in {facts.zone} any more.")
                rested += SECONDS_BETWEEN_POLLS
            if waited >= LONGEST:
                raise JobError(_too_long(what, facts, seen))
            waited += SECONDS_BETWEEN_POLLS
            self._pause(SECONDS_BETWEEN_POLLS)

    def _goes_on(self, operation: str, what: str, facts: Facts) -> bool:
        """Whether it has yet to end; its error is raised."""
        with asking(what, facts):
            try:
                found = self._session.call("notebooks", "GET", f"v2/{operation}", retry=PATIENCE)
            except api.NotFound:
                return False  # operations are forgotten some time after their end
            if error := found.get("error"):
                raise api.from_grpc_status(error.get("code", 13), error.get("message", ""))
        return not found.get("done")

    def _facts(self, instance_id: str) -> Facts:
        return Facts(self.project, instance_id.split("/")[3], instance_id.rpartition("/")[2])


def _passes(error: Exception) -> bool:
    """A quota of machines says 429 as one of requests does, and a zone without machines 503: neither passes so soon."""
    no_machine = isinstance(error, api.GoogleAPICallError) and isinstance(
        reason_of(error, Facts("", "")), CapacityError | ProjectError
    )
    return passes(error) and not no_machine


def _too_long(what: str, facts: Facts, state: str) -> str:
    """What may be wrong with an instance that is in ``state`` for so long."""
    hint = (
        " Most often its account may not read the image (roles/artifactregistry.reader), or the image is not built on "
        "Google's Workbench container."
        if state == "provisioning"
        else ""
    )
    return f"{what} within {LONGEST / 60:.0f} min; it is {state}, and goes on (sdtune workbench list).{hint}"
