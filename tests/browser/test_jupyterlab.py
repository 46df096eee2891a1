"""A notebook in a real JupyterLab and a real browser: what is saved in it is seen, it runs, and shows how it goes.

make browser installs JupyterLab and playwright into an environment of their own; Chromium is the system's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.conftest import DATASETS, ROOT

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]
LAB = Path(sys.prefix) / "lab" / "bin" / "python"
PICTURES_TO = os.environ.get("SDTUNE_SCREENSHOTS")


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """train_in_notebook as it is shipped, with its saved output, and with parameters for half a minute of training."""
    found = nbformat.read(ROOT / "examples" / "notebooks" / "train_in_notebook.ipynb", as_version=4)
    parameters = next(cell for cell in found.cells if "parameters" in cell.metadata.get("tags", []))
    options = {
        "max_train_steps": 40, "train_batch_size": 2, "learning_rate": 1e-3, "num_samples": 2, "sample_steps": 5,
        "sample_every": 20,
    }  # fmt: skip
    given = {
        "base_model": str(ROOT / "examples" / "base-model"), "dataset": str(DATASETS / "images"), "output": "out/cat",
        "instance_prompt": "a photo of sks cat", "config": None, "options": options,
    }  # fmt: skip
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    (tmp_path / "notebooks").mkdir()
    nbformat.write(found, tmp_path / "notebooks" / "train.ipynb")
    return tmp_path / "notebooks" / "train.ipynb"


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """This Python as JupyterLab's only kernel."""
    install = ["ipykernel", "install", "--prefix", str(tmp_path / "jupyter"), "--name", "python3"]
    subprocess.run([sys.executable, "-m", *install], check=True, capture_output=True)
    return tmp_path / "jupyter" / "share" / "jupyter"


def test_a_run_is_watched_in_the_browser(notebook: Path, kernels: Path, tmp_path: Path) -> None:
    if not LAB.exists() or not shutil.which("chromium"):
        pytest.skip("no JupyterLab with playwright (make browser), or no chromium on the path")
    pictures = Path(PICTURES_TO) if PICTURES_TO else tmp_path / "screenshots"
    pictures.mkdir(parents=True, exist_ok=True)
    surroundings = {
        **os.environ, "JUPYTER_PATH": str(kernels), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
    }  # fmt: skip
    ran = subprocess.run(
        [LAB, Path(__file__).with_name("drive.py"), notebook, pictures],
        capture_output=True, text=True, env=surroundings,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-5000:]
    told: dict[str, Any] = json.loads(ran.stdout)

    # What was saved is seen in a notebook that nobody has trusted yet.
    assert "succeeded" in told["opened"]["text"]
    assert told["opened"]["curves"] == 1
    assert told["opened"]["photographs"] == 1

    shares = [float(share.rstrip("%")) for share in told["shares"]]
    assert any(0 < share < 100 for share in shares), shares
    ended = told["ended"]
    assert "dreambooth-lora cat" in ended["text"]
    assert "40 steps in" in ended["text"]
    assert (ended["curves"], ended["photographs"]) == (1, 1)
    assert (notebook.parent / "out" / "cat" / "recipe.yaml").is_file()
