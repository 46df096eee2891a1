"""Custom jobs of Vertex AI: made once, found again, followed to their end, cancelled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.vertex.google import JobsClient, Session
from sdtune.backends.vertex.logs import read_logs
from sdtune.backends.vertex.reasons import translate
from sdtune.backends.vertex.records import record_of, state_of
from sdtune.backends.vertex.regions import Regions
from sdtune.backends.vertex.specs import METHOD_LABEL, RUN_LABEL, VERSION_LABEL
from sdtune.errors import JobError
from sdtune.jobs.archive import JobRecord
from sdtune.jobs.backend import JobEnd, LogLine, StateChange, Submitted
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import RUN_ID


class VertexJobs:
    """The jobs of a project in the regions of ``placement``."""

    def __init__(self, placement: Placement) -> None:
        self._regions = Regions(placement)
        self._client = JobsClient()
        self._session = Session()

    def submit(self, job: Mapping[str, Any], region: str, run_id: str) -> Submitted:
        """Make ``job`` in ``region``, once, whatever becomes of an answer.

        CapacityError: the region has no quota for it. JobError, ProjectError: it is refused, and why.
        """
        named = f"{run_id} --region {region}"
        return self._regions.make_once(
            "the job cannot be submitted",
            region,
            f"sdtune jobs show {named} tells, and sdtune jobs cancel {named} ends it.",
            lambda: _submitted(record_of(self._client.create(self._regions.parent(region), job))),
            lambda: map(_submitted, self._listed(region, f"labels.{RUN_LABEL}={run_id}")),
            lambda made: self.cancel(made.job_id),
        )

    def jobs(self, *, state: str | None = None, method: str | None = None) -> Iterator[JobRecord]:
        """See JobArchive."""
        terms = [f"labels.{VERSION_LABEL}:*"]
        terms += [f"labels.{METHOD_LABEL}={method}"] if method else []
        terms += [f'state="JOB_STATE_{state.upper().replace(" ", "_")}"'] if state else []
        for region in self._regions.placement.region:
            yield from self._listed(region, " AND ".join(terms))

    def find(self, job: str) -> JobRecord:
        """See JobArchive."""
        regions = str(self._regions)
        if job.startswith("projects/"):
            return record_of(self.describe(job))
        if RUN_ID.fullmatch(job) and (found := next(self._of_run(job), None)):
            return found
        if job.isdigit():
            numbered = self._regions.first("the job cannot be looked at", "customJobs", job, self._client.get)
            if numbered is None:
                raise JobError(
                    f"there is no job {job} in {regions}; sdtune jobs list shows all, and --region says where else to "
                    "look."
                )
            return record_of(numbered)
        if named := next((record for record in self.jobs() if job in (record.name, record.run_id)), None):
            return named
        raise JobError(f"no job of sdtune is called {job!r} in {regions}; sdtune jobs list shows them.")

    def _of_run(self, run_id: str) -> Iterator[JobRecord]:
        """The jobs that carry a run's label, in all regions."""
        for region in self._regions.placement.region:
            yield from self._listed(region, f"labels.{RUN_LABEL}={run_id}")

    def describe(self, job_id: str) -> dict[str, Any]:
        """See JobArchive."""
        with self._regions.asking("the job cannot be looked at", job_id):
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
        with self._regions.asking("the logs cannot be read", job_id):
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
        reason = translate(job.get("error", {}).get("message") or f"the job is {state}.", self._regions.place(region))
        # A machine that was there and then taken away is no want of one.
        return JobEnd(reason.exit_code, reason.text, reason.no_capacity and "startTime" not in job)

    def cancel(self, job_id: str) -> None:
        """See JobArchive. JobError: it has ended already."""
        found = record_of(self.describe(job_id))
        if found.has_ended:
            raise JobError(f"job {found.number} has ended already ({found.state}); there is nothing to cancel.")
        with self._regions.asking("the job cannot be cancelled", job_id):
            try:
                self._client.cancel(job_id)
            except api.BadRequest:
                # So says the service, too, where the answer to a first request was lost.
                if record_of(self.describe(job_id)).state not in ("cancelling", "cancelled"):
                    raise

    def _listed(self, region: str, text: str) -> Iterator[JobRecord]:
        ask = partial(self._client.list, text=text)
        return map(record_of, self._regions.listed("jobs cannot be listed", region, ask))


def _submitted(job: JobRecord) -> Submitted:
    return Submitted(job.job_id, job.number, job.region, job.url)
