"""Backend: what a place must be able to do so that runs can go there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Protocol

from sdtune.jobs.spec import JobSpec
from sdtune.methods.sources import Source


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line that the training process wrote.

    severity: ``info``, ``warning`` or ``error``, judged by what it says. time, replica: where the place knows them;
    replica as Vertex AI names them, such as ``workerpool0-0``.
    """

    text: str
    severity: str = "info"
    time: datetime | None = None
    replica: str = ""


@dataclass(frozen=True, slots=True)
class StateChange:
    """A job passed into another state. text: in words, for the user; seconds: since the job was made."""

    state: str
    text: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that goes on by itself. number: what its commands call it; url: where a browser shows it.

    note: what the user should know of how it came to be.
    """

    job_id: str
    number: str
    region: str
    url: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended.

    exit_code: of the training process, negative for the signal that ended it; None where only a reason is known.
    reason: why it ended so, in the user's terms, as far as the place knows; no_capacity: for want of a machine.
    """

    exit_code: int | None
    reason: str = ""
    no_capacity: bool = False


class Upload(Protocol):
    """A folder or file of this machine that a job is to read, and where it will be for it."""

    @property
    def address(self) -> str: ...

    @property
    def files(self) -> int: ...

    @property
    def size(self) -> int:
        """In bytes."""

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Copy what is not there yet; progress is called with (bytes done, bytes in all)."""


class Backend(Protocol):
    """A place where jobs run."""

    name: ClassVar[str]
    outlives: ClassVar[bool]
    """Jobs go on when the launcher leaves them."""

    @property
    def place(self) -> str:
        """In words, for the user: ``this machine (CPU, 2 cores)``."""

    def resolve(self, path: str) -> str:
        """``path`` of a dataset or an output, written in one way only: absolute, or gs://bucket/path."""
        ...

    def stage(self, path: str, names: Sequence[str], kind: str, output: str) -> Upload | None:
        """What must be copied so that a job can read ``path``; None if it can as it is. Copies nothing.

        names: the files in the folder that are needed, or none for a file. kind: ``datasets`` or ``base-models``.
        """
        ...

    def dataset(self, path: str) -> Source | None:
        """The files at ``path``; None if they cannot be looked at now."""
        ...

    def read(self, file: str) -> bytes | None:
        """A small file, here or in a bucket; None if it cannot be looked at now. OSError: it cannot be read."""
        ...

    def list_names(self, folder: str) -> list[str]:
        """Names of what lies directly in ``folder``; empty if there is no such folder."""
        ...

    def why_not_written(self, folder: str) -> str | None:
        """Why no result can be written to ``folder``, ending the sentence "PATH ..."; None if it can."""
        ...

    def render(self, job: JobSpec) -> dict[str, Any]:
        """What ``submit`` would start, as plain data. Starts nothing."""
        ...

    def as_text(self, rendered: dict[str, Any]) -> str:
        """The same as people read it."""
        ...

    def submit(self, job: JobSpec) -> Submitted:
        """Start the job. ProjectError if this place cannot run it."""
        ...

    def follow(self, job_id: str) -> Iterator[LogLine | StateChange]:
        """Every line of the job as it comes, and every state, until the job ends."""
        ...

    def wait(self, job_id: str) -> JobEnd:
        """How the job ended, once it has."""
        ...

    def cancel(self, job_id: str) -> None:
        """Stop the job."""
        ...

    def try_elsewhere(self) -> str | None:
        """Where ``submit`` will go next after a want of capacity; None if there is no other place."""
        ...
