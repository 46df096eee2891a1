"""``sdtune train METHOD``: one command per method, generated from the catalog."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sdtune.backends.registry import BACKENDS, open_builder
from sdtune.cli.following import run_and_follow
from sdtune.cli.options import own_parameters, parameters_of
from sdtune.cli.sections import sectioned
from sdtune.cli.session import JsonOption, open_session
from sdtune.commands.build import image_remark
from sdtune.commands.gathering import dataset_and_output, read_config, typed_settings
from sdtune.commands.train import plan_train
from sdtune.jobs.placement import Placement
from sdtune.methods.catalog import ALIASES, METHODS
from sdtune.methods.fields import CheckpointFields, CommonFields, PublishFields


class Methods(TyperGroup):
    """The methods, also by their older names, which the help does not list."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))


app = typer.Typer(cls=Methods, rich_markup_mode=None, no_args_is_help=True, add_completion=False)


@app.callback()
def group() -> None:
    """Fine-tune a model. Every method has its own settings: sdtune train METHOD --help."""


def run(
    method: type[CommonFields],
    *,
    dataset: str | None,
    output: str | None,
    backend: str | None,
    config: Path | None,
    overwrite: bool,
    detach: bool,
    dry_run: bool,
    json: bool,
    **arguments: Any,
) -> None:
    """Check, show the plan, start, follow."""
    recipe = read_config(config, method)
    dataset, output = dataset_and_output(dataset, output, recipe)
    session = open_session(arguments, recipe, backend=backend, output=output, json=json, dry_run=dry_run)
    console = session.console
    with console.checking() as progress:
        plan = plan_train(
            method, {**recipe, **typed_settings(method, arguments)}, dataset, output, session.backend,
            placement=session.placement, mistakes=session.mistakes, overwrite=overwrite, goes_on=True,
            progress=progress, show=console.ledger,
            remark=image_remark(session.placement, session.offline, open_builder),
        )  # fmt: skip
    console.plan(plan, session.backend.place)
    if dry_run:
        console.rendered(plan.rendered, session.backend)
        return
    if plan.earlier.finished:
        console.say(
            f"{plan.job.output} holds this run already, and it has finished; --overwrite trains it anew.",
            output=plan.job.output,
        )
        return
    run_and_follow(session, plan.job, plan.uploads, detach=detach)


JOB_OPTIONS = {
    "dataset": Annotated[
        str | None,
        typer.Option("--dataset", help="Folder with the training pictures, here or gs://.  [required]", metavar="DIR"),
    ],
    "output": Annotated[
        str | None,
        typer.Option(
            "--output", help="Folder for the result, here or gs://; made if it is not there.  [required]", metavar="DIR"
        ),
    ],
    "backend": Annotated[
        str | None,
        typer.Option(
            help="Where to train. Not given: local, or vertex if the output is gs://.",
            metavar=f"[{'|'.join(BACKENDS)}]",
        ),
    ],
    "config": Annotated[
        Path | None, typer.Option("--config", help="YAML recipe; what is typed wins over it.", metavar="FILE")
    ],
    "overwrite": Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever the output holds of a run.")],
    "detach": Annotated[bool, typer.Option("--detach", help="Submit the job and do not wait for it.")],
    "dry_run": Annotated[bool, typer.Option("--dry-run", help="Check, show what would run, and start nothing.")],
    "json": JsonOption,
}
DEFAULTS = {"overwrite": False, "detach": False, "dry_run": False, "json": False}


def command(method: type[CommonFields]) -> Any:
    """The command of one method: the job's options, the method's settings, then where in the cloud."""

    def train_method(**arguments: Any) -> None:
        run(method, **arguments)

    taken = {*JOB_OPTIONS, *Placement.model_fields}
    parameters = [
        *own_parameters(JOB_OPTIONS, DEFAULTS),
        *parameters_of(method, taken=taken),
        *parameters_of(Placement, taken=set(JOB_OPTIONS)),
    ]
    train_method.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return train_method


def sections(method: type[CommonFields]) -> dict[str, set[str]]:
    """The headings in the help of a method's command."""
    shown = set(PublishFields.model_fields)
    kept = set(CheckpointFields.model_fields) & set(method.model_fields)
    return {
        "Job": set(JOB_OPTIONS),
        "Training": set(method.model_fields) - shown - kept,
        "Checkpoints": kept,
        "Publishing": shown,
        "Google Cloud, for jobs on Vertex AI": set(Placement.model_fields),
        "Options": {"help"},
    }


for method in METHODS.values():
    app.command(method.name, help=method.summary, short_help=method.summary, cls=sectioned(sections(method)))(
        command(method)
    )
