"""What Triton starts kernels by, made as the image's build makes it, and found where there is no compiler."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

DRIVER = ROOT / "src/sdtune/training/kernels/driver.py"
LOAD = "from triton.backends.nvidia.driver import CudaUtils; print(CudaUtils().launch)"

pytestmark = [
    pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed"),
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed"),
]


def stand_in(folder: Path) -> Path:
    """A libcuda.so.1 that can be loaded; no function of it is called."""
    from sdtune.training.kernels.driver import source

    names = sorted(set(re.findall(r"\b(cu[A-Z]\w+)\(", source())))
    folder.mkdir()
    (folder / "cuda.c").write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    linked = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1"]
    subprocess.run(["gcc", "cuda.c", *linked], cwd=folder, check=True)
    return folder


def test_an_image_without_a_compiler_starts_kernels(tmp_path: Path) -> None:
    made = subprocess.run([sys.executable, DRIVER, tmp_path / "made"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert str(tmp_path / "made") in made.stdout

    def load(kept: str) -> subprocess.CompletedProcess[str]:
        cuda = stand_in(tmp_path / f"cuda-for-{kept}")
        alone = {"PATH": "", "LD_LIBRARY_PATH": str(cuda), "TRITON_CACHE_DIR": str(tmp_path / kept)}
        home = {"HOME": os.environ.get("HOME", str(tmp_path))}
        return subprocess.run([sys.executable, "-c", LOAD], env=home | alone, capture_output=True, text=True)

    assert "built-in function launch" in load("made").stdout
    assert "Failed to find C compiler" in load("nothing").stderr


def test_it_says_so_where_nothing_can_be_made(tmp_path: Path) -> None:
    broken = os.environ | {"CC": "false"}
    made = subprocess.run([sys.executable, DRIVER, tmp_path / "made"], env=broken, capture_output=True, text=True)
    assert made.returncode != 0
