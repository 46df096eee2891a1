"""A planned job, run: what it needs is uploaded, it is submitted, followed, and believed only when it has a result."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

from sdtune import events
from sdtune.errors import ERRORS, JobError, RecipeError, SdtuneError
from sdtune.jobs.backend import Backend, JobEnd, LogLine, StateChange, Submitted, Upload
from sdtune.jobs.spec import JobSpec, new_run_id

Said = events.Event | LogLine | StateChange | Submitted
LAST_LINES = 30
BY_EXIT_CODE: dict[int, type[SdtuneError]] = {RecipeError.exit_code: RecipeError} | {
    error.exit_code: error for error in ERRORS.values() if error.exit_code != RecipeError.exit_code
}
"""The errors of a process of which only the exit code is known."""


class JobRun:
    """Iterate over it to run the job; what it yields is what the user sees.

    Raises the run's own error, or JobError, if the job ends without its result. Leaving early (Ctrl-C) stops a job
    that does not outlive its launcher. submitted: the job, once there is one; detach: do not wait for its end.
    """

    def __init__(self, job: JobSpec, uploads: Sequence[Upload], backend: Backend, *, detach: bool = False) -> None:
        self.submitted: Submitted | None = None
        self._job, self._uploads, self._backend, self._detach = job, uploads, backend, detach

    def __iter__(self) -> Iterator[Said]:
        for upload in self._uploads:
            yield from uploaded(upload)
        while True:
            # None while it is made: what was before has ended.
            self.submitted = None
            self.submitted = self._backend.submit(self._job)
            if self._backend.outlives:
                yield self.submitted
            if self.submitted.note:
                yield events.Note(self.submitted.note, "warning")
            if self._detach:
                return
            end = JobFollower(self._backend.outlives)
            try:
                yield from end.watch(self._backend.follow(self.submitted.job_id))
                how = self._backend.wait(self.submitted.job_id)
            except BaseException:
                if not self._backend.outlives:
                    self._backend.cancel(self.submitted.job_id)
                raise
            if not how.no_capacity or (region := self._backend.try_elsewhere()) is None:
                end.raise_if_failed(how)
                return
            yield events.Note(f"{how.reason} Now trying {region}.", "warning")
            self._job = replace(self._job, run_id=new_run_id())


class JobFollower:
    """Listens to a job's lines for how it ends. trusted: its place tells truly whether it succeeded."""

    def __init__(self, trusted: bool) -> None:
        self._trusted = trusted
        self._failed: events.Failed | None = None
        self._finished = False
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)

    def watch(self, lines: Iterator[LogLine | StateChange]) -> Iterator[Said]:
        """The same lines, with those that are events as events. A failure is kept for the end."""
        for line in lines:
            event = events.parse(line.text) if isinstance(line, LogLine) else None
            if isinstance(event, events.Failed):
                self._failed = event
                continue
            if isinstance(event, events.Finished | events.Executed):
                # What failed before it was another try of the same job, on a machine that was then taken away.
                self._finished, self._failed = True, None
            if event is None and isinstance(line, LogLine):
                self._last_lines.append(line.text)
            yield event or line

    def raise_if_failed(self, end: JobEnd) -> None:
        """The run's own error; else what its place says of it; else what its last lines were."""
        if self._failed:
            raise ERRORS.get(self._failed.kind, JobError)(self._failed.text)
        if end.exit_code == 0 and (self._finished or self._trusted):
            return
        if end.reason:
            raise BY_EXIT_CODE.get(end.exit_code or JobError.exit_code, JobError)(end.reason)
        raise JobError(_unexplained(end.exit_code or 0, list(self._last_lines)))


def uploaded(upload: Upload) -> Iterator[events.Event]:
    """Copy what is not there yet, and tell how far it has come."""
    size = upload.size // 1_000_000
    files = f"{upload.files:,} file" if upload.files == 1 else f"{upload.files:,} files"
    yield events.Phase("upload", f"Uploading {files}, {size:,} MB, to {upload.address}")
    reached, left = (0, 0), False

    def progress(done: int, total: int) -> None:
        nonlocal reached
        reached = (done // 1_000_000, total // 1_000_000)
        if left:
            raise _LeftError

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(upload.run, progress)
        try:
            while not wait([running], timeout=0.2).done:
                yield events.Progress("upload", *reached)
        except BaseException:  # Ctrl-C must not wait for gigabytes
            left = True
            raise
        running.result()


class _LeftError(Exception):
    """Ends an upload that nobody waits for."""


def _unexplained(exit_code: int, last_lines: list[str]) -> str:
    """A run that ended without a word of its own: killed, or crashed below Python."""
    if exit_code == -9:
        how = "was killed (signal 9), most often because the machine ran out of memory"
    elif exit_code < 0:
        how = f"was ended by signal {-exit_code}"
    else:
        how = f"ended with exit code {exit_code} and without its result"
    tail = "".join(f"\n  | {line}" for line in last_lines)
    return f"the training process {how}." + (f" Its last lines:{tail}" if tail else "")
