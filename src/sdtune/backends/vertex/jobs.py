"""Custom jobs of Vertex AI: made once, found again, followed to their end, cancelled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.vertex.google import JobsClient, Session
from sdtune.backends.vertex.logs import read_logs
from sdtune.backends.vertex.once import make_once
from sdtune.backends.vertex.reasons import Place, explained, translate
from sdtune.backends.vertex.records import record_of, state_of
from sdtune.backends.vertex.specs import METHOD_LABEL, RUN_LABEL, VERSION_LABEL
from sdtune.errors import JobError
from sdtune.jobs.archive import JobRecord
from sdtune.jobs.backend import JobEnd, LogLine, StateChange, Submitted
from sdtune.jobs.placement import Placement


class VertexJobs:
    """The jobs of a project in the regions of ``placement``."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement.in_project()
        self._client = JobsClient()
        self._session = Session()

    def submit(self, job: Mapping[str, Any], region: str, run_id: str) -> Submitted:
        """Make ``job`` in ``region``, once, whatever becomes of an answer.

        CapacityError: the region has no quota for it. JobError, ProjectError: it is refused, and why.
        """
        made = make_once(
            lambda: record_of(self._client.create(self._parent(region), job)),
            lambda: next(self._listed(region, f"labels.{RUN_LABEL}={run_id}"), None),
            "the job cannot be submitted",
            self._place(region),
        )
        return Submitted(made.job_id, made.number, made.region, made.url)

    def jobs(self, *, state: str | None = None, method: str | None = None) -> Iterator[JobRecord]:
        """See JobArchive."""
        terms = [f"labels.{VERSION_LABEL}:*"]
        terms += [f"labels.{METHOD_LABEL}={method}"] if method else []
        terms += [f'state="JOB_STATE_{state.upper().replace(" ", "_")}"'] if state else []
        for region in self.placement.region:
            yield from self._listed(region, " AND ".join(terms))

    def find(self, job: str) -> JobRecord:
        """See JobArchive."""
        regions = ", ".join(self.placement.region)
        if job.startswith("projects/"):
            return record_of(self.describe(job))
        if job.isdigit():
            return self._by_number(job)
        if found := next((found for found in self.jobs() if job in (found.name, found.run_id)), None):
            return found
        raise JobError(f"no job of sdtune is called {job!r} in {regions}; sdtune jobs list shows them.")

    def describe(self, job_id: str) -> dict[str, Any]:
        """See JobArchive."""
        with self._asking("the job cannot be looked at", job_id):
            return self._client.get(job_id)

    def read_logs(
        self,
        job_id: str,
        *,
        follow: bool = True,
        since: datetime | None = None,
        tail: int | None = None,
        replica: str | None = None,
    ) -> Iterator[LogLine | StateChange]:
        """See JobArchive."""
        _, project, *_, number = job_id.split("/")
        with self._asking("the logs cannot be read", job_id):
            yield from read_logs(
                lambda body: self._session.call("logging", "POST", "v2/entries:list", body, retry=None),
                lambda: self._client.get(job_id),
                project, number, follow=follow, since=since, tail=tail, replica=replica,
            )  # fmt: skip

    def wait(self, job_id: str) -> JobEnd:
        """See JobArchive: it has ended once its logs have."""
        job = self.describe(job_id)
        state, region = state_of(job), job_id.split("/")[3]
        if state == "succeeded":
            return JobEnd(0)
        if state == "cancelled":
            return JobEnd(None, "the job was cancelled.")
        if state == "expired":
            return JobEnd(None, "the job was ended after its --timeout; give it more.")
        reason = translate(job.get("error", {}).get("message") or f"the job is {state}.", self._place(region))
        # A machine that was there and then taken away is no want of one.
        return JobEnd(reason.exit_code, reason.text, reason.no_capacity and "startTime" not in job)

    def cancel(self, job_id: str) -> None:
        """See JobArchive. JobError: it has ended already."""
        found = record_of(self.describe(job_id))
        if found.has_ended:
            raise JobError(f"job {found.number} has ended already ({found.state}); there is nothing to cancel.")
        with self._asking("the job cannot be cancelled", job_id):
            self._client.cancel(job_id)

    def _by_number(self, number: str) -> JobRecord:
        for region in self.placement.region:
            name = f"{self._parent(region)}/customJobs/{number}"
            with self._asking("the job cannot be looked at", name):
                try:
                    return record_of(self._client.get(name))
                except api.NotFound:
                    continue
        raise JobError(
            f"there is no job {number} in {', '.join(self.placement.region)}; sdtune jobs list shows all, and "
            "--region says where else to look."
        )

    def _listed(self, region: str, text: str) -> Iterator[JobRecord]:
        with self._asking("jobs cannot be listed", self._parent(region)):
            found = self._client.list(self._parent(region), text)
        while True:
            # Each page is asked for as it is reached.
            with self._asking("jobs cannot be listed", self._parent(region)):
                job = next(found, None)
            if job is None:
                return
            yield record_of(job)

    def _asking(self, what: str, name: str) -> AbstractContextManager[None]:
        return explained(what, self._place(name.split("/")[3]))

    def _place(self, region: str) -> Place:
        return Place(self.placement.project or "", region, self.placement.effective_strategy)

    def _parent(self, region: str) -> str:
        return f"projects/{self.placement.project}/locations/{region}"
