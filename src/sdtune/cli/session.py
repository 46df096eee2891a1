"""Session: what a command that submits a job needs, gathered once from all the places where it may be set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from sdtune.backends.registry import BACKENDS, open_backend
from sdtune.cli.options import typed_settings
from sdtune.cli.output import Console, open_console
from sdtune.commands.checks import Mistakes
from sdtune.errors import RecipeError
from sdtune.jobs.backend import Backend
from sdtune.jobs.placement import Placement
from sdtune.jobs.project import find_project_file, from_environment, read_project_file, settled
from sdtune.methods.places import BUCKETS, MOUNT

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
    """The session of one command; takes out of ``recipe`` what is no setting of a method.

    backend: what was typed. output: it says where the job runs, if nothing else does. placed: what the command makes
    of what is set for all.
    """
    typed = typed_settings(Placement, dict(arguments))
    in_recipe = {name: recipe.pop(name) for name in Placement.model_fields if name in recipe}
    named = {"backend": recipe.pop("backend")} if "backend" in recipe else {}
    project = read_project_file(find_project_file(), more=("backend",))
    asked = settled(["backend"], {"backend": backend} if backend else {}, named, project).get("backend")
    in_cloud = bool(output) and str(output).startswith((BUCKETS, f"{MOUNT}/"))
    name = str(asked or ("vertex" if in_cloud or typed or in_recipe else "local"))
    if name == "local":
        if only := [*typed, *in_recipe]:
            raise RecipeError(
                f"{only[0]}: is for jobs in Google Cloud, but this one runs on this machine (backend local); "
                "leave one of them out."
            )
        return Session(
            open_console(json), open_backend("local", Placement(), offline=dry_run), None, Mistakes(), dry_run
        )
    if name not in BACKENDS:
        raise RecipeError(f"backend: found {name!r}, wanted {' or '.join(BACKENDS)}.")
    mistakes = Mistakes()
    with mistakes:
        placement = placed(open_placement(typed, in_recipe, project))
        return Session(open_console(json), open_backend(name, placement, offline=dry_run), placement, mistakes, dry_run)
    # The rest is looked at all the same, but nobody is asked on behalf of a project that is not known.
    unknown = Placement(project="unknown-project")
    return Session(open_console(json), open_backend(name, unknown, offline=True), unknown, mistakes, True)


def dataset_and_output(
    dataset: str | None, output: str | None, recipe: dict[str, Any]
) -> tuple[str | None, str | None]:
    """Both as typed, as the environment or the recipe has them; takes them out of ``recipe``."""
    in_recipe: dict[str, Any] = {name: recipe.pop(name) for name in ("dataset", "output") if name in recipe}
    places = {**in_recipe, **from_environment(("dataset", "output"))}
    return dataset or places.get("dataset"), output or places.get("output")


def open_placement(
    typed: Mapping[str, Any], recipe: Mapping[str, Any] | None = None, project: Mapping[str, Any] | None = None
) -> Placement:
    """Where in Google Cloud: as typed, as the environment, the recipe, sdtune.yaml or gcloud have it."""
    if project is None:
        project = read_project_file(find_project_file(), more=("backend",))
    return Placement.from_settings(settled(list(Placement.model_fields), typed, recipe or {}, project)).in_project()


def archive_placement(project: str | None, region: list[str] | None) -> Placement:
    """The project and regions whose jobs are asked for."""
    return open_placement({name: value for name, value in (("project", project), ("region", region)) if value})
