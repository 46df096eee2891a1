"""``sdtune validate METHOD DIR``."""

from __future__ import annotations

from typing import Annotated

import typer

from sdtune.backends.registry import open_backend
from sdtune.cli.output import open_console
from sdtune.cli.session import JsonOption
from sdtune.commands.validate import look_at
from sdtune.jobs.placement import Placement
from sdtune.methods.catalog import METHODS, find_method

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def command(
    method: Annotated[str, typer.Argument(help="The method that is to train on it.", metavar=f"[{'|'.join(METHODS)}]")],
    dataset: Annotated[str, typer.Argument(help="The folder, here or gs://bucket/path.", metavar="DIR")],
    resolution: Annotated[
        int | None,
        typer.Option(min=64, max=2048, help="Side of the training pictures; smaller pictures are pointed out."),
    ] = None,
    every_file: Annotated[bool, typer.Option("--all", help="List every file, also those in order.")] = False,
    json: JsonOption = False,
) -> None:
    """Check a dataset as `train` would, file by file. Exit code 2 if it cannot be trained on."""
    console = open_console(json)
    here = open_backend("local", Placement())
    with console.checking() as progress:
        ledger = look_at(dataset, find_method(method).layout, here, resolution=resolution, progress=progress)
    assert ledger is not None  # only without the network there is none
    console.ledger(ledger, every_file)
    ledger.raise_for_errors()
