"""``sdtune.jobs``: ``sdtune jobs`` as functions: what was sent to Vertex AI, looked at again."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sdtune.api import pages
from sdtune.api.runs import About, Log, Run
from sdtune.api.samples import Samples, find_samples
from sdtune.api.screens import open_screen
from sdtune.backends.registry import open_archive, open_backend
from sdtune.commands.gathering import archive_placement
from sdtune.commands.jobs import find, known_state, read_logs, since_when
from sdtune.commands.running import Said
from sdtune.errors import SdtuneError
from sdtune.jobs.archive import JobArchive, JobRecord
from sdtune.jobs.backend import LogLine, Submitted
from sdtune.jobs.placement import Placement
from sdtune.methods.catalog import find_method

Regions = str | builtins.list[str] | None
HEADS = ("job", "name", "method", "state", "GPU", "region", "output")


@dataclass(frozen=True)
class Job:
    """A job as Vertex AI had it when it was asked. record: all that is known of it, by name."""

    record: JobRecord
    archive: JobArchive
    placement: Placement

    @property
    def number(self) -> str:
        """What commands call it."""
        return self.record.number

    @property
    def state(self) -> str:
        """As it was when it was asked; ``refreshed`` asks again."""
        return self.record.state

    @property
    def output(self) -> str:
        """Where its result is, or will be."""
        return self.record.output

    def refreshed(self) -> Job:
        """The same as it is now."""
        return Job(self.archive.find(self.record.job_id), self.archive, self.placement)

    def describe(self) -> dict[str, Any]:
        """Everything that Vertex AI knows of it."""
        return self.archive.describe(self.record.job_id)

    def logs(self, *, since: str | None = None, tail: int | None = None, replica: str | None = None) -> Log:
        """What it has said so far, events left out. See ``logs`` of this module."""
        found, start = Log(), since_when(since)
        try:
            for item in read_logs(self.archive, self.record, follow=False, since=start, tail=tail, replica=replica):
                if isinstance(item, LogLine):
                    found.append(item.text)
        except SdtuneError as error:
            if not self.record.has_ended:
                raise
            # How it ended is the last that there is to say.
            found.append(str(error))
        return found

    def follow(self, *, wait: bool = True, show: bool = True) -> Run:
        """Show it to its end, from its first line, as the call that submitted it did."""
        where = open_backend("vertex", self.placement)
        record = self.record
        about = About(
            record.method or record.task, record.name, record.output, f"Vertex AI in {record.region}",
            [("output", record.output), ("machine", f"{record.machine_type} {record.accelerators}".strip(" -"))],
        )  # fmt: skip
        run = Run(about, _Followed(self), where, open_screen(show), self.archive.cancel)
        run.job = Submitted(record.job_id, record.number, record.region, record.url)
        return run.start(wait)

    def cancel(self) -> None:
        """End it. What it has written stays. JobError: it has ended already."""
        self.archive.cancel(self.record.job_id)

    @property
    def samples(self) -> Samples:
        """The pictures that it has drawn so far."""
        return find_samples(open_backend("vertex", self.placement), self.record.output, ())

    def __repr__(self) -> str:
        one = self.record
        return f"<Job {one.number} {one.name}: {one.state}, {one.accelerators}, {one.region}, {one.output}>"

    def _repr_html_(self) -> str:
        return pages.grid(HEADS, [_cells(self.record)])


class Jobs(builtins.list[Job]):
    """Some jobs; a table in a notebook."""

    def _repr_html_(self) -> str:
        return pages.grid(HEADS, [_cells(job.record) for job in self])


class _Followed:
    """A job that somebody submitted earlier, iterated over to its end."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __iter__(self) -> Iterator[Said]:
        yield from read_logs(self._job.archive, self._job.record, follow=True)


def list(
    *, state: str | None = None, method: str | None = None, limit: int = 50, project: str | None = None,
    region: Regions = None,
) -> Jobs:  # fmt: skip
    """sdtune's jobs, newest first; only those in a ``state`` or of a ``method``, and ``limit`` at most."""
    name, wanted = find_method(method).name if method else None, known_state(state)
    placement = archive_placement(project, region)
    archive = open_archive(placement)
    found = islice(archive.jobs(state=wanted, method=name), limit)
    return Jobs(Job(record, archive, placement) for record in found)


def show(job: str | None = None, *, project: str | None = None, region: Regions = None) -> Job:
    """The job of this number, name or full name; not given: the newest. JobError: there is none."""
    placement = archive_placement(project, region)
    archive = open_archive(placement)
    return Job(find(archive, job), archive, placement)


def logs(
    job: str | None = None, *, since: str | None = None, tail: int | None = None, replica: str | None = None,
    project: str | None = None, region: Regions = None,
) -> Log:  # fmt: skip
    """What a job has said so far, events left out; ``show(job).follow()`` goes on to its end.

    since: ``"2h"``, or a time such as ``"2026-11-25T09:00"``. tail: only so many of the lines there are. replica: only
    one machine's, such as ``"workerpool1-0"``.
    """
    return show(job, project=project, region=region).logs(since=since, tail=tail, replica=replica)


def cancel(job: str, *, project: str | None = None, region: Regions = None) -> None:
    """End a job. What it has written stays. JobError: it has ended already."""
    show(job, project=project, region=region).cancel()


def open(job: str | None = None, *, project: str | None = None, region: Regions = None) -> str:
    """The address at which a browser shows the job: the kernel of a notebook may have no screen to show it on."""
    return show(job, project=project, region=region).record.url


def _cells(record: JobRecord) -> tuple[str, ...]:
    return (
        record.number, record.name, record.method or record.task, record.state, record.accelerators, record.region,
        record.output,
    )  # fmt: skip
