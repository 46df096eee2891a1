"""The package's top level: it imports nothing until it is asked, and is typed as the settings are."""

from __future__ import annotations

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import api_options
import pytest

import sdtune
from sdtune.cli.app import Commands
from sdtune.jobs.placement import Placement
from sdtune.jobs.study_settings import StudySettings
from sdtune.methods.catalog import METHODS
from tests.conftest import ROOT

FUNCTIONS = (sdtune.train, sdtune.hpo, sdtune.build, sdtune.sync_nfs)


def test_importing_sdtune_imports_nothing_more() -> None:
    script = "import sys, sdtune; print(*[name for name in sys.modules if name.startswith(('sdtune', 'pydantic'))])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["sdtune"]


def test_the_functions_need_neither_a_terminal_nor_torch() -> None:
    script = (
        "import sys, sdtune; sdtune.train, sdtune.jobs.list; "
        "print(*[name for name in ('typer', 'rich', 'torch', 'IPython', 'google.api_core') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_they_are_called_as_the_commands_are() -> None:
    for function in FUNCTIONS:
        assert function.__name__.replace("_", "-") in Commands.commands_at
    assert {"list", "show", "logs", "cancel", "open"} <= set(dir(sdtune.jobs))
    assert {"train", "hpo", "build", "sync_nfs", "jobs", "api"} <= set(dir(sdtune))
    # A package of this name there is, too.
    assert sdtune.jobs.placement.Placement is Placement  # type: ignore[attr-defined]
    for name in ("no_such_thing", "__wrapped__"):
        assert not hasattr(sdtune, name)
        assert not hasattr(sdtune.jobs, name)


def test_the_stubs_name_what_is_there() -> None:
    for module, place in ((sdtune, "__init__.pyi"), (sdtune.jobs, "jobs/__init__.pyi")):
        stub = ast.parse((ROOT / "src" / "sdtune" / place).read_text(encoding="utf-8"))
        named = [name.name for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names]
        assert set(named) == {*module._OF_API, *getattr(module, "_MODULES", ())}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_they_are_typed_and_documented(function: object) -> None:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    assert all(one.annotation is not one.empty for one in parameters)
    text = inspect.getdoc(function) or ""
    for one in parameters:
        assert one.name in text, one.name


def test_the_options_are_the_fields() -> None:
    written = api_options.TARGET.read_text(encoding="utf-8")
    assert api_options.text() == written, "the settings have changed: make api-options"


def test_no_option_is_named_like_a_parameter() -> None:
    from sdtune.api.options import HpoOptions, TrainOptions

    fields = {name for method in METHODS.values() for name in method.model_fields} | set(Placement.model_fields)
    assert set(get_type_hints(TrainOptions)) == fields
    assert set(get_type_hints(HpoOptions)) == fields | set(StudySettings.model_fields)
    for function in FUNCTIONS[:2]:
        assert not set(inspect.signature(function).parameters) & (fields | set(StudySettings.model_fields))


def test_in_the_images_of_jobs_it_is_said_that_they_hold_the_trainer_alone(tmp_path: Path) -> None:
    (tmp_path / "sdtune").mkdir()
    shutil.copy(ROOT / "src" / "sdtune" / "__init__.py", tmp_path / "sdtune")
    script = "import sys; sys.path.insert(0, ''); import sdtune; sdtune.train"
    ran = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 1
    assert "ImportError: sdtune.train is not in the images of jobs, which hold the trainer alone" in ran.stderr
