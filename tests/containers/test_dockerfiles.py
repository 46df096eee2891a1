"""What the Dockerfiles promise: pinned bases, our own files alone, hashed wheels, and who starts what."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sdtune.methods.catalog import METHODS
from tests.conftest import ROOT
from tests.containers.dockerfiles import CONTAINERS, IMAGES, Dockerfile, exec_form, read
from tests.contracts.test_imports import CONTAINER_PART

STAGES = ("workbench", "train")
PART = {f"src/sdtune/{name}" for name in CONTAINER_PART}


@pytest.fixture(params=IMAGES)
def file(request: pytest.FixtureRequest) -> Dockerfile:
    return read(request.param)


def test_every_method_has_its_image() -> None:
    assert {method.container for method in METHODS.values()} == set(IMAGES)


def test_a_linter_finds_nothing(file: Dockerfile) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    ran = subprocess.run([linter, CONTAINERS / file.image / "Dockerfile"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_bases_and_syntax_are_pinned(file: Dockerfile) -> None:
    recorded = yaml.safe_load((CONTAINERS / "base-images.yaml").read_text(encoding="utf-8"))
    own = {name: base["tag"] for name, base in recorded.items() if name in file.arguments}
    assert own.keys() == {name for name in file.arguments if name.endswith("BASE")}
    assert {name: file.arguments[name] for name in own} == own
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", file.arguments["BASE"])
    assert re.fullmatch(r".*/workbench-container:\d{8}-\d{4}-rc\d+", file.arguments["WORKBENCH_BASE"])
    for base in recorded.values():
        assert re.fullmatch(r"|sha256:[0-9a-f]{64}", base["digest"])
    froms = {stage: file.of(stage, "FROM")[0].words[0] for stage in STAGES}
    assert froms == {"workbench": "${WORKBENCH_BASE}", "train": "${BASE}"}
    if "compiler" in file.stages:
        # Of the same Python on the same system, or what is compiled there is not for it.
        assert file.of("compiler", "FROM")[0].words[0] == "${COMPILER_BASE}"
        assert file.arguments["COMPILER_BASE"].replace("-", "-slim-", 1) == file.arguments["BASE"]
    first = (CONTAINERS / file.image / "Dockerfile").read_text(encoding="utf-8").partition("\n")[0]
    assert re.fullmatch(r"# syntax=docker/dockerfile:\d+\.\d+", first)


def test_docker_build_without_a_target_makes_the_image_of_jobs(file: Dockerfile) -> None:
    assert list(file.stages)[-1] == "train"


def test_a_notebooks_image_has_all_of_sdtune_and_the_locks(file: Dockerfile) -> None:
    copied = {source: one.words[-1] for one in file.of("workbench", "COPY") for source in one.words[:-1]}
    locks = [f"containers/{file.image}/{name}.txt" for name in ("requirements", "workbench", "launcher")]
    more = [f"containers/{file.image}/sd-scripts.txt"] if file.image == "kohya" else []
    assert copied == {"src/sdtune": "/opt/sdtune/sdtune", **dict.fromkeys([*locks, *more], "/opt/sdtune/")}


@pytest.mark.parametrize("stage", ["train"])
def test_only_the_training_wing_and_the_locks_get_into_jobs(file: Dockerfile, stage: str) -> None:
    copied = {source for one in file.of(stage, "COPY") if not file.is_from_a_stage(one) for source in one.words[:-1]}
    locks = {f"containers/{file.image}/{name}.txt" for name in ("requirements", "workbench", "sd-scripts")}
    assert copied - PART <= locks
    assert copied >= PART | {f"containers/{file.image}/requirements.txt"}
    assert all((ROOT / source).exists() for source in copied)
    targets = {source: one.words[-1] for one in file.of(stage, "COPY") for source in one.words[:-1] if source in PART}
    for source, target in targets.items():
        whole = Path("/opt/sdtune/sdtune") / Path(source).name
        assert Path(target) == (whole if (ROOT / source).is_dir() else whole.parent)


@pytest.mark.parametrize("stage", STAGES)
def test_pip_takes_hashed_wheels_alone_and_they_fit(file: Dockerfile, stage: str) -> None:
    found = []
    for run in [one.value for one in file.of(stage, "RUN") if "pip install" in one.value]:
        *_, install, check = re.split(r"\s+&&\s+", run)
        words = install.split()
        assert words[words.index("-m") :][:5] == ["-m", "pip", "install", "--no-cache-dir", "--require-hashes"]
        assert set(words[6::2]) == {"--requirement"}
        assert check == f"{words[0]} -m pip check"
        found.append([Path(word).name for word in words[7::2]])
    # A notebook runs in a Workbench instance, and as a job.
    wheels = ["requirements.txt", "workbench.txt", *(["launcher.txt"] if stage == "workbench" else [])]
    assert found == [wheels, *([["sd-scripts.txt"]] if file.image == "kohya" else [])]


def test_jobs_run_as_nobody_in_particular(file: Dockerfile) -> None:
    assert [one.value for one in file.of("train", "USER")] == ["${RUN_AS}"]
    assert "RUN_AS=1000:1000" in [one.value for one in file.of("train", "ARG")]
    made = next(one.value for one in file.of("train", "RUN") if one.value.startswith("useradd"))
    assert "--uid 1000" in made


def test_jobs_start_at_the_entry_point(file: Dockerfile) -> None:
    assert [exec_form(one) for one in file.of("train", "ENTRYPOINT")] == [["python", "-m", "sdtune.training"]]
    assert not file.of("train", "CMD", "SHELL")


@pytest.mark.parametrize("stage", STAGES)
def test_the_smoke_test_is_the_last_step_and_has_no_network(file: Dockerfile, stage: str) -> None:
    smoke = file.of(stage, "RUN")[-1]
    words = smoke.words
    assert words[words.index("-m") :] == (
        ["-m", "sdtune.training.smoke", "--container", file.image, "--base-model", "/mnt/base-model"]
    )
    assert smoke.flags == ("network=none", "mount=type=bind,source=examples/base-model,target=/mnt/base-model")
    steps = file.all(stage)
    assert steps.index(smoke) > max(steps.index(one) for one in file.of(stage, "COPY"))
    # As the user that jobs run as.
    assert all(steps.index(one) < steps.index(smoke) for one in file.of(stage, "USER"))


def test_caches_are_on_the_machines_own_disk(file: Dockerfile) -> None:
    said = dict(word.partition("=")[::2] for one in file.of("train", "ENV") for word in one.words)
    for name in ("HF_HOME", "SDTUNE_CACHE", "XDG_CACHE_HOME"):
        assert said[name].startswith("/var/cache/sdtune")
    assert any(
        one.value.endswith("install --directory --mode=0777 /var/cache/sdtune") for one in file.of("train", "RUN")
    )
    assert said["PYTHONUNBUFFERED"] == "1"


def test_jobs_images_have_no_compiler_and_no_conda(file: Dockerfile) -> None:
    runs = " ".join(one.value for one in file.of("train", "RUN"))
    assert not re.search(r"apt|conda|mamba|gcc|build-essential|curl|wget", runs)


def test_what_starts_kernels_is_compiled_in_another_stage() -> None:
    file = read("diffusers")
    made = next(one for one in file.of("compiler", "RUN"))
    assert made.flags == ("network=none",)
    taken = next(one for one in file.of("train", "COPY") if file.is_from_a_stage(one))
    # Jobs add kernels to it, whoever they run as.
    assert taken.flags == ("from=compiler", "chmod=0777")
    said = dict(word.partition("=")[::2] for one in file.of("train", "ENV") for word in one.words)
    assert {made.words[-1], *taken.words} == {said["TRITON_CACHE_DIR"]}


def test_layers_go_from_what_changes_least(file: Dockerfile) -> None:
    steps = [one.value for one in file.all("train")]
    order = [next(i for i, step in enumerate(steps) if part in step) for part in ("${BASE}", "pip install", "training")]
    assert order == sorted(order)


def test_google_starts_the_notebooks_image(file: Dockerfile) -> None:
    """The older guide warned that an ENTRYPOINT breaks notebooks; here there is none to break them."""
    assert not file.of("workbench", "ENTRYPOINT", "CMD", "USER", "SHELL", "WORKDIR")
    kernel = next(one.words for one in file.of("workbench", "RUN") if "ipykernel" in one.value)
    assert kernel[kernel.index("--display-name") + 1] == f"sdtune ({file.image})"
    assert kernel[kernel.index("--env") + 1 :][:2] == ["PYTHONPATH", "/opt/sdtune"]


def test_sd_scripts_are_the_commit_that_was_tried() -> None:
    commit = (CONTAINERS / "kohya" / "SD_SCRIPTS_COMMIT").read_text(encoding="utf-8").strip()
    file = read("kohya")
    assert file.arguments["SD_SCRIPTS_COMMIT"] == commit
    for stage in STAGES:
        assert [one.words for one in file.of(stage, "ADD")] == [
            ["https://github.com/kohya-ss/sd-scripts.git#${SD_SCRIPTS_COMMIT}", "/opt/sd-scripts"]
        ]
        assert "SD_SCRIPTS_COMMIT" in [one.value for one in file.of(stage, "ARG")]
    assert not [one for stage in STAGES for one in read("diffusers").of(stage, "ADD")]
