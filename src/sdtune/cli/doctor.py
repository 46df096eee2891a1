"""``sdtune doctor``: what jobs need, asked before one is sent."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any

import typer

from sdtune.backends.registry import BACKENDS, open_checks
from sdtune.cli import doctor_view
from sdtune.cli.options import parameters_of
from sdtune.cli.session import JsonOption
from sdtune.cli.terminal import Screen
from sdtune.commands.doctor import examine, raise_for_bad
from sdtune.commands.gathering import open_placement, typed_settings
from sdtune.errors import RecipeError
from sdtune.jobs.placement import Placement
from sdtune.jobs.project import find_project_file, from_environment, gcloud_defaults, read_project_file, settled

app = typer.Typer(rich_markup_mode=None, add_completion=False)


def run(*, backend: str | None, build_account: str | None, json: bool, **arguments: Any) -> None:
    """Ask everything, show what was found."""
    typed = typed_settings(Placement, arguments)
    # Whoever names an account of Google Cloud does not ask about this machine.
    name, placement = _place(backend, {**typed, **({"build_account": build_account} if build_account else {})})
    if build_account and not re.fullmatch(r"[^@/\s]+@[^@/\s]+\.[^@/\s]+", build_account):
        raise RecipeError(f"build_account: found {build_account!r}, wanted NAME@PROJECT.iam.gserviceaccount.com.")
    checks = open_checks(name, placement, build_account or "")
    findings = examine(checks)
    if json:
        shown = doctor_view.as_lines(findings)
    else:
        where = f"Vertex AI in {', '.join(placement.region)}, project {placement.project}"
        out = Screen()
        shown = doctor_view.show(out, "This machine" if name == "local" else where, checks, findings)
    raise_for_bad(shown)


def _place(backend: str | None, typed: dict[str, Any]) -> tuple[str, Placement]:
    """The backend that is asked about: Vertex AI where a project is known, this machine where none is."""
    project = read_project_file(find_project_file(), more=("backend",))
    name = settled(["backend"], {"backend": backend} if backend else {}, {}, project).get("backend")
    if name is None:
        known = typed or "project" in {**gcloud_defaults(), **project, **from_environment(["project"])}
        name = "vertex" if known else "local"
    if name not in BACKENDS:
        raise RecipeError(f"backend: found {name!r}, wanted {' or '.join(BACKENDS)}.")
    if name == "local":
        if typed:
            raise RecipeError(
                f"{next(iter(typed))}: is for jobs in Google Cloud, not for this machine (backend local)."
            )
        return name, Placement()
    return name, open_placement(typed, project=project)


BACKEND = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="What to check. Not given: vertex if a project is known, else local.",
        metavar=f"[{'|'.join(BACKENDS)}]",
    ),
]
BUILD_ACCOUNT = Annotated[
    str | None,
    typer.Option(
        "--build-account",
        help="Account that sdtune build is given as its --service-account. Not given: Cloud Build's choice.",
    ),
]
CHECKED = (
    "project", "region", "gpu", "gpus", "machine_type", "force_machine", "replicas", "strategy", "spot", "image",
    "repository", "bucket", "service_account", "network", "nfs", "hf_token_secret", "wandb_key_secret",
)  # fmt: skip
"""The settings of a placement that a check looks at."""


def doctor(**arguments: Any) -> None:
    run(**arguments)


doctor.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, annotation=BACKEND, default=None),
        *(option for option in parameters_of(Placement, taken={"backend", "json"}) if option.name in CHECKED),
        inspect.Parameter("build_account", inspect.Parameter.KEYWORD_ONLY, annotation=BUILD_ACCOUNT, default=None),
        inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, annotation=JsonOption, default=False),
    ]
)
app.command(
    help="Check what jobs need, each point with the command that mends it. Exit code 3 if something is missing."
)(doctor)
