"""``sdtune machines``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from sdtune.cli import machines_view
from sdtune.cli.json_lines import json_line
from sdtune.cli.session import JsonOption
from sdtune.jobs.machine_table import GPUS
from sdtune.jobs.machines import find_gpu

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def command(
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Only this one, with every machine type and quota.", metavar="NAME")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the GPUs of Vertex AI: their machines, and what can be trained on them."""
    # One that jobs cannot run on is an error here as it is there.
    wanted = find_gpu(gpu) if gpu else None
    shown = [wanted] if wanted else list(GPUS)
    if json:
        for one in shown:
            json_line("machine", **machines_view.as_json(one))
        return
    out = Console(highlight=False)
    if wanted:
        machines_view.show_gpu(out, wanted)
    else:
        machines_view.show_all(out, shown)
