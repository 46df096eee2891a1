"""The steps in Python of both Dockerfiles, in a new environment: the lock by pip's resolver, pip check, the smoke test.

torch's build for the CPU stands in for the locked one and its CUDA, where pip knows such a build of the same version.
kohya's torchvision runs beside the locked torch alone, so that image is tried with 3 GB of wheels, where
SDTUNE_SD_SCRIPTS names a copy of kohya-ss/sd-scripts; SDTUNE_CUDA_WHEELS=1 does the same to the other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.containers.dockerfiles import CONTAINERS, read, run_in_python
from tests.containers.test_locks import PIN, pins

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]
CUDA = re.compile(r"torch|triton|(nvidia|cuda)-.*")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the images have Python 3.11, and this is another")
    venv.create(tmp_path / "python", with_pip=True)
    return tmp_path / "python" / "bin" / "python"


def test_diffusers(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("SDTUNE_CUDA_WHEELS"):
        lock = CONTAINERS / "diffusers" / "requirements.txt"
        torch = f"torch=={pins(lock)['torch']}"
        subprocess.run([python, "-m", "pip", "install", "--quiet", torch], check=True)
        rest = tmp_path / "requirements.txt"
        rest.write_text(PIN.sub(lambda pin: "" if CUDA.fullmatch(pin[1]) else pin[0], lock.read_text()))
        monkeypatch.setattr("tests.containers.dockerfiles.STAND_INS", {"containers/diffusers/requirements.txt": rest})
    printed = run_in_python(read("diffusers"), "train", tmp_path / "root", python, {})
    assert "No broken requirements found." in printed
    assert re.search(r"^(\d+) of \1 in ", printed, re.M)


@pytest.mark.skipif("SDTUNE_SD_SCRIPTS" not in os.environ, reason="SDTUNE_SD_SCRIPTS names no copy of sd-scripts")
def test_kohya(python: Path, tmp_path: Path) -> None:
    given = {"SDTUNE_SD_SCRIPTS": os.environ["SDTUNE_SD_SCRIPTS"]}
    printed = run_in_python(read("kohya"), "train", tmp_path / "root", python, given)
    assert "No broken requirements found." in printed
    assert re.search(r"^(\d+) of \1 in ", printed, re.M)
