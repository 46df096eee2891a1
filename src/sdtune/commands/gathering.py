"""What a command that submits a job needs, gathered once from all the places where it may be set.

The command line and the functions for notebooks (api) differ in how they are called and in what they show, not in this.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtune.commands.checks import Mistakes
from sdtune.errors import RecipeError
from sdtune.jobs.placement import Placement
from sdtune.jobs.project import find_project_file, from_environment, read_project_file, settled
from sdtune.methods.catalog import find_method
from sdtune.methods.fields import CommonFields
from sdtune.methods.places import BUCKETS, MOUNT
from sdtune.methods.settings import Settings, read_settings


@dataclass(frozen=True)
class Destination:
    """Where a job runs. backend: its name. mistakes: what is wrong with it, to be told with the rest.

    placement: None where jobs run on this machine. offline: no call may be made.
    """

    backend: str
    placement: Placement | None
    mistakes: Mistakes
    offline: bool


def destination(
    arguments: Mapping[str, Any], recipe: dict[str, Any], *, backend: str | None, output: str | None, dry_run: bool,
    backends: Collection[str], placed: Callable[[Placement], Placement] = lambda placement: placement,
) -> Destination:  # fmt: skip
    """Where the job of one command goes; takes out of ``recipe`` what is no setting of a method.

    backend: what was typed, one of ``backends``. output: it says where the job runs, if nothing else does. placed: what
    the command makes of what is set for all.
    """
    typed = typed_settings(Placement, arguments)
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
        return Destination(name, None, Mistakes(), dry_run)
    if name not in backends:
        raise RecipeError(f"backend: found {name!r}, wanted {' or '.join(backends)}.")
    mistakes = Mistakes()
    with mistakes:
        return Destination(name, placed(open_placement(typed, in_recipe, project)), mistakes, dry_run)
    # The rest is looked at all the same, but nobody is asked on behalf of a project that is not known.
    return Destination(name, Placement(project="unknown-project"), mistakes, True)


def typed_settings(settings: type[Settings], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given; what was not, or is None, is not among them."""
    found = {name: arguments.get(name) for name in settings.model_fields}
    return {name: value for name, value in found.items() if value is not None and value != []}


def read_config(config: str | os.PathLike[str] | None, method: type[CommonFields]) -> dict[str, Any]:
    """The settings of a YAML recipe. RecipeError if it is not one, or one of another method."""
    if config is None:
        return {}
    recipe = read_settings(Path(config), "config")
    named = recipe.pop("method", method.name)
    if find_method(str(named)) is not method:
        raise RecipeError(
            f"config: {config} is a recipe of {named}; run it with: sdtune train {named} --config {config}"
        )
    return recipe


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


def archive_placement(project: str | None, region: str | list[str] | None) -> Placement:
    """The project and regions whose jobs are asked for."""
    return open_placement({name: value for name, value in (("project", project), ("region", region)) if value})
