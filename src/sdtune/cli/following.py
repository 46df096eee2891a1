"""Run a planned job and show it, to its end or until the user leaves."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from sdtune.cli.session import Session
from sdtune.commands.running import JobRun
from sdtune.errors import INTERRUPTED, RecipeError, SdtuneError
from sdtune.jobs.backend import Upload
from sdtune.jobs.spec import JobSpec


def run_and_follow(session: Session, job: JobSpec, uploads: Sequence[Upload], *, detach: bool) -> None:
    """Ends the command with its error, or with the code of Ctrl-C."""
    if detach and not session.backend.outlives:
        raise RecipeError("detach: a job of this machine ends with the command that started it; leave --detach out.")
    running = JobRun(job, uploads, session.backend, detach=detach)
    try:
        session.console.follow(running)
    except KeyboardInterrupt as left:
        session.console.left(running.submitted if session.backend.outlives else None, str(left))
        raise typer.Exit(INTERRUPTED) from None
    except SdtuneError:
        if running.submitted and session.backend.outlives:
            session.console.read_again(running.submitted)
        raise
