"""benchmarks/compile_speed.py: what it starts and what it makes of it. Speed itself is for a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from compile_speed import RUNS, command, output_of, row

from sdtune.methods.dreambooth import DreamBoothLora
from tests.conftest import BASE_MODEL


def test_runs_differ_in_compiling_alone_and_the_last_finds_what_is_kept() -> None:
    options = argparse.Namespace(steps=500, tiny=False)
    commands = {run: command(run, options, BASE_MODEL, Path("/scratch")) for run in RUNS}
    recipes = {
        run: DreamBoothLora.from_args([word for word in one.words if word.startswith("--recipe=")])
        for run, one in commands.items()
    }
    assert {run: recipe.torch_compile for run, recipe in recipes.items()} == {
        "default": False, "compiled": True, "kept": True,
    }  # fmt: skip
    assert (
        len({recipe.model_copy(update={"torch_compile": False}).model_dump_json() for recipe in recipes.values()}) == 1
    )
    assert output_of("compiled", Path()) == output_of("kept", Path()) != output_of("default", Path())
    # Else the second would have nothing to do, or find Triton's kernels where a new machine has none.
    assert len({word for one in commands.values() for word in one.words if word.startswith("--overwrite=")}) == 3
    assert len({one.environment["TRITON_CACHE_DIR"] for one in commands.values()}) == 3


def test_the_table_has_the_whole_job_beside_the_default_one() -> None:
    seen = {"seconds": 20.0, "on_disk": 18.0, "pace": 0.0126, "failed": None, "stopped": None}
    report = {
        "runs": {"default": seen, "compiled": {**seen, "seconds": 50.0}, "kept": {**seen, "failed": "exit code 5"}}
    }
    assert row(report, "compiled") == "| compiled | 18.0 | 50.0 | 2.50 | 0.0126 |"
    assert "exit code 5" in row(report, "kept")
