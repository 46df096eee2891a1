"""Every recipe, dataset and README command is real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sdtune.cli.app import app
from sdtune.commands.gathering import read_config
from sdtune.methods.catalog import METHODS, find_method
from sdtune.methods.layouts import check
from sdtune.methods.ledger import Layout
from tests.conftest import DATASETS, ROOT

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
DOCUMENTS = ("README.md", "examples/datasets/README.md")


def test_every_method_has_a_recipe() -> None:
    assert {path.stem for path in RECIPES} >= set(METHODS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_holds_settings_of_its_method(path: Path) -> None:
    method = find_method(yaml.safe_load(path.read_text())["method"])
    settings = read_config(path, method)
    required = {name: "a photo of sks cat" for name, info in method.model_fields.items() if info.is_required()}
    assert settings
    assert method.from_settings({**required, **settings})


@pytest.mark.parametrize("layout", Layout)
def test_there_is_a_dataset_of_every_layout_and_nothing_is_wrong_with_it(layout: Layout) -> None:
    ledger = check(DATASETS / layout.value, layout, resolution=128)
    assert len(ledger.examples) >= 5
    assert not ledger.findings
    assert all(row.fate != "dropped" for row in ledger.rows)
    if layout is not Layout.IMAGES:
        assert all("sks cat" in (example.caption or "") for example in ledger.examples)


def commands(document: str) -> list[str]:
    """The ``sdtune train`` and ``sdtune validate`` commands in a document's ``sh`` blocks."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = (line.strip().removeprefix("$ ") for line in lines)
    return [line.split("  #")[0] for line in found if line.startswith(("sdtune train ", "sdtune validate "))]


COMMANDS = [(document, command) for document in DOCUMENTS for command in commands(document)]


def test_the_documents_have_commands() -> None:
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_a_documented_command_runs(
    document: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    if words[0] == "train" and "--help" not in words:
        words += ["--dry-run", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output + str(result.exception)
