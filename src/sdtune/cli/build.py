"""``sdtune build``: the images that jobs run in."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from sdtune.backends.registry import open_builder
from sdtune.cli import build_view
from sdtune.cli.options import own_parameters, parameters_of
from sdtune.cli.output import open_console
from sdtune.cli.session import JsonOption, ProjectOption
from sdtune.commands.build import BuildRun, follow_builds, plan_builds
from sdtune.commands.gathering import open_placement, typed_settings
from sdtune.errors import INTERRUPTED, RecipeError
from sdtune.jobs.backend import Submitted
from sdtune.jobs.images import CONTAINERS, BuildSettings

app = typer.Typer(rich_markup_mode=None, add_completion=False)


def build(
    *,
    images: list[str] | None,
    every: bool,
    workbench: bool,
    list_images: bool,
    follow: str | None,
    cancel: str | None,
    detach: bool,
    dry_run: bool,
    force: bool,
    cache: bool,
    json: bool,
    **arguments: Any,
) -> None:
    """Build, or look at what was built."""
    placement = open_placement({name: arguments[name] for name in OF_PLACEMENT if arguments[name] is not None})
    others = [name for name, given in (("--list", list_images), ("--follow", follow), ("--cancel", cancel)) if given]
    if len(others) > 1 or (others and (images or every)):
        raise RecipeError(f"{others[0]}: stands alone; leave {', '.join(others[1:]) or 'the image'} out.")
    builder = open_builder(placement)
    if list_images:
        build_view.images(builder.images(), as_json=json)
    elif cancel:
        name = builder.full_name(cancel)
        builder.cancel(name)
        open_console(json).say(f"Build {name.rpartition('/')[2]} is being cancelled.", build=name)
    elif follow:
        name = builder.full_name(follow)
        _, _, _, region, _, number = name.split("/")
        submitted = Submitted(name, number, region, "")
        _show(follow_builds(builder, [name]), [submitted], json, region)
    else:
        settings = BuildSettings.from_settings(typed_settings(BuildSettings, arguments))
        plans = plan_builds(images or [], builder, settings, placement, every=every, workbench=workbench, cache=cache)
        if dry_run:
            build_view.plans(builder, plans, as_json=json)
            return
        running = BuildRun(plans, builder, force=force, detach=detach)
        _show(running, running, json, placement.region[0])


def _show(stream: Any, going_on: BuildRun | list[Submitted], json: bool, region: str) -> None:
    try:
        build_view.follow(stream, as_json=json, region=region)
    except KeyboardInterrupt as left:
        builds = [one.build for one in going_on.started] if isinstance(going_on, BuildRun) else going_on
        if str(left):
            open_console(json).left(None, str(left))
        if builds or not str(left):
            build_view.left(builds, as_json=json)
        raise typer.Exit(INTERRUPTED) from None


OPTIONS: dict[str, tuple[Any, Any]] = {
    "images": (
        Annotated[
            list[str] | None,
            typer.Argument(
                help=f"Some of: {', '.join(CONTAINERS)}.", metavar=f"[{'|'.join(CONTAINERS)}]...", show_default=False
            ),
        ],
        None,
    ),
    "every": (Annotated[bool, typer.Option("--all", help="All images.")], False),
    "workbench": (
        Annotated[bool, typer.Option("--workbench", help="The image for Workbench instances, not that for jobs.")],
        False,
    ),
    "list_images": (Annotated[bool, typer.Option("--list", help="Show the images that are there.")], False),
    "follow": (
        Annotated[str | None, typer.Option("--follow", help="Show a build that was left, by its id.", metavar="ID")],
        None,
    ),
    "cancel": (Annotated[str | None, typer.Option("--cancel", help="End a build, by its id.", metavar="ID")], None),
    "detach": (Annotated[bool, typer.Option("--detach", help="Start the build and do not wait for it.")], False),
    "dry_run": (
        Annotated[bool, typer.Option("--dry-run", help="Print the build config, and make not one call.")],
        False,
    ),
    "force": (Annotated[bool, typer.Option("--force", help="Build also what is there already.")], False),
    "cache": (
        Annotated[bool, typer.Option("--cache/--no-cache", help="Take what has not changed from the last image.")],
        True,
    ),
    "json": (JsonOption, False),
    "project": (ProjectOption, None),
    "region": (
        Annotated[str | None, typer.Option("--region", help="Region. Not given: the project's, us-central1.")],
        None,
    ),
    "repository": (
        Annotated[str | None, typer.Option("--repository", help="Artifact Registry repository.  [default: sdtune]")],
        None,
    ),
    "bucket": (
        Annotated[str | None, typer.Option("--bucket", help="Bucket for sources and logs.  [default: PROJECT-sdtune]")],
        None,
    ),
}
OF_PLACEMENT = ("project", "region", "repository", "bucket")


def command(**arguments: Any) -> None:
    build(**arguments)


command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *own_parameters(
            {name: option for name, (option, _) in OPTIONS.items()},
            {name: default for name, (_, default) in OPTIONS.items()},
        ),
        *parameters_of(BuildSettings, taken=set(OPTIONS)),
    ]
)
app.command(
    help="Build the images that jobs run in, with Cloud Build, and try each before it is pushed: it trains one step "
    "of each of its methods."
)(command)
