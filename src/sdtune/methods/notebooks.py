"""Notebooks, as far as both wings must agree: which file is one, and the parameters that a run sets in it.

Parameters are papermill's: how a text on the command line becomes a value, how a value is written in Python, and which
cell that goes into. papermill 2.7 gives the same cell (``tests/training/test_notebook_parameters.py`` compares them);
it is not imported, because the launcher and the check of names need no more of it than this.
"""

from __future__ import annotations

import ast
import json
import keyword
import math
from collections.abc import Mapping
from typing import Any

from sdtune.errors import RecipeError

PARAMETERS, INJECTED = "parameters", "injected-parameters"
"""Tags of cells: the notebook's own defaults, and what a run puts after them."""
OURS = "sdtune"
"""In the metadata of an executed notebook: our version, the parameters, whether the run came to its end."""
SUFFIX = ".ipynb"
FORMAT = 4
LONGEST = 100_000
"""Characters of all parameters. Linux starts no program with an argument of 131,072 bytes."""


# --- which file is a notebook -----------------------------------------------------------------------------------------


def read_notebook(data: bytes, place: str) -> dict[str, Any]:
    """The notebook in ``data``, as JSON has it. place: as the user calls it.

    RecipeError: it is none, or one that no kernel of ours runs.
    """
    wanted = "wanted a notebook as Jupyter saves it (.ipynb)"
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise RecipeError(
            f"notebook: {place} is {_kind_of(data)}; {wanted}. A script becomes one with: jupytext --to notebook FILE"
        ) from None
    content = _object(found)
    version = content.get("nbformat")
    if isinstance(version, int) and version != FORMAT:
        raise RecipeError(
            f"notebook: {place} has the notebook format {version}, wanted {FORMAT}; convert it with: "
            f"jupyter nbconvert --to notebook --nbformat {FORMAT} FILE"
        )
    if version is None or not isinstance(content.get("cells"), list):
        raise RecipeError(f"notebook: {place} is JSON, but has no cells; {wanted}. Save it again in Jupyter.")
    for number, cell in enumerate(content["cells"], start=1):
        if not isinstance(cell, dict) or "cell_type" not in cell or not isinstance(source_of(cell), str):
            raise RecipeError(f"notebook: cell {number} of {place} is none; {wanted}. Save it again in Jupyter.")
    return content


def _kind_of(data: bytes) -> str:
    if not data.strip():
        return "empty"
    try:
        start = data[:4000].decode("utf-8", errors="strict" if len(data) <= 4000 else "ignore").strip()
    except UnicodeDecodeError:
        return "no text"
    if start.startswith(("{", "[")):
        return "JSON that breaks off or has a mistake in it"
    return f"a text that begins with {start.splitlines()[0][:60]!r}"


def source_of(cell: Mapping[str, Any]) -> Any:
    """The text of a cell, which a file may have line by line."""
    source = cell.get("source")
    return "".join(source) if isinstance(source, list) and all(isinstance(line, str) for line in source) else source


def tags_of(cell: Mapping[str, Any]) -> list[str]:
    """The tags of a cell."""
    tags = _object(cell.get("metadata")).get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def kernel_of(notebook: Mapping[str, Any]) -> tuple[str, str]:
    """The kernel that a notebook names, and the language of its cells; python where it says nothing."""
    metadata = _object(notebook.get("metadata"))
    spec, info = _object(metadata.get("kernelspec")), _object(metadata.get("language_info"))
    language = info.get("name") or spec.get("language") or "python"
    return str(spec.get("name") or ""), str(language).lower()


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def check_language(notebook: Mapping[str, Any], place: str) -> None:
    """RecipeError: its cells are no Python, so that neither our kernel nor our parameters fit."""
    kernel, language = kernel_of(notebook)
    if language not in ("python", "python3", "ipython"):
        raise RecipeError(
            f"notebook: {place} is written in {language} (its kernel is {kernel or 'not named'}); sdtune's images run "
            "Python. If that is wrong, choose the kernel in Jupyter and save it again."
        )


def is_unfinished(data: bytes | None) -> bool:
    """Whether a file is a notebook that a run of ours did not bring to its end."""
    try:
        found = json.loads(data or b"")["metadata"][OURS]["finished"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return False
    return found is False


# --- parameters -------------------------------------------------------------------------------------------------------


def typed_value(text: str) -> bool | int | float | str | None:
    """What a text on the command line means, as papermill's ``-p`` has it: True, False, None, a number, else itself."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_parameters(parameters: Mapping[Any, Any]) -> None:
    """RecipeError: a name is none in Python, or a value none that can be written there; tells every one of them."""
    wrong = [
        line for name, value in parameters.items() for line in (_wrong_name(name), _wrong_value(name, value)) if line
    ]
    if wrong:
        raise RecipeError("\n".join(wrong))
    if len(as_argument(parameters)) > LONGEST:
        raise RecipeError(
            f"param: the parameters take {len(as_argument(parameters)):,} characters, and a job can be given "
            f"{LONGEST:,}; put what is long into a file in a bucket, and give its address."
        )


def _wrong_name(name: Any) -> str:
    if isinstance(name, str) and name.isidentifier() and name.isascii() and not keyword.iskeyword(name):
        return ""
    why = "a word of Python's own" if isinstance(name, str) and keyword.iskeyword(name) else "no name of a variable"
    return (
        f"param: found the name {name!r}, which is {why}; wanted English letters, digits and _, no digit first, "
        "as in learning_rate=1e-4."
    )


def _wrong_value(name: Any, value: Any) -> str:
    if isinstance(value, dict):
        return next((wrong for part in value.values() if (wrong := _wrong_value(name, part))), "")
    if isinstance(value, list):
        return next((wrong for part in value if (wrong := _wrong_value(name, part))), "")
    if value is None or isinstance(value, str | bool | int | float):
        return ""
    return (
        f"param: {name!r} holds {type(value).__name__} {str(value)[:40]!r}; wanted text, numbers, true, false, null, "
        "lists and mappings."
    )


def as_argument(parameters: Mapping[str, Any]) -> str:
    """As JSON that reaches a container as it is: ``$(NAME)`` in arguments is replaced there."""
    return json.dumps(dict(parameters)).replace("$", "\\u0024")


def from_argument(text: str) -> dict[str, Any]:
    """The parameters of ``as_argument``. RecipeError: it is no such text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"--parameters is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RecipeError(f"--parameters: found {type(found).__name__}, wanted a JSON object of names and values.")
    check_parameters(found)
    return found


def code_of(parameters: Mapping[str, Any]) -> str:
    """The cell that sets them."""
    return "".join(["# Parameters\n", *(f"{name} = {_in_python(value)}\n" for name, value in parameters.items())])


def _in_python(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(str(key))}: {_in_python(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_in_python, value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "float('nan')" if math.isnan(value) else f"float('{'-' if value < 0 else ''}inf')"
    return str(value)


def _quoted(text: str) -> str:
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', r"\"") + '"'


def place_of_parameters(notebook: Mapping[str, Any]) -> tuple[int, bool]:
    """Where the cell that sets parameters goes, and whether it takes the place of the cell that is there.

    In place of the cell of an earlier run; else after the notebook's own; else at the top.
    """
    tags = [tags_of(cell) for cell in notebook["cells"]]
    for number, found in enumerate(tags):
        if INJECTED in found:
            return number, True
    return next((number + 1 for number, found in enumerate(tags) if PARAMETERS in found), 0), False


def has_parameters(notebook: Mapping[str, Any]) -> bool:
    """Whether a cell is meant for them."""
    return any({PARAMETERS, INJECTED} & set(tags_of(cell)) for cell in notebook["cells"])


def known_names(notebook: Mapping[str, Any]) -> list[str] | None:
    """What the notebook's parameters cell sets; None where it has none, or one that is not Python alone."""
    source = next((source_of(cell) for cell in notebook["cells"] if PARAMETERS in tags_of(cell)), None)
    try:
        lines = ast.parse(source).body if isinstance(source, str) else None
    except (SyntaxError, ValueError, RecursionError):
        return None
    if lines is None:
        return None
    targets = [target for line in lines if isinstance(line, ast.Assign) for target in line.targets]
    targets += [line.target for line in lines if isinstance(line, ast.AnnAssign)]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
