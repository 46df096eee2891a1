"""The steps in Python of both Dockerfiles, in a new environment: the lock by pip's resolver, pip check, the smoke test.

The build of torch for the CPU that all tests run with stands in for the locked one and its CUDA.
kohya's torchvision runs beside the locked torch alone, so that image is tried with 3 GB of wheels, where
SDTUNE_SD_SCRIPTS names a copy of kohya-ss/sd-scripts; SDTUNE_CUDA_WHEELS=1 does the same to the other.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.containers.dockerfiles import CONTAINERS, copy, kept, read, run_in_python, there
from tests.containers.test_locks import PIN
from tests.servers.build import BucketServer, BuildServer, Script

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]
CUDA = re.compile(r"torch|(nvidia|cuda)-.*")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return new_python(tmp_path)


def new_python(folder: Path) -> Path:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the images have Python 3.11, and this is another")
    venv.create(folder / "python", with_pip=True)
    programs = folder / "python" / "bin"
    # The images do not have this program, and Python tells another platform where it is.
    (programs / "file").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (programs / "file").chmod(0o755)
    return programs / "python"


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment, with the torch of the tests unless the locked one is to be tried."""
    python = new_python(tmp_path_factory.mktemp("diffusers"))
    if not os.environ.get("SDTUNE_CUDA_WHEELS"):
        torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
        assert torch
        subprocess.run([python, "-m", "pip", "install", "--quiet", torch[0]], check=True)
    return python


@pytest.fixture
def diffusers(with_torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, and a lock that does not ask for CUDA."""
    if not os.environ.get("SDTUNE_CUDA_WHEELS"):
        lock, rest = CONTAINERS / "diffusers" / "requirements.txt", tmp_path / "requirements.txt"
        rest.write_text(PIN.sub(lambda pin: "" if CUDA.fullmatch(pin[1]) else pin[0], lock.read_text()))
        monkeypatch.setattr("tests.containers.dockerfiles.STAND_INS", {"containers/diffusers/requirements.txt": rest})
    return with_torch


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
    diffusers: Path, tmp_path: Path, server: BuildServer
) -> None:
    python, root, printed = diffusers, tmp_path / "root", []

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


CELL = """
import google.cloud.aiplatform_v1, google.cloud.devtools.cloudbuild_v1, altair, optuna
import sdtune

run = sdtune.train("dreambooth-lora", instance_prompt="a photo of sks cat", max_train_steps=2, num_samples=1,
                   sample_steps=2, rank=4, **{places!r})
sdtune.__file__, run.state, run.lora_path
"""


def test_a_cell_trains_in_the_kernel_of_the_notebooks_image(diffusers: Path, tmp_path: Path) -> None:
    """The steps of the target workbench, but for Google's container; then its kernel, as JupyterLab starts it."""
    prefix, root = diffusers.parents[1], tmp_path / "root"
    in_image = "/opt/micromamba/envs/sdtune-diffusers"
    for one in read("diffusers").stages["workbench"]:
        if one.name == "COPY":
            copy(one.words[:-1], Path(there(one.words[-1], root)), ROOT)
        elif one.name == "RUN" and not one.value.startswith("micromamba") and not one.flags:
            command = there(one.value.replace(in_image, "ENVIRONMENT"), root).replace("ENVIRONMENT", str(prefix))
            ran = subprocess.run(["bash", "-ec", command], env=kept() | {"PATH": os.environ["PATH"]}, text=True)
            assert ran.returncode == 0, command
    places = {
        "base_model": str(ROOT / "examples" / "base-model"),
        "dataset": str(ROOT / "examples" / "datasets" / "images"),
        "output": str(tmp_path / "out"),
    }
    found = KernelSpecManager(kernel_dirs=[str(prefix / "share" / "jupyter" / "kernels")], ensure_native_kernel=False)
    assert list(found.find_kernel_specs()) == ["sdtune-diffusers"]
    kernel = KernelManager(kernel_name="sdtune-diffusers", kernel_spec_manager=found)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.format(places=places))])
    client = NotebookClient(notebook, km=kernel, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    *shown, last = notebook.cells[0].outputs
    assert any(">succeeded<" in output.get("data", {}).get("text/html", "") for output in shown)
    assert any("image/jpeg" in output.get("data", {}) for output in shown)
    file, state, lora = ast.literal_eval(last["data"]["text/plain"])
    assert (file, state) == (str(root / "opt" / "sdtune" / "sdtune" / "__init__.py"), "succeeded")
    assert Path(lora).is_file()


@pytest.mark.skipif("SDTUNE_SD_SCRIPTS" not in os.environ, reason="SDTUNE_SD_SCRIPTS names no copy of sd-scripts")
def test_kohya(python: Path, tmp_path: Path) -> None:
    given = {"SDTUNE_SD_SCRIPTS": os.environ["SDTUNE_SD_SCRIPTS"]}
    printed = run_in_python(read("kohya"), "train", tmp_path / "root", python, given)
    assert "No broken requirements found." in printed
    assert re.search(r"^(\d+) of \1 in ", printed, re.M)
