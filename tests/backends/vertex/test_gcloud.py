"""The same job given to the real gcloud and to sdtune: what the server received, field by field.

The jobs are those of the quick-start guide that sdtune supersedes (GoogleCloudPlatform/stable-diffusion-on-gcp,
Stable-Diffusion-Vertex: its YAML files and commands, translated).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.cloud.aiplatform_v1 import types

from tests.conftest import Command
from tests.servers.cloud import Cloud, loopback_cloud

pytestmark = pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")

IMAGE = "us-central1-docker.pkg.dev/my-project/sd/sd-training:diffusers"
NETWORK = "projects/123456789012/global/networks/vpc"
NFS = {"server": "10.0.0.2", "path": "/vol1", "mountPoint": "/mnt/nfs/model_repo"}


def machine(kind: str, gpu: str | None = None, count: int = 0) -> dict[str, Any]:
    spec: dict[str, Any] = {"machineType": kind}
    return spec | ({"acceleratorType": gpu, "acceleratorCount": count} if gpu else {})


def guide(machine_spec: dict[str, Any], nfs: bool = False) -> dict[str, Any]:
    """A configuration as the guide has it: one pool as a mapping, which gcloud wraps into a list."""
    pool = {"machineSpec": machine_spec, "replicaCount": 1, "containerSpec": {"imageUri": IMAGE}}
    return {
        **({"network": NETWORK} if nfs else {}),
        "workerPoolSpecs": {**pool, **({"nfsMounts": [NFS]} if nfs else {})},
    }


NFS_WORDS = ["--network", NETWORK, "--nfs", "10.0.0.2:/vol1=/mnt/nfs/model_repo"]
V100 = machine("n1-standard-8", "NVIDIA_TESLA_V100", 1)
CASES = {
    "vertex-config.yaml of Diffusers": (
        guide(V100),
        "--method=diffuser_dreambooth,--input_storage=/gcs/sd-bucket/dog_image,--output_storage=/gcs/sd-bucket/db_output",
        ["train", "diffuser_dreambooth", "--instance-prompt", "a photo of sks dog",
         "--dataset", "/gcs/sd-bucket/dog_image", "--output", "/gcs/sd-bucket/db_output",
         "--machine-type", "n1-standard-8", "--gpu", "NVIDIA_TESLA_V100", "--gpus", "1"],
    ),
    "vertex-config-nfs.yaml of Diffusers": (
        guide(V100, nfs=True),
        "--method=diffuser_text_to_image,--input_storage=/gcs/sd-bucket/t2i,--output_storage=/gcs/sd-bucket/t2i_output",
        ["train", "diffuser_text_to_image", "--dataset", "gs://sd-bucket/t2i", "--output", "gs://sd-bucket/t2i_output",
         "--machine-type", "n1-standard-8", "--gpu", "v100", *NFS_WORDS],
    ),
    "vertex-config.yaml of Kohya-lora": (
        guide(machine("n1-standard-8", "NVIDIA_TESLA_T4", 2)),
        "--method=kohya_lora,--input_storage=/gcs/sd-bucket/kohya,--output_storage=/gcs/sd-bucket/kohya_output",
        ["train", "kohya_lora", "--dataset", "/gcs/sd-bucket/kohya", "--output", "/gcs/sd-bucket/kohya_output",
         "--machine-type", "n1-standard-8", "--gpu", "t4", "--gpus", "2"],
    ),
    "save_nfs_only": (
        guide(machine("e2-standard-4"), nfs=True),
        "--output_storage=/gcs/sd-bucket/models,--save_nfs_only=True",
        ["sync-nfs", "--from", "/gcs/sd-bucket/models", "--method", "kohya_lora", *NFS_WORDS],
    ),
}  # fmt: skip

OURS = {"labels", "scheduling", "baseOutputDirectory"}
"""What sdtune sends beside: how to find its jobs again, a limit of time, and where the result goes."""
OF_CONTAINER = {"command", "args", "env"}
"""The guide's own program has other arguments; sdtune's command and settings are compared by other tests."""


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud[Any]]:
    # Jobs that wait are not run.
    with loopback_cloud(delays={"JOB_STATE_QUEUED": 60.0}) as found:
        found.vertex.projects["my-project"] = "123456789012"
        for name in ("dog_image/1.png", "t2i/1.png", "kohya/10_x/1.png", "models/a.safetensors"):
            found.storage.put("sd-bucket", name, b"")
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def gcloud(cloud: Cloud[Any], *words: str) -> subprocess.CompletedProcess[str]:
    # The machine's own certificates and proxies are not for servers on the loopback.
    ran = subprocess.run(
        ["gcloud", *words], env={**os.environ, **cloud.environment}, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran


def received(cloud: Cloud[Any]) -> dict[str, Any]:
    """The last job that the server was sent, in the published types: enums as names, numbers as numbers."""
    made = [request for request in cloud.vertex.requests if request.method == "POST" and "cancel" not in request.path]
    job = types.CustomJob.from_json(json.dumps(made[-1].body))
    found: dict[str, Any] = types.CustomJob.to_dict(
        job,
        use_integers_for_enums=False,
        preserving_proto_field_name=False,
        always_print_fields_with_no_presence=False,
    )
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_guides_jobs_are_sent_as_gcloud_sends_them(
    case: str, cloud: Cloud[Any], sdtune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, args, words = CASES[case]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    gcloud(
        cloud, "ai", "custom-jobs", "create", "--region=us-central1", "--display-name=dog_lora",
        f"--config={tmp_path / 'config.yaml'}", f"--args={args}", "--command=python3,train.py",
    )  # fmt: skip
    theirs = received(cloud)

    # The datasets of this test are no pictures: what is compared is the job.
    monkeypatch.setattr("sdtune.backends.places.Places.dataset", lambda self, path: None)
    assert sdtune(*words, "--image", IMAGE, "--detach")[0] == 0
    ours = received(cloud)

    for name in OURS:
        (ours["jobSpec"] if name in ours["jobSpec"] else ours).pop(name, None)
    assert ours.keys() == theirs.keys() == {"displayName", "jobSpec"}
    assert ours["jobSpec"].keys() == theirs["jobSpec"].keys()
    (pool,), (their_pool,) = ours["jobSpec"].pop("workerPoolSpecs"), theirs["jobSpec"].pop("workerPoolSpecs")
    assert ours["jobSpec"] == theirs["jobSpec"]  # the network
    assert pool.pop("diskSpec") == {"bootDiskSizeGb": 100}  # the service's own default, made visible
    for mount in their_pool.get("nfsMounts", []):
        # The service mounts below /mnt/nfs whatever is said, so the bare name says the same.
        mount["mountPoint"] = mount["mountPoint"].removeprefix("/mnt/nfs/")
    for container in (pool["containerSpec"], their_pool["containerSpec"]):
        for name in OF_CONTAINER:
            container.pop(name, None)
    assert pool == their_pool


def test_what_a_dry_run_prints_is_accepted_by_gcloud_and_arrives_unchanged(
    cloud: Cloud[Any], sdtune: Command, tmp_path: Path
) -> None:
    words = [
        "train", "dreambooth-lora", "--instance-prompt", 'a "photo", of $(HOME) sks: cat\n#1 🐈', "--dataset",
        "gs://sd-bucket/dog_image", "--output", "gs://sd-bucket/cat", "--gpu", "a100", "--gpus", "2", "--replicas", "2",
        "--strategy", "flex-start", "--max-wait", "1h", *NFS_WORDS, "--save-nfs", "--env", "A=x,y",
        "--boot-disk-gb", "200",
    ]  # fmt: skip
    before = len(cloud.vertex.requests) + len(cloud.storage.requests)
    code, out, err = sdtune(*words, "--dry-run", "--json")
    assert code == 0, err
    assert len(cloud.vertex.requests) + len(cloud.storage.requests) == before
    told = [json.loads(line) for line in out.splitlines()]
    rendered = next(line for line in told if line["event"] == "dry_run")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(rendered["jobSpec"], allow_unicode=True))
    gcloud(
        cloud, "ai", "custom-jobs", "create", "--region=us-central1", "--display-name=cat",
        f"--config={tmp_path / 'job.yaml'}",
    )  # fmt: skip
    del rendered["event"], rendered["labels"]
    sent = types.CustomJob.to_dict(
        types.CustomJob.from_json(json.dumps(rendered)),
        use_integers_for_enums=False,
        preserving_proto_field_name=False,
        always_print_fields_with_no_presence=False,
    )
    assert received(cloud) == sent


def test_the_guides_impossible_machine_is_refused_before_anything_is_sent(cloud: Cloud[Any], sdtune: Command) -> None:
    words = CASES["vertex-config.yaml of Diffusers"][2][:8]
    code, _, err = sdtune(*words, "--machine-type", "n1-standard-8", "--gpu", "NVIDIA_TESLA_A100", "--gpus", "2")
    assert code == 2
    assert "a2-highgpu-2g" in err
    assert not cloud.vertex.requests
