"""The steps in Python of both Dockerfiles, in a new environment: the lock by pip's resolver, pip check, the smoke test.

The build of torch for the CPU that all tests run with stands in for the locked one and its CUDA.
kohya's torchvision runs beside the locked torch alone, so that image is tried with 3 GB of wheels, where
SDTUNE_SD_SCRIPTS names a copy of kohya-ss/sd-scripts; SDTUNE_CUDA_WHEELS=1 does the same to the other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.containers.dockerfiles import CONTAINERS, kept, read, run_in_python
from tests.containers.test_locks import PIN
from tests.servers.build import BucketServer, BuildServer, Script

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]
CUDA = re.compile(r"torch|triton|(nvidia|cuda)-.*")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the images have Python 3.11, and this is another")
    venv.create(tmp_path / "python", with_pip=True)
    return tmp_path / "python" / "bin" / "python"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[BuildServer]:
    """Cloud Build and its neighbours, and a project that is set up."""
    with BucketServer() as storage, BuildServer(storage) as found:
        storage.buckets["my-project-sdtune"] = {}
        found.registry.repository("my-project", "us-central1", "sdtune")
        surroundings = {"CLOUDSDK_CORE_PROJECT": "my-project", "CLOUDSDK_CONFIG": str(tmp_path), "NO_GCE_CHECK": "true"}
        for name, value in (found.environment | surroundings).items():
            monkeypatch.setenv(name, value)
        yield found


def test_a_build_of_diffusers_does_what_can_be_done_without_docker(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: BuildServer
) -> None:
    if not os.environ.get("SDTUNE_CUDA_WHEELS"):
        lock = CONTAINERS / "diffusers" / "requirements.txt"
        torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
        assert torch
        subprocess.run([python, "-m", "pip", "install", "--quiet", torch[0]], check=True)
        rest = tmp_path / "requirements.txt"
        rest.write_text(PIN.sub(lambda pin: "" if CUDA.fullmatch(pin[1]) else pin[0], lock.read_text()))
        monkeypatch.setattr("tests.containers.dockerfiles.STAND_INS", {"containers/diffusers/requirements.txt": rest})
    root, printed = tmp_path / "root", []

    def build(source: Path) -> list[str]:
        printed.append(run_in_python(read("diffusers", source), "train", root, python, {}, source))
        return printed[-1].splitlines()

    def smoke_test(source: Path) -> list[str]:
        words = ["-m", "sdtune.training.smoke", "--container=diffusers", f"--base-model={source}/examples/base-model"]
        environment = kept() | {"PATH": os.environ["PATH"], "PYTHONPATH": f"{root}/opt/sdtune", "HOME": str(tmp_path)}
        ran = subprocess.run([python, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout.splitlines()

    server.script("build", Script(work=build))
    server.script("smoke-test", Script(work=smoke_test))
    ran = subprocess.run(
        [Path(sys.executable).with_name("sdtune"), "build", "diffusers"], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "No broken requirements found." in printed[0]
    passed = r"(\d+) of \1 in "
    assert re.search(rf"^{passed}", printed[0], re.M)
    assert len(re.findall(passed, ran.stdout)) == 2  # once as a step of the Dockerfile, once as a step of the build
    assert "sha256:" in ran.stdout


@pytest.mark.skipif("SDTUNE_SD_SCRIPTS" not in os.environ, reason="SDTUNE_SD_SCRIPTS names no copy of sd-scripts")
def test_kohya(python: Path, tmp_path: Path) -> None:
    given = {"SDTUNE_SD_SCRIPTS": os.environ["SDTUNE_SD_SCRIPTS"]}
    printed = run_in_python(read("kohya"), "train", tmp_path / "root", python, given)
    assert "No broken requirements found." in printed
    assert re.search(r"^(\d+) of \1 in ", printed, re.M)
