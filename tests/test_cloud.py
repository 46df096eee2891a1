"""The main job of a user with a project, from the command to the LoRA in the bucket, on servers of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.cloud.storage import Client

from tests.conftest import BASE_MODEL
from tests.servers.cloud import Cloud, loopback_cloud
from tests.servers.emulator import Emulator

SDTUNE = str(Path(sys.executable).with_name("sdtune"))
NETWORK = "projects/123456789012/global/networks/vpc"
SHARE = ["--network", NETWORK, "--nfs", "10.0.0.2:/vol1=/mnt/nfs/models"]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cloud[Any]]:
    """Vertex AI, Cloud Logging with lines that come late and twice, and the emulator of Cloud Storage from PyPI."""
    with loopback_cloud(Emulator) as found:
        found.vertex.projects["my-project"] = "123456789012"
        found.vertex.nfs("10.0.0.2", "/vol1")
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        Client(project="my-project").create_bucket("my-bucket")
        yield found


def sdtune(*words: str, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SDTUNE, *words], capture_output=True, text=True, cwd=cwd, timeout=300, **more)


def training(dataset: str, output: str, *more: str) -> list[str]:
    return [
        "train", "dreambooth-lora", "--base-model", str(BASE_MODEL), "--dataset", dataset, "--output", output,
        "--instance-prompt", "a photo of\nsks \"cat\", $(HOME) 🐈", "--max-train-steps", "3", "--num-samples", "1",
        "--sample-steps", "2", "--rank", "4", "--gpu", "l4", *more,
    ]  # fmt: skip


def in_bucket(prefix: str) -> dict[str, Any]:
    blobs = Client(project="my-project").list_blobs("my-bucket", prefix=prefix)
    return {blob.name.removeprefix(prefix): blob for blob in blobs}


def told(ran: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_from_a_folder_here_to_a_lora_in_the_bucket_and_on_the_share(
    cloud: Cloud[Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = pictures()
    words = training(str(dataset), "gs://my-bucket/cat", *SHARE, "--save-nfs", "--json")
    ran = sdtune(*words, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = told(ran)
    kinds = [line["event"] for line in lines]
    assert not [line for line in lines if line["event"] == "note"]  # the image is there, and of this version
    assert kinds.index("plan") < kinds.index("submitted") < kinds.index("step") < kinds.index("finished")
    assert [line["state"] for line in lines if line["event"] == "state"][-1] == "succeeded"

    result = in_bucket("cat/")
    assert {"pytorch_lora_weights.safetensors", "cat.safetensors", "recipe.yaml", "README.md", ".sdtune"} <= set(result)
    assert any(name.startswith("logs/events.out.tfevents") for name in result)
    made = {line["path"] for line in lines if line["event"] == "artifact"}
    assert "gs://my-bucket/cat/pytorch_lora_weights.safetensors" in made
    # The prompt arrived as it was typed, through every layer.
    assert "$(HOME) 🐈" in result["recipe.yaml"].download_as_text()
    share = cloud.vertex.nfs("10.0.0.2", "/vol1")
    assert [path for path in share.rglob("*.safetensors") if path.is_relative_to(share / "dreambooth-lora")]

    # What was uploaded once is not uploaded again, and a finished run is not run again.
    again = sdtune(*words, cwd=tmp_path)
    assert again.returncode == 0
    assert "holds this run already, and it has finished" in again.stdout
    listed = told(sdtune("jobs", "list", "--json", cwd=tmp_path))
    assert [(line["name"], line["state"], line["gpu"], line["output"]) for line in listed] == [
        ("cat", "succeeded", "l4", "gs://my-bucket/cat"),
    ]  # fmt: skip

    shown = sdtune("jobs", "logs", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "gs://my-bucket/cat/cat.safetensors" in shown.stdout

    shutil.rmtree(share / "dreambooth-lora")
    copied = sdtune("sync-nfs", "--from", "/gcs/my-bucket/cat", *SHARE, cwd=tmp_path)
    assert copied.returncode == 0, copied.stdout + copied.stderr
    assert (share / "dreambooth-lora").is_dir()


def test_the_trainers_own_error_and_its_exit_code_come_back(
    cloud: Cloud[Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    words = training(str(pictures()), "gs://my-bucket/bad", "--learning-rate", "1", "--adam-epsilon", "1e-30")
    words[words.index("--base-model") + 1] = "gs://my-bucket/no-model"
    ran = sdtune(*words, cwd=tmp_path)
    assert ran.returncode == 5, ran.stdout + ran.stderr
    assert "gs://my-bucket/no-model: there is nothing in this folder" in ran.stderr
    assert "recipe.yaml" not in in_bucket("bad/")


def test_ctrl_c_leaves_the_job_and_says_how_to_come_back(
    cloud: Cloud[Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    words = training(str(pictures()), "gs://my-bucket/left", "--max-train-steps", "100000")
    with subprocess.Popen(
        [SDTUNE, *words], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stdout
        for line in process.stdout:
            if "Submitted" in line:
                break
        while not cloud.vertex.jobs:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 130, rest
    (job,) = cloud.vertex.jobs.values()
    assert f"sdtune jobs logs -f {job.id} --region us-central1" in rest
    assert f"sdtune jobs cancel {job.id} --region us-central1" in rest
    ran = sdtune("jobs", "cancel", job.id, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    followed = sdtune("jobs", "logs", "-f", job.id, cwd=tmp_path)
    assert followed.returncode == 4
    assert "the job was cancelled" in followed.stderr


def test_every_mistake_is_told_before_a_job_is_made(cloud: Cloud[Any], tmp_path: Path) -> None:
    ran = sdtune(
        *training("gs://my-bucket/nothing", "gs://my-bucket/x", "--gpus", "3", "--timeout", "never", "--rank", "0"),
        cwd=tmp_path,
    )
    assert ran.returncode == 2
    for words in ("timeout: found 'never'", "rank: found '0'"):
        assert words in ran.stderr
    ran = sdtune(*training("gs://my-bucket/nothing", "gs://my-bucket/x", "--gpus", "3"), cwd=tmp_path)
    assert ran.returncode == 2
    assert "gs://my-bucket/nothing: no such folder" in ran.stderr
    assert "3" in ran.stderr
    assert not cloud.vertex.jobs


def test_two_machines_train_together(cloud: Cloud[Any], pictures: Callable[..., Path], tmp_path: Path) -> None:
    cloud.build.registry.images.clear()
    words = training(str(pictures()), "gs://my-bucket/two", "--replicas", "2", "--train-batch-size", "1")
    ran = sdtune(*words, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 machines, each g2-standard-8 with 1 x" in ran.stdout
    assert "sdtune-diffusers:" in ran.stdout
    assert "is not there; build it, or the job cannot start: sdtune build diffusers" in ran.stdout
    (job,) = cloud.vertex.jobs.values()
    assert len(job.message.job_spec.worker_pool_specs) == 2
    assert "recipe.yaml" in in_bucket("two/")
