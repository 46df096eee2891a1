"""``sdtune notebook run``: a notebook from top to bottom, as a job on Vertex AI or on this machine."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Annotated, Any

import typer

from sdtune.backends.registry import BACKENDS, open_builder
from sdtune.cli.following import run_and_follow
from sdtune.cli.options import own_parameters, parameters_of
from sdtune.cli.sections import sectioned
from sdtune.cli.session import JsonOption, open_session
from sdtune.commands.build import image_remark
from sdtune.commands.notebook import NOT_FOR_NOTEBOOKS, for_notebooks, gather_parameters, plan_notebook_run
from sdtune.commands.running import JobRun
from sdtune.errors import INTERRUPTED, RecipeError
from sdtune.jobs.durations import parse_duration
from sdtune.jobs.images import CONTAINERS
from sdtune.jobs.placement import Placement
from sdtune.jobs.project import from_environment

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, add_completion=False)


@app.callback()
def group() -> None:
    """Run notebooks without a browser."""


def run(
    *,
    notebook: str | None,
    output: str | None,
    param: list[str] | None,
    param_raw: list[str] | None,
    param_file: list[str] | None,
    param_yaml: list[str] | None,
    backend: str | None,
    container: str,
    kernel: str | None,
    cell_timeout: str | None,
    overwrite: bool,
    detach: bool,
    dry_run: bool,
    json: bool,
    **arguments: Any,
) -> None:
    """Check, show the plan, start, follow."""
    output = output or from_environment(("output",)).get("output")
    session = open_session(
        {**arguments, **dict.fromkeys(NOT_FOR_NOTEBOOKS)}, {}, backend=backend, output=output, json=json,
        dry_run=dry_run, placed=for_notebooks,
    )  # fmt: skip
    limit: int | None = None
    with session.mistakes:
        limit = _seconds(cell_timeout)
    plan = plan_notebook_run(
        notebook,
        output,
        partial(gather_parameters, param or (), param_raw or (), param_file or (), param_yaml or ()),
        session.backend,
        placement=session.placement,
        container=container,
        kernel=kernel,
        cell_timeout=limit,
        overwrite=overwrite,
        mistakes=session.mistakes,
        remark=image_remark(session.placement, session.offline, open_builder),
    )
    session.console.notebook_plan(plan, session.backend.place)
    if dry_run:
        session.console.rendered(plan.rendered, session.backend)
        return
    if session.backend.outlives or detach:
        run_and_follow(session, plan.job, plan.uploads, detach=detach)
        return
    try:
        session.console.follow(JobRun(plan.job, plan.uploads, session.backend))
    except KeyboardInterrupt:
        # Unlike a training, it has left a result, and does not go on from there.
        said = f"Stopped. The notebook as far as it came: {plan.result}"
        session.console.say(said, notebook=plan.result)
        raise typer.Exit(INTERRUPTED) from None


def _seconds(text: str | None) -> int | None:
    try:
        return int(parse_duration(text)) if text else None
    except ValueError as error:
        raise RecipeError(f"cell_timeout: {error}") from None


OPTIONS = {
    "notebook": Annotated[
        str | None,
        typer.Argument(help="A notebook, here or at gs://bucket/path.ipynb.  [required]", metavar="NOTEBOOK.ipynb"),
    ],
    "output": Annotated[
        str | None,
        typer.Option(
            "--output",
            help="Folder for the executed notebook and its pictures, here or gs://; made if need be.  [required]",
            metavar="DIR",
        ),
    ],
    "param": Annotated[
        list[str] | None,
        typer.Option(
            "--param", "-p",
            help="Set in the notebook, after its cell tagged parameters; True, False, None and numbers are those.",
            metavar="NAME=VALUE",
        ),
    ],
    "param_raw": Annotated[
        list[str] | None,
        typer.Option("--param-raw", "-r", help="The same, as text whatever it looks like.", metavar="NAME=TEXT"),
    ],
    "param_file": Annotated[
        list[str] | None,
        typer.Option("--param-file", "-f", help="YAML file of names and values, also lists.", metavar="FILE"),
    ],
    "param_yaml": Annotated[
        list[str] | None,
        typer.Option("--param-yaml", "-y", help="The same, typed: 'ranks: [4, 8]'.", metavar="YAML"),
    ],
    "backend": Annotated[
        str | None,
        typer.Option(
            help="Where to run. Not given: local, or vertex if the output is gs://.", metavar=f"[{'|'.join(BACKENDS)}]"
        ),
    ],
    "container": Annotated[
        str, typer.Option(help="Image of the job; kohya has sd-scripts too.", metavar=f"[{'|'.join(CONTAINERS)}]")
    ],
    "kernel": Annotated[
        str | None, typer.Option(help="Kernel by its name. Not given: the notebook's own, or python3.")
    ],
    "cell_timeout": Annotated[
        str | None, typer.Option("--cell-timeout", help="A cell may take so long: 90s, 2h.", metavar="DURATION")
    ],
    "overwrite": Annotated[bool, typer.Option("--overwrite", help="Replace that notebook in the output folder.")],
    "detach": Annotated[bool, typer.Option("--detach", help="Submit the job and do not wait for it.")],
    "dry_run": Annotated[bool, typer.Option("--dry-run", help="Check, show what would run, and start nothing.")],
    "json": JsonOption,
}  # fmt: skip
DEFAULTS = {"container": CONTAINERS[0], "overwrite": False, "detach": False, "dry_run": False, "json": False}
SECTIONS = {
    "Notebook": set(OPTIONS) - {"notebook"},
    "Google Cloud, for jobs on Vertex AI": set(Placement.model_fields),
    "Options": {"help"},
}


def run_command(**arguments: Any) -> None:
    run(**arguments)


run_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *own_parameters(OPTIONS, DEFAULTS),
        *(option for option in parameters_of(Placement, taken=set(OPTIONS)) if option.name not in NOT_FOR_NOTEBOOKS),
    ]
)
app.command(
    "run", cls=sectioned(SECTIONS),
    help="Run a notebook from top to bottom, in a kernel and an image of sdtune's. What its cells print is shown as it "
    "comes; the executed notebook and its pictures are in the output also when a cell fails (exit code 7). "
    "--gpu none: a machine without a GPU.",
)(run_command)  # fmt: skip
