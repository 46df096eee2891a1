"""``sdtune jobs``: what runs in the cloud."""

from __future__ import annotations

import os
import sys
import webbrowser
from itertools import islice
from typing import Annotated

import typer

from sdtune.backends.registry import open_archive
from sdtune.cli.output import open_console
from sdtune.cli.session import JsonOption, ProjectOption, RegionOption
from sdtune.commands.gathering import archive_placement
from sdtune.commands.jobs import find, known_state, read_logs, since_when
from sdtune.errors import INTERRUPTED, SdtuneError
from sdtune.jobs.backend import Submitted
from sdtune.methods.catalog import METHODS, find_method

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, add_completion=False)
JobArgument = Annotated[
    str | None, typer.Argument(help="Number, name or full name of the job. Not given: the newest.", metavar="[JOB]")
]


@app.callback()
def group() -> None:
    """List, follow and cancel jobs on Vertex AI."""


@app.command("list")
def list_jobs(
    state: Annotated[str | None, typer.Option("--state", help="Only those: running, failed, succeeded ...")] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Only those of a method.", metavar=f"[{'|'.join(METHODS)}]")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="So many at most.")] = 50,
    project: ProjectOption = None,
    region: RegionOption = None,
    json: JsonOption = False,
) -> None:
    """List sdtune's jobs, newest first."""
    name, state = find_method(method).name if method else None, known_state(state)
    archive = open_archive(archive_placement(project, region))
    open_console(json).jobs(islice(archive.jobs(state=state, method=name), limit))


@app.command()
def show(
    job: JobArgument = None, project: ProjectOption = None, region: RegionOption = None, json: JsonOption = False
) -> None:
    """Show one job."""
    archive = open_archive(archive_placement(project, region))
    record = find(archive, job)
    open_console(json).job(record, archive.describe(record.job_id))


@app.command()
def logs(
    job: JobArgument = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends; with its exit code.")] = False,
    since: Annotated[
        str | None, typer.Option("--since", help="From then on: 2h, 30m, or a time such as 2026-11-25T09:00.")
    ] = None,
    tail: Annotated[int | None, typer.Option("--tail", min=0, help="Only so many of the lines there are.")] = None,
    replica: Annotated[str | None, typer.Option("--replica", help="Only one machine's, such as workerpool1-0.")] = None,
    project: ProjectOption = None,
    region: RegionOption = None,
    json: JsonOption = False,
) -> None:
    """Show what a job said, from its first line."""
    console, start = open_console(json), since_when(since)
    archive = open_archive(archive_placement(project, region))
    record = find(archive, job)
    again = Submitted(record.job_id, record.number, record.region, record.url)
    try:
        console.follow(read_logs(archive, record, follow=follow, since=start, tail=tail, replica=replica))
    except KeyboardInterrupt:
        if follow:
            console.left(again)
        raise typer.Exit(INTERRUPTED) from None
    except SdtuneError:
        if tail is not None or since:
            console.read_again(again)
        raise


@app.command()
def cancel(
    job: Annotated[str, typer.Argument(help="Number, name or full name of the job.", metavar="JOB")],
    project: ProjectOption = None,
    region: RegionOption = None,
    json: JsonOption = False,
) -> None:
    """End a job. What it has written stays."""
    archive = open_archive(archive_placement(project, region))
    record = find(archive, job)
    archive.cancel(record.job_id)
    open_console(json).say(
        f"Job {record.number} ({record.name}) is being cancelled; this shows when it has ended: "
        f"sdtune jobs show {record.number} --region {record.region}",
        job=record.number,
    )


@app.command("open")
def open_job(
    job: JobArgument = None, project: ProjectOption = None, region: RegionOption = None, json: JsonOption = False
) -> None:
    """Show a job in the browser; where there is none, its address."""
    record = find(open_archive(archive_placement(project, region)), job)
    open_console(json).say(record.url, url=record.url)
    # On a machine without a screen Python would open a browser of text in this terminal.
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(record.url)
