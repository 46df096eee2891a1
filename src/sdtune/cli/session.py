"""Session: what a command of the terminal that submits a job needs, and how it shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from sdtune.backends.registry import BACKENDS, open_backend
from sdtune.cli.output import Console, open_console
from sdtune.commands.checks import Mistakes
from sdtune.commands.gathering import destination
from sdtune.jobs.backend import Backend
from sdtune.jobs.placement import Placement

JsonOption = Annotated[bool, typer.Option("--json", help="JSON lines instead of text.")]
ProjectOption = Annotated[str | None, typer.Option("--project", help="Google Cloud project. Not given: gcloud's own.")]
RegionOption = Annotated[
    list[str] | None, typer.Option("--region", help="Region; repeatable or A,B. Not given: the project's, us-central1.")
]


@dataclass(frozen=True)
class Session:
    """placement: None where jobs run on this machine. mistakes: what is wrong with it, to be told with the rest.

    offline: no call may be made.
    """

    console: Console
    backend: Backend
    placement: Placement | None
    mistakes: Mistakes
    offline: bool


def open_session(
    arguments: Mapping[str, Any], recipe: dict[str, Any], *, backend: str | None, output: str | None, json: bool,
    dry_run: bool, placed: Callable[[Placement], Placement] = lambda placement: placement,
) -> Session:  # fmt: skip
    """The session of one command; takes out of ``recipe`` what is no setting of a method. See commands/gathering.py."""
    to = destination(
        arguments, recipe, backend=backend, output=output, dry_run=dry_run, backends=BACKENDS, placed=placed
    )
    where = open_backend(to.backend, to.placement or Placement(), offline=to.offline)
    return Session(open_console(json), where, to.placement, to.mistakes, to.offline)
