"""JobArchive: a place that remembers jobs after their launcher has left, and what it tells of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from sdtune.jobs.backend import JobEnd, LogLine, StateChange


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as its place remembers it. Times are None where they have not come; gpu: empty for none."""

    job_id: str
    number: str
    name: str
    task: str
    method: str
    state: str
    region: str
    machine_type: str
    gpu: str
    gpus: int
    replicas: int
    output: str
    created: datetime
    started: datetime | None = None
    ended: datetime | None = None
    error: str = ""
    url: str = ""
    run_id: str = ""

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def accelerators(self) -> str:
        """``2 x 4 L4``: machines, GPUs in each, their name."""
        if not self.gpu:
            return "-"
        each = f"{self.gpus} x {self.gpu}" if self.gpus > 1 else self.gpu
        return f"{self.replicas} machines of {each}" if self.replicas > 1 else each


ENDED = ("succeeded", "failed", "cancelled", "expired", "partially succeeded")
"""States that a job does not leave."""


class JobArchive(Protocol):
    """A place that remembers jobs after their launcher has left."""

    def jobs(self, *, state: str | None = None, method: str | None = None) -> Iterator[JobRecord]:
        """sdtune's own, newest first; asked for page by page as they are taken."""
        ...

    def find(self, job: str) -> JobRecord:
        """The job of this number, full name or display name; the newest of several. JobError if there is none."""
        ...

    def describe(self, job_id: str) -> dict[str, Any]:
        """Everything that the place knows of the job."""
        ...

    def read_logs(
        self, job_id: str, *, follow: bool, since: datetime | None, tail: int | None, replica: str | None
    ) -> Iterator[LogLine | StateChange]:
        """Its lines from the first, or since a time, or the last so many; to its end if followed."""
        ...

    def wait(self, job_id: str) -> JobEnd:
        """How it ended."""
        ...

    def cancel(self, job_id: str) -> None:
        """Stop it."""
        ...
