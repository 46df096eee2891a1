"""Jobs: what was sent to the cloud, looked at again: listed, read, followed, cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from sdtune.commands.running import JobFollower, Said
from sdtune.errors import JobError
from sdtune.jobs.archive import JobArchive, JobRecord


def newest(archive: JobArchive) -> JobRecord:
    """The job that was made last. JobError: there is none."""
    found = next(archive.jobs(), None)
    if found is None:
        raise JobError("there are no jobs of sdtune yet; sdtune train ... --output gs://bucket/path makes one.")
    return found


def find(archive: JobArchive, job: str | None) -> JobRecord:
    """The job called ``job``, or the newest. JobError: there is none."""
    return archive.find(job) if job else newest(archive)


def read_logs(
    archive: JobArchive,
    record: JobRecord,
    *,
    follow: bool,
    since: datetime | None = None,
    tail: int | None = None,
    replica: str | None = None,
) -> Iterator[Said]:
    """What the job says; if it has ended then, its own error is raised, as the command that submitted it would."""
    follower = JobFollower(trusted=True)
    yield from follower.watch(archive.read_logs(record.job_id, follow=follow, since=since, tail=tail, replica=replica))
    if follow or record.has_ended:
        follower.raise_if_failed(archive.wait(record.job_id))
