"""What users see and what is sent, kept word for word; renewed by `make snapshots`, reviewed in the diff."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode
from typer.testing import CliRunner

from sdtune.cli.app import app
from sdtune.jobs.spec import plan_training
from sdtune.methods.catalog import METHODS
from tests.contracts.test_one_value import required


class TextFile(SingleFileSnapshotExtension):
    """One readable .txt file per snapshot."""

    _write_mode = WriteMode.TEXT
    file_extension = "txt"


@pytest.fixture
def snapshot(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    return snapshot.use_extension(TextFile)


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, [*words, "--help"], prog_name="sdtune")
        assert result.exit_code == 0
        return result.output

    return run


@pytest.mark.parametrize("words", ["", "train", "validate", "convert", *(f"train {name}" for name in METHODS)])
def test_help(words: str, help_of: Callable[..., str], snapshot: SnapshotAssertion) -> None:
    assert help_of(*words.split()) == snapshot


@pytest.mark.parametrize("name", METHODS)
def test_arguments_of_the_container(name: str, snapshot: SnapshotAssertion) -> None:
    method = METHODS[name]
    args = plan_training(method.from_settings(required(method)), "/gcs/bucket/cat", "/gcs/bucket/out").args
    recipe = json.loads(args[-1].removeprefix("--recipe="))
    assert "\n".join([*args[:-1], "--recipe=" + json.dumps(recipe, indent=2)]) + "\n" == snapshot


def test_every_snapshot_is_somebodys(snapshot: SnapshotAssertion) -> None:
    folder = Path(__file__).parent / "__snapshots__" / "test_snapshots"
    assert len(list(folder.iterdir())) == 4 + 2 * len(METHODS)
