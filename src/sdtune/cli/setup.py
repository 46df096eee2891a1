"""``sdtune setup``: a Google Cloud project made ready for jobs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console as RichConsole
from rich.markup import escape

from sdtune.backends.registry import open_provisioner
from sdtune.cli.json_lines import json_line
from sdtune.cli.session import JsonOption, ProjectOption
from sdtune.cli.terminal import Screen
from sdtune.commands.gathering import open_placement
from sdtune.jobs.images import bucket_of
from sdtune.jobs.provisioner import Provisioned

app = typer.Typer(rich_markup_mode=None, add_completion=False)
SAID = {"there": "[dim]there already[/]", "creating": "[yellow]being created ...[/]", "created": "[green]created[/]"}


@app.command()
def command(
    project: ProjectOption = None,
    region: Annotated[
        str | None, typer.Option("--region", help="Where to make it. Not given: the project's, us-central1.")
    ] = None,
    repository: Annotated[
        str | None, typer.Option("--repository", help="Artifact Registry repository for images.  [default: sdtune]")
    ] = None,
    bucket: Annotated[
        str | None, typer.Option("--bucket", help="Bucket for datasets and builds.  [default: PROJECT-sdtune]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what there would be, and make not one call.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Switch on the APIs that jobs need, and make a repository for images and a bucket. What is there stays."""
    typed = {"project": project, "region": region, "repository": repository, "bucket": bucket}
    placement = open_placement({name: value for name, value in typed.items() if value})
    provisioner = open_provisioner(placement)
    out = Screen()
    if dry_run:
        for resource in provisioner.resources():
            if json:
                json_line("dry_run", **asdict(resource))
            else:
                out.print(f"{resource.kind:<12}{escape(resource.name)}\n{'':<12}[dim]{escape(resource.command)}[/]")
        return
    if not json:
        out.print(f"[bold]Setting up[/] {escape(provisioner.place)}")
    for done in provisioner.set_up():
        if json:
            json_line("setup", outcome=done.outcome, note=done.note, **asdict(done.resource))
        else:
            _show(out, done)
    if not json:
        out.print(
            "Ready. Next: [bold]sdtune build --all[/] makes the images, and this keeps the bucket: "
            f"[bold]sdtune init --project {placement.project} --bucket {escape(bucket_of(placement))}[/]"
        )


def _show(out: RichConsole, done: Provisioned) -> None:
    out.print(f"  {done.resource.kind:<12}{escape(done.resource.name):<48} {SAID[done.outcome]}")
    if done.note:
        out.print(f"  [yellow]warning:[/] {escape(done.note)}")
