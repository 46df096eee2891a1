"""The task ``notebook``: run a notebook from top to bottom, and leave it with its outputs and pictures in the output.

    python -m sdtune.training notebook --notebook=gs://bucket/train.ipynb --output=gs://bucket/results
        [--parameters={"steps": 100}] [--kernel=NAME] [--cell-timeout=SECONDS]

What Vertex AI's NotebookExecutionJob cannot: it has no container image and no parameters. nbclient runs the cells, as
in papermill. What that has over nbclient is parameters, for which ``methods/notebooks.py`` suffices, and files in
buckets, which here go the way of a training's result; it hears no signal, and leaves pictures in the notebook.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sdtune import __version__, events
from sdtune.errors import ProjectError, PublishError, RecipeError, SdtuneError, TrainingError
from sdtune.methods.notebooks import (
    INJECTED,
    OURS,
    check_language,
    code_of,
    from_argument,
    has_parameters,
    kernel_of,
    place_of_parameters,
    read_notebook,
)
from sdtune.training import interrupts
from sdtune.training.components.store import Asked, Folder, in_store
from sdtune.training.destinations import RunFolder, find_output, folder_of_run
from sdtune.training.outbox import Outbox
from sdtune.training.secrets import read_secrets

NEEDED = "running a notebook needs nbclient and ipykernel; install them with: pip install 'sdtune[notebook]'"


def add_arguments(tasks: Any) -> None:
    """The task's own arguments."""
    job = tasks.add_parser("notebook", allow_abbrev=False)
    job.add_argument("--notebook", required=True, help="a file, or gs://bucket/path.ipynb")
    job.add_argument("--output", help="a folder, or gs://bucket/path; not given: AIP_MODEL_DIR, as Vertex AI sets it")
    job.add_argument("--parameters", default="{}", help="JSON: names and values that are set in the notebook")
    job.add_argument("--kernel", help="not given: the notebook's own, or python3")
    job.add_argument("--cell-timeout", type=int, help="seconds for each cell")


def run_notebook(job: argparse.Namespace, unknown: list[str]) -> int:
    """Run it; the exit code. Whatever ends the run, the notebook as far as it came is in the output before."""
    if unknown:
        raise RecipeError(
            f"argument {unknown[0]!r}: notebook has --notebook, --output, --parameters, --kernel and --cell-timeout."
        )
    started = time.monotonic()
    interrupts.listen()
    try:
        # Imported for this task alone: an image's other jobs, and training here, have no use for them.
        from sdtune.training import notebook_cells, notebook_output
    except ImportError as error:
        raise ProjectError(f"{NEEDED} ({error})") from None
    parameters = from_argument(job.parameters)
    output = find_output(job.output)
    name, data = fetch(job.notebook)
    found = read_notebook(data, job.notebook)
    check_language(found, job.notebook)
    notebook = prepared(found, parameters)
    kernel = find_kernel(found, job.kernel)
    read_secrets()
    # As in Jupyter, so that what lies beside a notebook is found; a job has nothing but the notebook.
    folder = Path.cwd() if in_store(job.notebook) else Path(job.notebook).resolve().parent
    address = in_store(output)
    with folder_of_run(output) as run, ExitStack() as opened:
        _make(run.path)
        outbox = opened.enter_context(Outbox(run.path, address, drawn=())) if address else None
        saver = notebook_output.Saver(notebook, name, run.path, address or str(Path(output)), outbox)
        cells = notebook_cells.Cells(notebook, kernel=kernel, folder=folder, limit=job.cell_timeout, save=saver.save)
        saver.remove_earlier()
        count = sum(1 for _ in notebook_cells.numbered(notebook))
        events.emit(events.Phase("cells", f"Running {name}, {count} cell{'s' * (count != 1)}, with {kernel}"))
        stop = notebook_cells.Stop()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        try:
            ran = cells.run(stop)
        except SdtuneError as error:
            interrupts.listen()
            _publish_all_the_same(saver, run, error)
            raise type(error)(f"{error}\nThe notebook as far as it came: {saver.place}") from None
        finally:
            interrupts.listen()
            if stop.signal:
                # Said again to those who end a process by it.
                signal.raise_signal(stop.signal)
        notebook.metadata[OURS]["finished"] = True
        saver.finish()
    events.emit(events.Executed(seconds=round(time.monotonic() - started, 1), cells=ran))
    return 0


def _publish_all_the_same(saver: Any, run: RunFolder, error: SdtuneError) -> None:
    """The notebook of a run that failed tells why; that it could not be uploaded is not what is to be told first."""
    try:
        saver.finish()
    except PublishError as failed:
        run.kept = True
        events.emit(events.Note(str(failed), "warning"))


def fetch(place: str) -> tuple[str, bytes]:
    """The name of a notebook's file and what is in it. RecipeError: it is not there."""
    address = in_store(place)
    if address is None:
        try:
            return Path(place).name, Path(place).read_bytes()
        except OSError as error:
            raise RecipeError(f"notebook: {place} cannot be read ({error.strerror or error}).") from None
    folder, _, name = address.rpartition("/")
    data = Folder(folder, Asked("notebook", RecipeError)).read(name)
    if data is None:
        raise RecipeError(f"notebook: {address} is not there; check the path.")
    return name, data


def prepared(found: dict[str, Any], parameters: Mapping[str, Any]) -> Any:
    """The notebook to run: without outputs of earlier, with a cell that sets the parameters. As nbformat has it."""
    import nbformat

    parts = {"metadata": {}, "nbformat_minor": 0, **found}
    for cell in parts["cells"]:
        cell.setdefault("metadata", {})
        cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    try:
        notebook = nbformat.v4.upgrade(nbformat.from_dict(parts))
    except (nbformat.ValidationError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(f"notebook: it cannot be read ({error}); open it in Jupyter and save it again.") from None
    if parameters:
        if not has_parameters(notebook):
            events.emit(
                events.Note(
                    "the notebook has no cell tagged 'parameters'; the parameters are set at its top, and what it sets "
                    "below wins over them.",
                    "warning",
                )
            )
        cell = nbformat.v4.new_code_cell(source=code_of(parameters), metadata={"tags": [INJECTED]})
        place, replaces = place_of_parameters(notebook)
        notebook.cells[place : place + replaces] = [cell]
    notebook.metadata[OURS] = {"version": __version__, "parameters": dict(parameters), "finished": False}
    return notebook


def find_kernel(notebook: Mapping[str, Any], wanted: str | None) -> str:
    """The kernel to run it with: as asked for, as the notebook has it, or the one of this Python.

    RecipeError: what was asked for is not here.
    """
    from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager

    here = KernelSpecManager().find_kernel_specs()
    own, _ = kernel_of(notebook)
    if wanted:
        if wanted not in here:
            raise RecipeError(f"kernel: found {wanted!r}, wanted one that is here: {', '.join(sorted(here))}.")
        return wanted
    if own in here:
        return own
    if own and own != NATIVE_KERNEL_NAME:
        # Environments have names of their own on every machine.
        events.emit(events.Note(f"the notebook's kernel {own!r} is not here; {NATIVE_KERNEL_NAME} runs it."))
    return str(NATIVE_KERNEL_NAME)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"output: {folder} cannot be written ({error.strerror or error}); choose another --output."
        ) from None
