"""``sdtune init``: a commented sdtune.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdtune.cli.output import open_console
from sdtune.cli.session import JsonOption, ProjectOption, RegionOption
from sdtune.errors import RecipeError
from sdtune.jobs.placement import Placement
from sdtune.jobs.project import PROJECT_FILE, gcloud_defaults, project_file_text

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def command(
    project: ProjectOption = None,
    region: RegionOption = None,
    bucket: Annotated[str | None, typer.Option("--bucket", help="Bucket that folders here are uploaded to.")] = None,
    service_account: Annotated[str | None, typer.Option("--service-account", help="Account that jobs act as.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write it anew where there is one.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a commented sdtune.yaml into this folder, with every setting of a project."""
    path = Path(PROJECT_FILE)
    if path.exists() and not force:
        raise RecipeError(f"{path.resolve()} is there already; change it, or write it anew with --force.")
    typed = {"project": project, "region": region, "bucket": bucket, "service_account": service_account}
    given = gcloud_defaults() | {name: value for name, value in typed.items() if value}
    checked = Placement.from_settings(given).settings()
    path.write_text(project_file_text({name: checked[name] for name in given}), encoding="utf-8")
    missing = "" if "project" in given else " Write your project's id into it: `project: ID`."
    open_console(json).say(
        f"Wrote {path.resolve()}.{missing} What is set up, and what is not: sdtune doctor", path=str(path)
    )
