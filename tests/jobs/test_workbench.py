"""What may be asked of Workbench: each mistake with what was found, what was wanted and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from sdtune import __version__
from sdtune.errors import RecipeError
from sdtune.jobs.placement import Placement
from sdtune.jobs.workbench import InstanceSpec, WorkbenchSettings, check_name

FOREIGN = "europe-docker.pkg.dev/p/r/mine:1.2"


def settings(**given: Any) -> WorkbenchSettings:
    return WorkbenchSettings.from_settings(given)


def spec(which: str, **placement: Any) -> InstanceSpec:
    made = settings(image=which)
    where = Placement(project="my-project", **placement)
    return InstanceSpec("cat", made, where, made.choose_machine(), ("us-central1-a",), "run")


def test_without_a_word_it_is_small_stops_by_itself_and_mounts_buckets() -> None:
    found = settings()
    machine = found.choose_machine()
    assert (machine.machine_type, machine.accelerator_type, machine.accelerator_count) == (
        "g2-standard-8",
        "NVIDIA_L4",
        1,
    )
    assert (found.idle_shutdown, found.fuse, found.public_ip) == (10_800, True, True)


@pytest.mark.parametrize(
    ("given", "machine"),
    [
        ({"gpu": "t4"}, ("n1-standard-8", "NVIDIA_TESLA_T4", 1)),
        ({"gpu": "NVIDIA_TESLA_T4", "gpus": "2"}, ("n1-standard-16", "NVIDIA_TESLA_T4", 2)),
        ({"machine_type": "a2-highgpu-2g"}, ("a2-highgpu-2g", "NVIDIA_TESLA_A100", 2)),
        ({"gpu": "none"}, ("e2-standard-4", None, 0)),
        ({"gpu": "None", "machine_type": "n2-standard-8"}, ("n2-standard-8", None, 0)),
        ({"gpu": "v100", "image": FOREIGN}, ("n1-standard-8", "NVIDIA_TESLA_V100", 1)),
        ({"gpu": "h200", "force_machine": True}, ("a3-ultragpu-8g", "NVIDIA_H200_141GB", 8)),
        ({"gpu": "nvidia-new-9", "machine_type": "z9-new-1", "force_machine": True}, ("z9-new-1", "NVIDIA_NEW_9", 1)),
    ],
)
def test_machines_are_those_of_the_one_table(given: dict[str, Any], machine: tuple[str, str | None, int]) -> None:
    found = settings(**given).choose_machine()
    assert (found.machine_type, found.accelerator_type, found.accelerator_count) == machine


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gpu": "h200"}, ["Workbench has no h200", "t4, l4, a100, a100-80gb, h100, h100-mega;", "sdtune train"]),
        ({"gpu": "v100"}, ["do not run on v100", "CUDA 13", "use one of t4, l4", "--image"]),
        ({"gpu": "a100", "machine_type": "n1-standard-8"}, ["n1-standard-8 with 1 x a100", "a2-highgpu-1g"]),
        ({"gpu": "t4", "gpus": 3}, ["3 x t4", "a machine can have 1 (n1-standard-8), 2"]),
        ({"gpu": "t5"}, ["found 't5'; wanted one of p4, t4"]),
        ({"gpu": "none", "machine_type": "g2-standard-8"}, ["g2-standard-8 comes with GPUs"]),
        ({"machine_type": "g2-standard-9"}, ["found 'g2-standard-9'", "--force-machine"]),
    ],
)
def test_a_machine_that_cannot_be_had_is_told_before_anything_is_sent(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as told:
        settings(**given).choose_machine()
    assert all(word in str(told.value) for word in words), told.value


@pytest.mark.parametrize(
    ("typed", "seconds"), [("30m", 1800), ("3h", 10_800), ("off", None), ("OFF", None), (False, None)]
)
def test_idle_shutdown_is_a_duration_or_off(typed: Any, seconds: int | None) -> None:
    assert settings(idle_shutdown=typed).idle_shutdown == seconds


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"idle_shutdown": "5m"}, ["found", "a duration from 10m to 24h, or off"]),
        ({"idle_shutdown": "2d"}, ["a duration from 10m to 24h, or off"]),
        ({"idle_shutdown": "soon"}, ["found 'soon', wanted a duration"]),
        ({"image": "foo"}, ["found 'foo', wanted diffusers or kohya, or an address"]),
        ({"image": f"us-docker.pkg.dev/p/r/n@sha256:{'0' * 64}"}, ["Workbench takes no digest"]),
        ({"zone": ["us-central1"]}, ["is a region; wanted a zone of it, such as us-central1-b"]),
        ({"zone": ["here"]}, ["found 'here', wanted a zone"]),
        ({"gpu": "none", "gpus": 1}, ["found 1 with --gpu none"]),
        ({"owner": "ann"}, ["found 'ann', wanted an address"]),
        ({"network": "projects/p/networks/x"}, ["wanted NAME or projects/P/global/networks/NAME"]),
        ({"subnet": "regions/r/x"}, ["wanted NAME or projects/P/regions/R/subnetworks/NAME"]),
        ({"boot_disk_gb": "50"}, ["boot_disk_gb: found '50', wanted a whole number of at least 100"]),
        ({"disk_type": "floppy"}, ["pd-balanced or pd-ssd or pd-standard"]),
        ({"colour": "red"}, ["sdtune workbench create --help"]),
    ],
)
def test_mistakes_say_what_was_wanted(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as told:
        settings(**given)
    assert all(word in str(told.value) for word in words), told.value


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError, match="these 3 settings cannot be used"):
        settings(image="foo", zone=["x"], gpus="many")


def test_zones_are_tried_in_the_order_of_the_regions() -> None:
    assert settings().zones_in(["us-central1"]) == ("us-central1-a", "us-central1-b", "us-central1-c")
    assert settings().zones_in(["us-east1", "europe-west4"])[2:4] == ("us-east1-d", "europe-west4-a")
    assert settings(zone=["us-west1-b,us-west1-a", "us-west1-b"]).zones_in(["us-east1"]) == ("us-west1-b", "us-west1-a")


def test_the_image_is_that_of_the_workbench_target_in_the_jobs_repository() -> None:
    found = spec("kohya", image="elsewhere.example/for-jobs:1", repository="mine", region=("europe-west4",))
    assert found.repository == "europe-west4-docker.pkg.dev/my-project/mine/sdtune-kohya-workbench"
    assert (found.container, found.tag) == ("kohya", __version__)


@pytest.mark.parametrize(
    ("image", "repository", "tag"),
    [
        (FOREIGN, "europe-docker.pkg.dev/p/r/mine", "1.2"),
        ("gcr.io/p/mine", "gcr.io/p/mine", "latest"),
        ("localhost:5000/mine", "localhost:5000/mine", "latest"),
        ("localhost:5000/mine:5000", "localhost:5000/mine", "5000"),
    ],
)
def test_another_image_is_taken_apart(image: str, repository: str, tag: str) -> None:
    found = spec(image)
    assert (found.container, found.repository, found.tag) == (None, repository, tag)


@pytest.mark.parametrize("name", ["Cat", "1cat", "cat-", "a_b", "", "c" * 64, "cat\n"])
def test_a_name_that_no_instance_can_have(name: str) -> None:
    with pytest.raises(RecipeError, match=r"name: found .*lower-case letters"):
        check_name(name)


def test_names_that_instances_can_have() -> None:
    assert [check_name(name) for name in ("a", "cat-2", "c" * 63)] == ["a", "cat-2", "c" * 63]
