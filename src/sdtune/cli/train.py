"""``sdtune train METHOD``: one command per method, generated from the catalog."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sdtune.backends.registry import BACKENDS, open_backend
from sdtune.cli.options import method_parameters, read_config, typed_settings
from sdtune.cli.output import open_console
from sdtune.commands.train import plan_train, train
from sdtune.errors import INTERRUPTED
from sdtune.methods.catalog import ALIASES, METHODS
from sdtune.methods.fields import CommonFields


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
    backend: str,
    config: Path | None,
    overwrite: bool,
    dry_run: bool,
    json: bool,
    **settings: Any,
) -> None:
    """Check, show the plan, start, follow."""
    console = open_console(json)
    place = open_backend(backend)
    wanted = {**read_config(config, method), **typed_settings(method, settings)}
    with console.checking() as progress:
        plan = plan_train(
            method, wanted, dataset, output, place, overwrite=overwrite, progress=progress, show=console.ledger
        )
    console.plan(plan, place.place)
    if dry_run:
        console.rendered(plan.rendered)
        return
    try:
        console.follow(train(plan, place))
    except KeyboardInterrupt:
        console.stopped()
        raise typer.Exit(INTERRUPTED) from None


JOB_OPTIONS = {
    "dataset": Annotated[
        str | None, typer.Option("--dataset", help="Folder with the training pictures.  [required]", metavar="DIR")
    ],
    "output": Annotated[
        str | None,
        typer.Option("--output", help="Folder for the result; made if it is not there.  [required]", metavar="DIR"),
    ],
    "backend": Annotated[str, typer.Option(help="Where to train.", metavar=f"[{'|'.join(BACKENDS)}]")],
    "config": Annotated[
        Path | None, typer.Option("--config", help="YAML recipe; what is typed wins over it.", metavar="FILE")
    ],
    "overwrite": Annotated[bool, typer.Option("--overwrite", help="Replace a finished run in the output folder.")],
    "dry_run": Annotated[bool, typer.Option("--dry-run", help="Check, show what would run, and start nothing.")],
    "json": Annotated[bool, typer.Option("--json", help="JSON lines instead of text.")],
}
DEFAULTS = {"backend": "local", "overwrite": False, "dry_run": False, "json": False}


def command(method: type[CommonFields]) -> Any:
    """The command of one method: the job's options, then the method's settings."""

    def train_method(**arguments: Any) -> None:
        run(method, **arguments)

    job_parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=option,
            default=DEFAULTS.get(name),
        )
        for name, option in JOB_OPTIONS.items()
    ]
    parameters = [*job_parameters, *method_parameters(method, taken=set(JOB_OPTIONS))]
    train_method.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return train_method


for method in METHODS.values():
    app.command(method.name, help=method.summary, short_help=method.summary)(command(method))
