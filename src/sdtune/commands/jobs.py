"""Jobs: what was sent to the cloud, looked at again: listed, read, followed, cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from sdtune.commands.running import JobFollower, Said
from sdtune.errors import JobError, RecipeError
from sdtune.jobs.archive import JobArchive, JobRecord
from sdtune.jobs.durations import parse_duration


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


STATES = ("queued", "pending", "running", "succeeded", "failed", "cancelling", "cancelled", "paused", "expired")


def known_state(state: str | None) -> str | None:
    """As jobs have it. RecipeError: no job is ever in such a state."""
    if state is not None and state.lower() not in STATES:
        raise RecipeError(f"state: found {state!r}, wanted {' or '.join(STATES)}.")
    return state and state.lower()


def since_when(text: str | None) -> datetime | None:
    """``2h`` ago, or a time; one without a zone is this machine's."""
    if text is None:
        return None
    try:
        if text[:4].isdigit() and "-" in text:
            return datetime.fromisoformat(text).astimezone(UTC)
        return datetime.now(UTC) - timedelta(seconds=parse_duration(text))
    except ValueError:
        raise RecipeError(
            f"since: found {text!r}, wanted a duration such as 2h, or a time such as 2026-11-25T09:00."
        ) from None
