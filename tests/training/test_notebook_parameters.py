"""Parameters of notebooks: the same texts, values and cells as papermill's own."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.cli import _resolve_type
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from papermill.translators import PythonTranslator

from sdtune.errors import RecipeError
from sdtune.methods.notebooks import (
    as_argument,
    check_language,
    check_parameters,
    code_of,
    from_argument,
    is_unfinished,
    known_names,
    read_notebook,
    typed_value,
)
from sdtune.training.notebook import prepared
from tests.notebooks import notebook, write

AWKWARD = {
    "quotes": "a \"double\" and a 'single' and \\ backslash",
    "lines": "first\nsecond\r\n\ttabbed\n",
    "emoji": "🐈 é \u2028 \x00 end",
    "dollar": "$(HOME) $$ ${X}",
    "number": 12345678901234567890,
    "minus": -3,
    "small": 1e-7,
    "yes": True,
    "nothing": None,
    "empty": "",
    "ranks": [4, 8, [1.5, "x\"y"], {"a": [None, False]}],
    "mapping": {"with space": 1, "ключ": "значение"},
}  # fmt: skip
TEXTS = (
    st.text() | st.integers().map(str) | st.floats().map(str)
    | st.sampled_from(["True", "true", "None", "1_000", " 7 ", "1e3", "nan", "-inf", "0x1F", "", "١"])
)  # fmt: skip
NAMES = st.from_regex(r"p_[a-z0-9_]{0,8}", fullmatch=True)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


def without_black(monkeypatch: pytest.MonkeyPatch) -> None:
    """papermill puts its cell through black where that is installed; the code is the same."""
    monkeypatch.setitem(sys.modules, "black", None)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    return type(one) is type(other) and one == other


@given(st.dictionaries(NAMES, VALUES, max_size=5))
@settings(max_examples=200, deadline=None)
def test_the_cell_is_papermills_and_gives_the_same_values(parameters: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_black(monkeypatch)
        assert code_of(parameters) == PythonTranslator.codify(parameters)
    arrived = from_argument(as_argument(parameters))
    assert same(arrived, parameters)
    found: dict[str, Any] = {}
    exec(code_of(arrived), {}, found)
    assert same(found, parameters)


def test_awkward_values_arrive_as_they_are() -> None:
    found: dict[str, Any] = {}
    check_parameters(AWKWARD)
    argument = as_argument(AWKWARD)
    assert argument.isascii()
    assert "$" not in argument  # which Vertex AI would put something else in place of
    exec(code_of(from_argument(argument)), {}, found)
    assert found == AWKWARD


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_a_text_means_what_it_means_to_papermill(text: str) -> None:
    assert same(typed_value(text), _resolve_type(text))


LAYOUTS = {
    "after its parameters": [("a = 1", "parameters"), "print(a)"],
    "in the middle": ["import os", ("a = 1", "parameters"), "print(a)"],
    "none": ["print(1)"],
    "again": [("a = 1", "parameters"), ("# Parameters\na = 2\n", "injected-parameters"), "print(a)"],
    "of an earlier run alone": ["x = 1", ("a = 2", "injected-parameters"), "print(a)"],
    "two": [("a = 1", "parameters"), ("b = 1", "parameters"), "print(a)"],
    "empty": [],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parameters", [{"a": 5, "s": 'x"y\n🐈'}, {}], ids=["some", "none"])
def test_the_cell_goes_where_papermill_puts_it(
    layout: str, parameters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_black(monkeypatch)
    file = write(tmp_path / "x.ipynb", *LAYOUTS[layout])
    theirs = load_notebook_node(str(file))
    if parameters:  # as its execute_notebook does
        theirs = parameterize_notebook(theirs, parameters, language="python")
    ours = prepared(read_notebook(file.read_bytes(), "x.ipynb"), parameters)
    assert cells(ours) == cells(theirs)


def cells(notebook: Any) -> list[tuple[str, list[str]]]:
    return [(cell.source, list(cell.metadata.get("tags", []))) for cell in notebook.cells]


def test_a_notebook_without_a_cell_for_them_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    prepared(dict(notebook("print(1)")), {"a": 1})
    assert "no cell tagged 'parameters'" in capsys.readouterr().out
    prepared(dict(notebook("print(1)")), {})
    prepared(dict(notebook(("a = 1", "parameters"))), {"a": 2})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["élan", "ключ", "🐈", "a b", "1a", "", "class", "None", "a.b", 5])
def test_a_name_that_no_variable_can_have_is_refused(name: Any) -> None:
    with pytest.raises(RecipeError, match=r"param: found the name .*; wanted English letters") as told:
        check_parameters({name: 1, "fine": 2, "a-b": 3})
    assert repr(name) in str(told.value)
    assert "'a-b'" in str(told.value)  # all of them, at once


def test_a_value_that_no_cell_can_be_given_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'deep' holds set .*; wanted text, numbers"):
        check_parameters({"deep": [{"x": {1}}]})
    with pytest.raises(RecipeError, match=r"take 1[0-9]{2},[0-9]{3} characters, and a job can be given 100,000"):
        check_parameters({"long": "x" * 100_000})
    for text in ("{", "[1]", '{"a b": 1}'):
        with pytest.raises(RecipeError):
            from_argument(text)


def test_what_the_parameters_cell_sets_is_known() -> None:
    source = "a: int = 1\nb = c = 2  # three\n(d, e) = 1, 2\nx.y = 3\nprint(a)"
    assert known_names(notebook((source, "parameters"))) == ["b", "c", "d", "e", "x", "a"]
    assert known_names(notebook(("%matplotlib inline\na = 1", "parameters"))) is None
    assert known_names(notebook("a = 1")) is None


OLD = json.dumps({"nbformat": 3, "nbformat_minor": 0, "worksheets": [{"cells": []}], "metadata": {}}).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "x.ipynb is empty; wanted a notebook as Jupyter saves it"),
        (b"import torch\n", "a text that begins with 'import torch'; wanted a notebook"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "is no text; wanted a notebook"),
        (b'{"cells": [', "JSON that breaks off or has a mistake in it; wanted a notebook"),
        (b"[1, 2]", "is JSON, but has no cells"),
        (b'{"cells": []}', "is JSON, but has no cells"),
        (b'{"nbformat": 4, "cells": {}}', "is JSON, but has no cells"),
        (b'{"nbformat": 4, "cells": [1]}', "cell 1 of x.ipynb is none"),
        (b'{"nbformat": 4, "cells": [{"cell_type": "code"}]}', "cell 1 of x.ipynb is none"),
        (OLD, "has the notebook format 3, wanted 4; convert it with: jupyter nbconvert"),
    ],
)
def test_a_file_that_is_no_notebook(data: bytes, said: str) -> None:
    with pytest.raises(RecipeError) as told:
        read_notebook(data, "x.ipynb")
    assert said in str(told.value)


def test_a_notebook_of_another_language_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"written in r \(its kernel is ir\); sdtune's images run Python"):
        check_language(notebook("x <- 1", kernel="ir", language="R"), "x.ipynb")
    check_language({"cells": []}, "x.ipynb")


def test_notebooks_as_other_programs_write_them_can_be_read(tmp_path: Path) -> None:
    # Without ids, tags or metadata, its sources as texts or lines, a byte order mark before it.
    found = {
        "nbformat": 4, "cells": [
            {"cell_type": "code", "source": ["a = 1\n", "b = 2"], "outputs": [{"output_type": "stream"}]},
            {"cell_type": "markdown", "source": "# x", "metadata": {}},
        ],
    }  # fmt: skip
    made = prepared(read_notebook(b"\xef\xbb\xbf" + json.dumps(found).encode(), "x"), {"a": 3})
    nbformat.validate(made)
    assert [cell.source for cell in made.cells] == ["# Parameters\na = 3\n", "a = 1\nb = 2", "# x"]
    assert made.cells[1].outputs == []


def test_only_a_run_of_ours_that_broke_off_is_unfinished() -> None:
    assert is_unfinished(json.dumps({"metadata": {"sdtune": {"finished": False}}}).encode())
    for other in ({"metadata": {"sdtune": {"finished": True}}}, {"metadata": {}}, {}, []):
        assert not is_unfinished(json.dumps(other).encode())
    assert not is_unfinished(None)
    assert not is_unfinished(b"\xff")
