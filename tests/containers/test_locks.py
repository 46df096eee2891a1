"""The locks: every wheel by hash, no place but PyPI, and the versions that the tests run with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.containers.dockerfiles import CONTAINERS, IMAGES

LOCKS = [CONTAINERS / image / f"{name}.txt" for image in IMAGES for name in ("requirements", "workbench", "launcher")]
LOCKS.append(CONTAINERS / "kohya" / "sd-scripts.txt")
WING, SCRIPTS = LOCKS[0], LOCKS[-1]
PIN = re.compile(r"([a-z0-9-]+)==([^\s+]+) \\\n    --hash=sha256:([0-9a-f]{64})\n")


def pins(lock: Path) -> dict[str, str]:
    """Version by name."""
    return {name: version for name, version, _ in PIN.findall(lock.read_text(encoding="utf-8"))}


def wanted(file: Path) -> list[Requirement]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: f"{lock.parent.name}-{lock.stem}")
def test_a_lock_is_pins_with_one_hash_each_and_nothing_else(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    body = text[text.index("\n", text.rindex("\n# ") + 1) + 1 :]
    assert PIN.sub("", body) == ""
    names = [name for name, _, _ in PIN.findall(body)]
    assert names == sorted(set(names))
    assert len(names) > 10


@pytest.mark.parametrize(
    ("asked", "locked"),
    [
        (CONTAINERS / "diffusers" / "requirements.in", pins(WING)),
        (CONTAINERS / "kohya" / "sd-scripts.in", pins(WING) | pins(SCRIPTS)),
    ],
    ids=["wing", "sd-scripts"],
)
def test_a_lock_holds_what_was_asked_for(asked: Path, locked: dict[str, str]) -> None:
    for requirement in wanted(asked):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_a_kernels_lock_adds_to_the_images() -> None:
    more = pins(CONTAINERS / "diffusers" / "workbench.txt")
    assert {"ipykernel", "nbclient", "nbformat"} <= more.keys()
    assert not more.keys() & pins(WING).keys()


def test_a_notebooks_lock_has_all_that_sdtune_asks_for() -> None:
    more = pins(CONTAINERS / "diffusers" / "launcher.txt")
    below = pins(WING) | pins(CONTAINERS / "diffusers" / "workbench.txt")
    assert not more.keys() & below.keys()
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["hpo"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains((below | more)[canonicalize_name(requirement.name)]), requirement
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    tested = {canonicalize_name(name): version for name, version in tested.items()}
    assert {name: version for name, version in more.items() if tested.get(name, version) != version} == {}


def test_the_training_wing_is_the_same_in_both_images() -> None:
    for name in ("requirements.txt", "workbench.txt", "launcher.txt"):
        first, second = ((CONTAINERS / image / name).read_text(encoding="utf-8") for image in IMAGES)
        assert first == second


def test_sd_scripts_python_has_only_what_must_be_otherwise() -> None:
    below, over = pins(WING), pins(SCRIPTS)
    assert not [name for name, version in over.items() if below.get(name) == version]
    # Gigabytes, which are there once.
    assert not [name for name in over if name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))]
    assert over["transformers"] != below["transformers"]


def test_the_training_wing_has_the_versions_that_the_tests_run_with() -> None:
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    tested = {canonicalize_name(name): version for name, version in tested.items()}
    notebooks = pins(CONTAINERS / "diffusers" / "workbench.txt")
    assert notebooks == {name: tested.get(name) for name in notebooks}
    locked = pins(WING)
    assert {name: locked[name] for name in locked.keys() & tested.keys()} == {
        name: tested[name] for name in locked.keys() & tested.keys()
    }
    # Left over: torch's CUDA, which the tests have no use for, and what comes with every environment.
    cuda = [name for name in locked if name.startswith(("nvidia-", "cuda-"))]
    assert locked.keys() - tested.keys() == {*cuda, "triton", "setuptools"} - tested.keys()
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= set(cuda)


def test_the_training_wing_has_all_that_training_may_ask_for() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    asked = [Requirement(line) for extra in ("parquet", "train", "optimizers", "wandb") for line in extras[extra]]
    locked = pins(WING)
    for requirement in asked:
        if requirement.name != "sdtune":
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
