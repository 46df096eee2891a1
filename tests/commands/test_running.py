"""A job is run to its end, and none is believed that left no result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest

from sdtune import events
from sdtune.backends.local.backend import LocalBackend
from sdtune.commands.running import JobRun
from sdtune.errors import CapacityError, JobError, RecipeError, TrainingError
from sdtune.jobs.backend import JobEnd, LogLine, StateChange, Submitted
from sdtune.jobs.spec import JobSpec

GOOD = JobEnd(0)
FINISHED = events.to_line(events.Finished(1.0, 4, 0.5, 0.01))
JOB = JobSpec("out", "train", "dreambooth-lora", "diffusers", "/out", ("train",))
FAILED = events.to_line(events.Failed("training", "the loss was nan at step 3"))


class Tape(LocalBackend):
    """A backend that plays recorded lines and an exit code."""

    def __init__(self, *lines: str, end: JobEnd = GOOD) -> None:
        super().__init__()
        self.lines, self.end, self.cancelled = lines, end, False
        self.submitted: list[JobSpec] = []

    def submit(self, job: JobSpec) -> Submitted:
        self.submitted.append(job)
        return Submitted("1", "1", "", "")

    def follow(self, job_id: str) -> Iterator[LogLine]:
        yield from map(LogLine, self.lines)

    def wait(self, job_id: str) -> JobEnd:
        return self.end

    def cancel(self, job_id: str) -> None:
        self.cancelled = True


class CloudTape(Tape):
    """The same for jobs that go on by themselves, in as many regions as it has ends."""

    outlives: ClassVar[bool] = True

    def __init__(self, *lines: str, ends: tuple[JobEnd, ...]) -> None:
        super().__init__(*lines)
        self.ends = list(ends)

    def follow(self, job_id: str) -> Iterator[LogLine | StateChange]:  # type: ignore[override]
        yield StateChange("running", "running", 1.0)
        yield from super().follow(job_id)

    def wait(self, job_id: str) -> JobEnd:
        return self.ends.pop(0)

    def try_elsewhere(self) -> str | None:  # type: ignore[override]
        return "us-east1" if self.ends else None


def test_events_and_lines_come_through() -> None:
    note = events.Note("hello")
    assert list(JobRun(JOB, (), Tape("a line", events.to_line(note), FINISHED))) == [
        LogLine("a line"), note, events.parse(FINISHED),
    ]  # fmt: skip


def test_the_trainers_own_error_is_raised_as_it_was() -> None:
    with pytest.raises(TrainingError, match="the loss was nan at step 3"):
        list(JobRun(JOB, (), Tape(FAILED, end=JobEnd(5))))


@pytest.mark.parametrize(
    ("exit_code", "lines", "words"),
    [
        (0, ["all good"], "ended with exit code 0 and without its result"),
        (1, ["Boom"], "ended with exit code 1"),
        (-9, [], "was killed .signal 9., most often because the machine ran out of memory"),
        (-11, [], "was ended by signal 11"),
        (1, [FINISHED], "ended with exit code 1"),
    ],
)
def test_a_run_without_a_result_has_failed(exit_code: int, lines: list[str], words: str) -> None:
    with pytest.raises(JobError, match=words) as caught:
        list(JobRun(JOB, (), Tape(*lines, end=JobEnd(exit_code))))
    for line in lines:
        assert line == FINISHED or f"| {line}" in str(caught.value)


def test_leaving_early_stops_a_job_of_this_machine() -> None:
    tape = Tape("one", "two", FINISHED)
    stream = iter(JobRun(JOB, (), tape))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert tape.cancelled


def test_leaving_early_leaves_a_job_in_the_cloud_alone() -> None:
    tape = CloudTape("one", FINISHED, ends=(JobEnd(0),))
    run = JobRun(JOB, (), tape)
    stream = iter(run)
    assert next(stream) == Submitted("1", "1", "", "") == run.submitted
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not tape.cancelled


def test_a_run_that_ends_well_is_not_cancelled() -> None:
    tape = Tape(FINISHED)
    list(JobRun(JOB, (), tape))
    assert not tape.cancelled


def test_who_detaches_does_not_wait() -> None:
    tape = CloudTape("one", ends=())
    assert [type(item) for item in JobRun(JOB, (), tape, detach=True)] == [Submitted]


def test_a_try_that_failed_before_the_one_that_succeeded_does_not_count() -> None:
    list(JobRun(JOB, (), CloudTape(FAILED, FINISHED, ends=(JobEnd(0),))))


def test_the_word_of_the_place_is_taken_where_the_last_lines_were_lost() -> None:
    list(JobRun(JOB, (), CloudTape("one", ends=(JobEnd(0),))))
    with pytest.raises(JobError, match="the job was cancelled"):
        list(JobRun(JOB, (), CloudTape("one", ends=(JobEnd(None, "the job was cancelled."),))))


@pytest.mark.parametrize(("exit_code", "kind"), [(2, RecipeError), (5, TrainingError), (1, JobError), (137, JobError)])
def test_the_exit_code_of_the_process_says_which_error_it_was(exit_code: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="as the place says"):
        list(JobRun(JOB, (), CloudTape(ends=(JobEnd(exit_code, "as the place says"),))))


def test_the_next_region_is_tried_where_there_was_no_machine() -> None:
    none = JobEnd(None, "us-central1 has none.", no_capacity=True)
    tape = CloudTape(FINISHED, ends=(none, JobEnd(0)))
    told = [item for item in JobRun(JOB, (), tape) if isinstance(item, events.Note)]
    assert told == [events.Note("us-central1 has none. Now trying us-east1.", "warning")]
    # Another submission, another name, so that neither is taken for the other.
    first, second = tape.submitted
    assert first.run_id != second.run_id
    with pytest.raises(JobError, match="us-central1 has none"):
        list(JobRun(JOB, (), CloudTape(ends=(none,))))


def test_a_submission_that_is_refused_is_not_followed() -> None:
    class Full(CloudTape):
        def submit(self, job: JobSpec) -> Submitted:
            raise CapacityError("no quota")

    with pytest.raises(CapacityError, match="no quota"):
        list(JobRun(JOB, (), Full(ends=())))


class Slow:
    """An upload."""

    address, files, size = "gs://b/x", 2, 5_000_000

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.ran = error, False

    def run(self, progress: Callable[[int, int], None]) -> None:
        import time

        progress(1_000_000, 5_000_000)
        time.sleep(0.5)
        if self.error:
            raise self.error
        self.ran = True


def test_folders_are_uploaded_before_the_job_is_made() -> None:
    tape, upload = Tape(FINISHED), Slow()
    told = list(JobRun(JOB, (upload,), tape))
    assert told[0] == events.Phase("upload", "Uploading 2 files, 5 MB, to gs://b/x")
    assert events.Progress("upload", 1, 5) in told
    assert upload.ran
    lost = Tape(FINISHED)
    with pytest.raises(RecipeError, match="gone"):
        list(JobRun(JOB, (Slow(RecipeError("gone")),), lost))
    assert not lost.submitted
