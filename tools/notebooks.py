"""Runs the notebooks of examples/notebooks and saves them with what they show: make notebooks

    python -m tools.notebooks                      # all
    python -m tools.notebooks train_in_notebook    # one

submit_from_notebook is run against the servers of the tests, on this machine. kohya_lora is run where
SDTUNE_SD_SCRIPTS names a copy of sd-scripts; elsewhere it is left as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "notebooks"
LARGEST = 300_000
"""Bytes of a saved notebook."""
BUCKET = "my-bucket"
NOT_OURS = re.compile(r"/(?:home|root|tmp|work|Users|usr|opt)/[\w./-]+")
"""Places of the machine that ran it."""


def main(names: list[str]) -> int:
    """Run and save; the exit code."""
    for name in names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        if name == "kohya_lora" and "SDTUNE_SD_SCRIPTS" not in os.environ:
            print(f"{name}: left as it is, SDTUNE_SD_SCRIPTS names no copy of sd-scripts (docs/kohya.md)")
            continue
        with cloud() if name == "submit_from_notebook" else nothing(), new_examples() as examples:
            notebook = execute(FOLDER / f"{name}.ipynb", folder=examples / "notebooks")
        save(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: {(FOLDER / f'{name}.ipynb').stat().st_size:,} bytes")
    return 0


def execute(
    path: Path, parameters: Mapping[str, Any] | None = None, folder: Path | None = None, timeout: int = 1800
) -> Any:
    """The notebook, run from its first cell to its last in its own folder, or in another. What a cell raises is raised.

    parameters: set after the cell tagged ``parameters``, as papermill does.
    """
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    if parameters:
        at = next(number for number, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        given = nbformat.v4.new_code_cell(lines, metadata={"tags": ["injected-parameters"]})  # type: ignore[no-untyped-call]
        notebook.cells.insert(at + 1, given)
    where = {"metadata": {"path": str(folder or path.parent)}}
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=where).execute()
    return notebook


def save(notebook: Any, path: Path) -> None:
    """Write it without times and without what tells of this machine. ValueError: too large, or it does tell."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    text = nbformat.writes(notebook)  # type: ignore[no-untyped-call]
    if len(text) > LARGEST:
        raise ValueError(f"{path.name}: {len(text):,} bytes, wanted {LARGEST:,} at most.")
    if told := NOT_OURS.search(shown(notebook)):
        raise ValueError(f"{path.name}: shows {told[0]}, a place of this machine.")
    path.write_text(text + "\n", encoding="utf-8")


def shown(notebook: Any) -> str:
    """All text of the outputs."""
    return "\n".join(texts(notebook))


def texts(notebook: Any) -> Iterator[str]:
    """The outputs that are text, each."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield from output.get("traceback", [])
            yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def pictures(notebook: Any) -> list[str]:
    """The kinds of pictures in the outputs, as MIME types."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]


@contextmanager
def cloud() -> Iterator[None]:
    """Google Cloud on this machine, with a bucket, for this process and the kernels that it starts."""
    from google.cloud.storage import Client

    from tests.servers.cloud import loopback_cloud
    from tests.servers.emulator import Emulator

    with loopback_cloud(Emulator) as found:
        before = {name: os.environ.get(name) for name in found.environment}
        os.environ.update(found.environment)
        try:
            Client(project="my-project").create_bucket(BUCKET)
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def new_examples() -> Iterator[Path]:
    """A copy of the folder around the notebooks, so that no earlier result is there, and none is left."""
    with tempfile.TemporaryDirectory() as folder:
        examples = Path(folder) / "examples"
        shutil.copytree(FOLDER.parent, examples, ignore=shutil.ignore_patterns("out", ".ipynb_checkpoints"))
        yield examples


@contextmanager
def nothing() -> Iterator[None]:
    yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
