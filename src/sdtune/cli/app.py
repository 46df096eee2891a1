"""The root command, and the one place that turns an error into a text and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated, ClassVar, NoReturn

import typer

from sdtune import __version__
from sdtune.cli.lazy import LazyGroup
from sdtune.errors import SdtuneError

DEBUG = "SDTUNE_DEBUG"
"""In the environment: an error that nobody foresaw ends with its traceback."""


class Commands(LazyGroup):
    """Every command of ``sdtune``: its module is imported when it is used, so that help answers at once."""

    commands_at: ClassVar = {
        "init": ("sdtune.cli.init", "Write a commented sdtune.yaml for this project."),
        "setup": ("sdtune.cli.setup", "Make what a project lacks: APIs, a repository for images, a bucket."),
        "doctor": ("sdtune.cli.doctor", "Check what jobs need, each point with the command that mends it."),
        "machines": ("sdtune.cli.machines", "The GPUs and machine types, and what can be trained on them."),
        "build": ("sdtune.cli.build", "Build the images that jobs run in: sdtune build --all."),
        "validate": ("sdtune.cli.validate", "Check a dataset as `train` would, file by file."),
        "train": ("sdtune.cli.train", "Fine-tune a model: sdtune train METHOD --dataset DIR --output DIR."),
        "hpo": ("sdtune.cli.hpo", "Search for better settings: sdtune hpo METHOD --tune learning_rate=1e-5:1e-3:log."),
        "jobs": ("sdtune.cli.jobs", "What runs in the cloud: list, show, logs, cancel, open."),
        "notebook": ("sdtune.cli.notebook", "Run a notebook as a job, with parameters: sdtune notebook run X.ipynb."),
        "workbench": ("sdtune.cli.workbench", "Notebooks on a machine with a GPU: create, list, start, stop, delete."),
        "sync-nfs": ("sdtune.cli.sync_nfs", "Copy trained models from a bucket to a Filestore share."),
        "convert": ("sdtune.cli.convert", "Turn a LoRA into another form: diffusers, kohya, PEFT."),
    }


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


def show_version(wanted: bool) -> None:
    """Say the version and end, before a command is asked for."""
    if wanted:
        typer.echo(f"sdtune {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune Stable Diffusion on Google Cloud, or on this machine."""


def main() -> None:
    """Run the command line; ends the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name that is not UTF-8, or a letter that the terminal has not, is shown by its number.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # A terminal that closes, or a supervisor, stops a run as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        app()
    except SdtuneError as error:
        _end(error)
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        what = f"unexpected {type(error).__name__}: {error}".rstrip(": ")
        _end(SdtuneError(f"{what}. This is a mistake of sdtune's own; with {DEBUG}=1 it shows where."))


def _end(error: SdtuneError) -> NoReturn:
    from sdtune.cli.output import open_console

    # Even an error that comes before any command has read its options keeps to the form that was asked for.
    open_console(json="--json" in sys.argv).error(error)
    sys.exit(error.exit_code)


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
