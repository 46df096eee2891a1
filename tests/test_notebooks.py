"""The example notebooks: each is run from top to bottom, small; and what is saved in them is worth looking at."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import DATASETS, ROOT
from tests.kohya.test_base import model
from tests.servers.cloud import loopback_cloud
from tools.notebooks import FOLDER, LARGEST, NOT_OURS, execute, pictures, shown

NAMES = ("train_in_notebook", "submit_from_notebook", "kohya_lora", "hpo", "compare_loras")
QUICK = {"train_batch_size": 2, "learning_rate": 1e-3, "rank": 4, "num_samples": 1, "sample_steps": 2}
MOST_CODE = 45
"""Lines in all cells of a notebook: what is trained how is sdtune's to know."""


def run(name: str, folder: Path, **parameters: Any) -> Any:
    """The notebook run in ``folder``, so that its results stay out of the project."""
    places = {"base_model": str(ROOT / "examples" / "base-model"), "dataset": str(DATASETS / "images")}
    source = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    known = "\n".join(cell.source for cell in source.cells if "parameters" in cell.metadata.get("tags", []))
    given = {key: value for key, value in (places | parameters).items() if re.search(rf"^{key} =", known, re.M)}
    return execute(FOLDER / f"{name}.ipynb", given, folder, timeout=500)


def page_of(notebook: Any, number: int = 0) -> str:
    """What a run showed last, as HTML; the first in the notebook, or another."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pages = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    return str(pages[number])


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_short_and_its_saved_output_shows_pictures(name: str) -> None:
    file = FOLDER / f"{name}.ipynb"
    assert file.stat().st_size <= LARGEST
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(len(cell.source.splitlines()) for cell in code) <= MOST_CODE
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    for cell in code:
        ast.parse(cell.source.removeprefix("%%capture\n"))
        assert not [output for output in cell.outputs if output.output_type == "error"], cell.source
        assert not [output for output in cell.outputs if output.get("name") == "stderr"], cell.source
    assert "image/jpeg" in pictures(notebook)
    assert not NOT_OURS.search(shown(notebook))


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


def test_train_in_notebook(tmp_path: Path) -> None:
    options = {**QUICK, "max_train_steps": 4, "sample_every": 2}
    notebook = run("train_in_notebook", tmp_path, config=None, options=options)
    page = page_of(notebook)
    assert ">succeeded<" in page
    assert "out/cat/pytorch_lora_weights.safetensors" in page
    assert "data:image/svg+xml;base64," in page  # the loss curve
    assert "image/jpeg" in pictures(notebook)
    assert (tmp_path / "out" / "cat" / "recipe.yaml").is_file()


def test_submit_from_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback_cloud() as cloud:
        for name, value in cloud.environment.items():
            monkeypatch.setenv(name, value)
        cloud.storage.buckets["my-bucket"] = {}
        notebook = run("submit_from_notebook", tmp_path, config=None, options={**QUICK, "max_train_steps": 2})
        assert "my-bucket" in cloud.storage.buckets
        assert "cat/recipe.yaml" in cloud.storage.buckets["my-bucket"]
    assert ">planned<" in page_of(notebook)
    assert "machineType: g2-standard" in page_of(notebook)
    assert ">succeeded<" in page_of(notebook, 1)
    assert "succeeded" in page_of(notebook, 2)  # the list of jobs
    assert "image/jpeg" in pictures(notebook)
    assert "gs://my-bucket/cat/pytorch_lora_weights.safetensors" in shown(notebook)


def test_kohya_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stand-in of tests/kohya, which trains nothing: the notebook's own part. Its saved output is real."""
    monkeypatch.setenv("SDTUNE_SD_SCRIPTS", str(ROOT / "tests" / "kohya" / "fake"))
    monkeypatch.setenv("SDTUNE_SD_SCRIPTS_PYTHON", sys.executable)
    model(tmp_path / "base")
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        save_file({"text_model.x": torch.zeros(1)}, tmp_path / "base" / f"{part}.safetensors")
    options = {"max_train_steps": 4, "sample_every": 2, "num_samples": 1}
    notebook = run(
        "kohya_lora", tmp_path, base_model=str(tmp_path / "base"), dataset=str(DATASETS / "kohya"), options=options
    )
    assert ">succeeded<" in page_of(notebook)
    assert "image/jpeg" in pictures(notebook)
    assert "ss_output_name" in shown(notebook)


def test_hpo(tmp_path: Path) -> None:
    options = {**QUICK, "held_out_images": 2, "num_samples": 0}
    del options["learning_rate"], options["rank"]
    notebook = run("hpo", tmp_path, max_trials=2, max_train_steps=2, options=options)
    assert "2 of 2 trials have ended" in page_of(notebook)
    assert ">succeeded<" in page_of(notebook)
    assert "★" in page_of(notebook)
    assert ">succeeded<" in page_of(notebook, 1)
    assert pictures(notebook).count("image/jpeg") == 2  # the search's, and the samples of its best
    assert (tmp_path / "out" / "search" / "best" / "recipe.yaml").is_file()


def test_compare_loras(tmp_path: Path) -> None:
    # The notebook trains on the pictures beside it.
    (tmp_path / "datasets").symlink_to(DATASETS)
    (tmp_path / "notebooks").mkdir()
    notebook = run(
        "compare_loras", tmp_path / "notebooks", pictures=1, steps={"2 steps": 2},
        options={**QUICK, "num_samples": 0},
    )  # fmt: skip
    assert pictures(notebook) == ["image/jpeg"]
