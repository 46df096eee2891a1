"""Notebooks for tests: made of their cells, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat


def notebook(*cells: str | tuple[str, str], kernel: str = "python3", language: str = "python") -> nbformat.NotebookNode:
    """A notebook of code cells; a pair is a cell and its tag."""
    made = []
    for cell in cells:
        source, tag = cell if isinstance(cell, tuple) else (cell, "")
        made.append(nbformat.v4.new_code_cell(source, metadata={"tags": [tag]} if tag else {}))
    spec = {"name": kernel, "language": language, "display_name": kernel}
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": spec})


def write(path: Path, *cells: str | tuple[str, str], **more: Any) -> Path:
    """The same as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(notebook(*cells, **more)), encoding="utf-8")
    return path


def read(data: bytes | Path) -> Any:
    """A notebook that a run has left; it must be a valid one."""
    text = (data.read_bytes() if isinstance(data, Path) else data).decode()
    nbformat.validate(json.loads(text))
    return nbformat.reads(text, as_version=4)


def printed(cell: Any) -> str:
    """What a cell printed and showed as text, and the names of the errors in it."""
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text") or output.get("ename") or output.get("data", {}).get("text/plain", ""))
    return "".join(texts)
