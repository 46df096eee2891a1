"""``sdtune sync-nfs``: models from a bucket to a Filestore share."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from sdtune.cli.following import run_and_follow
from sdtune.cli.options import own_parameters, parameters_of
from sdtune.cli.session import JsonOption, open_session
from sdtune.commands.sync_nfs import NOT_FOR_COPIES, for_copies, plan_sync_nfs
from sdtune.jobs.placement import Placement
from sdtune.methods.catalog import METHODS

app = typer.Typer(rich_markup_mode=None, add_completion=False)


def run(
    *,
    source: str | None,
    method: str | None,
    machine_type: str | None,
    detach: bool,
    dry_run: bool,
    json: bool,
    **arguments: Any,
) -> None:
    """Check, show the plan, start, follow."""
    session = open_session(
        {**arguments, **dict.fromkeys(NOT_FOR_COPIES)},
        {},
        backend="vertex",
        output=None,
        json=json,
        dry_run=dry_run,
        placed=for_copies,
    )
    assert session.placement  # a share is copied to by a job on Vertex AI
    plan = plan_sync_nfs(
        source, method, session.backend, session.placement, machine_type=machine_type, mistakes=session.mistakes
    )
    session.console.copy_plan(plan, session.backend.place)
    if dry_run:
        session.console.rendered(plan.rendered, session.backend)
        return
    run_and_follow(session, plan.job, (), detach=detach)


OPTIONS = {
    "source": Annotated[
        str | None,
        typer.Option("--from", help="The --output of a training.  [required]", metavar="gs://bucket/path"),
    ],
    "method": Annotated[
        str | None,
        typer.Option(
            "--method",
            help="The folder of the share to copy to. Not given: as the result's recipe.yaml says.",
            metavar=f"[{'|'.join(METHODS)}]",
        ),
    ],
    "machine_type": Annotated[
        str | None, typer.Option("--machine-type", help="Machine without a GPU.  [default: e2-standard-4]")
    ],
    "detach": Annotated[bool, typer.Option("--detach", help="Submit the job and do not wait for it.")],
    "dry_run": Annotated[bool, typer.Option("--dry-run", help="Check, show what would run, and start nothing.")],
    "json": JsonOption,
}
DEFAULTS = {"detach": False, "dry_run": False, "json": False}


def sync_nfs(**arguments: Any) -> None:
    run(**arguments)


sync_nfs.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *own_parameters(OPTIONS, DEFAULTS),
        *(option for option in parameters_of(Placement, taken=set()) if option.name not in NOT_FOR_COPIES),
    ]
)
app.command(
    help="Copy trained models from a bucket to Filestore shares, under <mount>/<method>/, by a small job without a GPU."
)(sync_nfs)
