"""Backend: what a place must be able to do so that runs can go there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sdtune.jobs.spec import JobSpec


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line that the training process wrote."""

    text: str


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended: the exit code of the training process, negative for the signal that ended it."""

    exit_code: int


class Backend(Protocol):
    """A place where jobs run."""

    name: str
    place: str
    """In words, for the user: ``this machine (CPU, 2 cores)``."""

    def resolve(self, path: str) -> str:
        """``path``, of a dataset or an output, as the training process will see it."""
        ...

    def list_names(self, folder: str) -> list[str]:
        """Names of what lies directly in ``folder``; empty if there is no such folder."""
        ...

    def can_write(self, folder: str) -> bool:
        """Whether ``folder`` is there, or can be made, and files can be written to it."""
        ...

    def render(self, job: JobSpec) -> dict[str, Any]:
        """What ``submit`` would start, as plain data. Starts nothing."""
        ...

    def submit(self, job: JobSpec) -> str:
        """Start the job; its id. ProjectError if this place cannot run it."""
        ...

    def logs(self, job_id: str) -> Iterator[LogLine]:
        """Every line of the job as it comes, until the job ends."""
        ...

    def wait(self, job_id: str) -> JobEnd:
        """How the job ended, once it has."""
        ...

    def cancel(self, job_id: str) -> None:
        """Stop the job and wait until it has stopped."""
        ...
