"""Several machines train as one: who is the first, where they meet, and that they learn what one machine learns."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sdtune import events
from sdtune.errors import ProjectError, TrainingError
from sdtune.training import launch
from sdtune.training.__main__ import main
from sdtune.training.launch import CLUSTER_SPEC, Machines, find_machines, is_first
from tests.training.test_processes import command

CLUSTER = {"workerpool0": ["first:2222"], "workerpool1": ["second:2222", "third:2222"]}


def spec(pool: str, index: int, cluster: dict[str, list[str]] | None = None) -> str:
    return json.dumps({"cluster": cluster or CLUSTER, "task": {"type": pool, "index": index}, "environment": "cloud"})


@pytest.mark.parametrize(
    ("environment", "machines"),
    [
        ({}, Machines()),
        ({"CLUSTER_SPEC": spec("workerpool0", 0)}, Machines(3, 0, "first:2222")),
        ({"CLUSTER_SPEC": spec("workerpool1", 0)}, Machines(3, 1, "first:2222")),
        ({"CLUSTER_SPEC": spec("workerpool1", 1)}, Machines(3, 2, "first:2222")),
        ({"CLUSTER_SPEC": spec("workerpool0", 0, {"workerpool0": ["first:2222"]})}, Machines()),
        ({"CLUSTER_SPEC": spec("workerpool0", 0, {"workerpool0": ["first:2222"], "workerpool1": []})}, Machines()),
        ({"NNODES": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "9"}, Machines(2, 1, "a:9")),
        ({"NNODES": "1", "RANK": "0"}, Machines()),
        ({"RANK": "x"}, Machines()),
    ],
)
def test_the_machines_are_found(environment: dict[str, str], machines: Machines) -> None:
    assert find_machines(environment) == machines


@pytest.mark.parametrize(
    "environment",
    [
        {"CLUSTER_SPEC": "{"},
        {"CLUSTER_SPEC": "[]"},
        {"CLUSTER_SPEC": spec("workerpool1", 2)},
        {"CLUSTER_SPEC": spec("chief", 0)},
        {"CLUSTER_SPEC": spec("workerpool1", 0, {"workerpool0": ["first"], "workerpool1": ["second"]})},
        {"NNODES": "2", "RANK": "0"},
        {"NNODES": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"},
        {"NNODES": "two"},
    ],
)
def test_what_makes_no_sense_is_named(environment: dict[str, str]) -> None:
    with pytest.raises(ProjectError, match="wanted"):
        find_machines(environment)


def test_the_first_machine_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "RANK", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(CLUSTER_SPEC, spec("workerpool0", 0))
    assert is_first()
    monkeypatch.setenv(CLUSTER_SPEC, spec("workerpool1", 0))
    assert not is_first()


def test_kohya_trains_on_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(CLUSTER_SPEC, spec("workerpool0", 0))
    assert main(["train", "kohya-native-lora", "--dataset=/d", "--output=/o", "--recipe={}"]) == 2
    assert (
        "kohya-native-lora trains on one machine, and there are 3; use one with more GPUs." in capsys.readouterr().out
    )


@pytest.fixture
def meet_at() -> str:
    """A port of this machine that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("number", "words"), [(0, "not all of the 2 machines came to"), (1, "machine 1 of 2 could not reach the first at")]
)
def test_a_machine_that_does_not_come_is_told(
    number: int, words: str, meet_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SECONDS_TO_MEET", 1)
    with pytest.raises(TrainingError, match=f"{words} {meet_at}"):
        launch.run_in_processes(1, ["--help"], Machines(2, number, meet_at))


def test_two_machines_are_two_processes(tmp_path: Path, meet_at: str) -> None:
    cluster = {"workerpool0": [meet_at], "workerpool1": ["127.0.0.1:1"]}
    # Class pictures: each machine draws all, because it does not see the other's disk.
    more: dict[str, Any] = {
        "with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 2, "sample_steps": 2,
        "max_train_steps": 2, "train_batch_size": 1,
    }  # fmt: skip
    running = []
    # The second comes first, and waits.
    for number, pool in ((1, "workerpool1"), (0, "workerpool0")):
        words = command("dreambooth-lora", tmp_path / str(number) / "cat", 1, **more)
        environment = {**os.environ, CLUSTER_SPEC: spec(pool, 0, cluster)}
        running.append(
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
    second, first = (process.communicate(timeout=240)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0], first + second
    told = [event for line in first.splitlines() if (event := events.parse(line))]
    assert isinstance(told[-1], events.Finished)
    assert "Training 2 steps in 2 processes together" in [
        event.text for event in told if isinstance(event, events.Phase)
    ]
    assert not [line for line in second.splitlines() if events.parse(line)]
    assert {path.name for path in (tmp_path / "1" / "cat").iterdir()} == {"class_pictures"}
    assert len(list((tmp_path / "1" / "cat" / "class_pictures").rglob("*.png"))) == 2

    alone = subprocess.run(command("dreambooth-lora", tmp_path / "both" / "cat", 2, **more), capture_output=True)
    assert alone.returncode == 0
    one, two = (load_file(tmp_path / name / "cat" / "cat.safetensors") for name in ("both", "0"))
    assert one.keys() == two.keys()
    assert all(bool((one[name] == two[name]).all()) for name in one)
