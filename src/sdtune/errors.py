"""The errors a user can meet, one class per kind, one exit code per class.

A message says what was found, what was wanted and what to do. Only ``cli`` and
``training/__main__`` turn an error into text and an exit code.
"""

from __future__ import annotations

from typing import ClassVar


class SdtuneError(Exception):
    """Something the user can mend. The message is shown as it stands, without a traceback."""

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook in place of a traceback."""
        return [f"\x1b[1;31m{type(self).__name__}\x1b[0m: {self}"]


class RecipeError(SdtuneError):
    """The settings of a run are wrong; the message lists every mistake at once."""

    exit_code = 2
    kind = "recipe"


class DatasetError(SdtuneError):
    """The dataset cannot be trained on as it is."""

    exit_code = 2
    kind = "dataset"


class ProjectError(SdtuneError):
    """The place where a run should happen is missing or not set up."""

    exit_code = 3
    kind = "project"


class JobError(SdtuneError):
    """The job could not be started, or ended without its result."""

    exit_code = 4
    kind = "job"


class CapacityError(JobError):
    """No machine could be had for the job there; another place may have one."""


class TrainingError(SdtuneError):
    """Training itself went wrong: bad base model, loss not finite, nothing learned."""

    exit_code = 5
    kind = "training"


class PublishError(SdtuneError):
    """The result exists, but could not be shown where it was asked for."""

    exit_code = 6
    kind = "publish"


class NotebookError(SdtuneError):
    """A cell of a notebook failed, took too long or ended its kernel; the notebook up to there exists."""

    exit_code = 7
    kind = "notebook"


INTERRUPTED, TERMINATED = 130, 143
"""The exit codes of what Ctrl-C and what SIGTERM has stopped, which is no error: 128 and the number of the signal, as
of a process that has ended by it."""

ERRORS: dict[str, type[SdtuneError]] = {
    error.kind: error
    for error in (RecipeError, DatasetError, ProjectError, JobError, TrainingError, PublishError, NotebookError)
}
"""By ``kind``, so that an error told by the training process keeps its exit code in the launcher."""
