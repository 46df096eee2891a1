"""From a planned job to what Vertex AI is sent: every option in its place, and nothing the service does not know."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.cloud.aiplatform_v1 import types

from sdtune.backends.vertex.records import record_of
from sdtune.backends.vertex.specs import as_label, custom_job
from sdtune.jobs.machines import choose_machine, cpu_machine
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import JobSpec, plan_copy, plan_training
from sdtune.methods.catalog import METHODS

METHOD = METHODS["dreambooth-lora"].from_settings({"instance_prompt": "a photo of sks cat, $(PATH)"})
NETWORK = "projects/123456/global/networks/default"
EVERYTHING: dict[str, Any] = {
    "region": "us-central1",
    "gpu": "a100-80gb",
    "gpus": 2,
    "replicas": 3,
    "boot_disk_gb": 200,
    "strategy": "flex-start",
    "max_wait": "2h",
    "timeout": "3h",
    "restart_on_preemption": True,
    "service_account": "trainer@my-project.iam.gserviceaccount.com",
    "network": NETWORK,
    "reserved_ip_range": ["range-a"],
    "nfs": ["10.0.0.2:/vol1=/mnt/nfs/models"],
    "save_nfs": True,
    "tensorboard": "projects/my-project/locations/us-central1/tensorboards/123",
    "web_access": True,
    "labels": {"team": "art"},
    "kms_key": "projects/my-project/locations/us-central1/keyRings/r/cryptoKeys/k",
    "persistent_resource": "cluster",
    "env": {"NCCL_DEBUG": "INFO"},
    "image": "us-docker.pkg.dev/p/r/i@sha256:0",
    "hf_token_secret": "hf",
    "wandb_key_secret": "projects/other/secrets/wandb",
}


def rendered(**settings: Any) -> dict[str, Any]:
    placement = Placement.from_settings({"project": "my-project", **settings})
    machine = choose_machine(
        placement.gpu, placement.gpus, placement.machine_type, strategy=placement.effective_strategy
    )
    shares = [mount.place for mount in placement.mounts] if placement.save_nfs else []
    return custom_job(plan_training(METHOD, "gs://bkt/dog", "gs://bkt/dog_lora", machine, shares), placement)


def sent(job: dict[str, Any]) -> dict[str, Any]:
    """As Google's client sends it: a field that the service does not know raises."""
    made = types.CustomJob.from_json(json.dumps(job))
    found: dict[str, Any] = json.loads(types.CustomJob.to_json(made, use_integers_for_enums=False))
    return found


def test_the_smallest_job() -> None:
    job = rendered()
    spec = job["jobSpec"]
    assert list(spec) == ["workerPoolSpecs", "scheduling", "baseOutputDirectory"]
    (pool,) = spec["workerPoolSpecs"]
    assert pool["machineSpec"] == {
        "machineType": "g2-standard-8", "acceleratorType": "NVIDIA_L4", "acceleratorCount": 1,
    }  # fmt: skip
    assert pool["replicaCount"] == "1"
    assert spec["scheduling"] == {"timeout": "86400s"}
    assert spec["baseOutputDirectory"] == {"outputUriPrefix": "gs://bkt/dog_lora"}
    assert pool["containerSpec"]["command"] == ["python", "-m", "sdtune.training"]
    assert pool["containerSpec"]["args"][:4] == [
        "train", "dreambooth-lora", "--dataset=gs://bkt/dog", "--output=gs://bkt/dog_lora",
    ]  # fmt: skip
    assert METHODS["dreambooth-lora"].from_args(pool["containerSpec"]["args"][4:]) == METHOD
    assert sent(job)["jobSpec"]["workerPoolSpecs"][0]["machineSpec"]["acceleratorType"] == "NVIDIA_L4"


def test_every_option_has_its_place() -> None:
    job = rendered(**EVERYTHING)
    spec = job["jobSpec"]
    first, others = spec["workerPoolSpecs"]
    assert (first["replicaCount"], others["replicaCount"]) == ("1", "2")
    assert {**first, "replicaCount": ""} == {**others, "replicaCount": ""}
    assert first["machineSpec"] == {
        "machineType": "a2-ultragpu-2g", "acceleratorType": "NVIDIA_A100_80GB", "acceleratorCount": 2,
    }  # fmt: skip
    assert first["diskSpec"] == {"bootDiskSizeGb": 200}
    assert first["nfsMounts"] == [{"server": "10.0.0.2", "path": "/vol1", "mountPoint": "models"}]
    assert first["containerSpec"]["imageUri"] == "us-docker.pkg.dev/p/r/i@sha256:0"
    assert "--nfs=/mnt/nfs/models" in first["containerSpec"]["args"]
    env = {entry["name"]: entry["value"] for entry in first["containerSpec"]["env"]}
    assert env["NCCL_DEBUG"] == "INFO"
    assert env["HF_TOKEN_SECRET"] == "projects/my-project/secrets/hf/versions/latest"
    assert env["WANDB_API_KEY_SECRET"] == "projects/other/secrets/wandb/versions/latest"
    assert spec["scheduling"] == {
        "timeout": "10800s", "strategy": "FLEX_START", "maxWaitDuration": "7200s", "restartJobOnWorkerRestart": True,
    }  # fmt: skip
    for name, value in (
        ("serviceAccount", EVERYTHING["service_account"]),
        ("network", NETWORK),
        ("reservedIpRanges", ["range-a"]),
        ("tensorboard", EVERYTHING["tensorboard"]),
        ("enableWebAccess", True),
        ("persistentResourceId", "cluster"),
    ):
        assert spec[name] == value
    assert job["encryptionSpec"] == {"kmsKeyName": EVERYTHING["kms_key"]}
    assert job["labels"]["team"] == "art"
    assert job["labels"]["sdtune-method"] == "dreambooth-lora"
    # What was set is what arrives, in the service's own types.
    arrived = sent(job)
    assert arrived["jobSpec"]["scheduling"]["strategy"] == "FLEX_START"
    assert arrived["jobSpec"]["workerPoolSpecs"][1]["replicaCount"] == "2"


def test_no_setting_is_without_effect() -> None:
    """Each option changes what is sent, or where."""
    elsewhere = {"project", "region", "bucket", "force_machine"}
    alone = {
        "strategy": {"strategy": "spot"},
        "spot": {"spot": True},
        "repository": {"repository": "other"},
        "machine_type": {"machine_type": "g2-standard-16"},
        "gpus": {"gpu": "a100-80gb", "gpus": 2},
        "save_nfs": {name: EVERYTHING[name] for name in ("save_nfs", "nfs", "network")},
        "nfs": {name: EVERYTHING[name] for name in ("nfs", "network")},
        "reserved_ip_range": {name: EVERYTHING[name] for name in ("reserved_ip_range", "network")},
        "tensorboard": {name: EVERYTHING[name] for name in ("tensorboard", "service_account")},
        "max_wait": {"strategy": "flex-start", "max_wait": "2h"},
    }
    beside = {
        "save_nfs": ("nfs", "network"), "nfs": ("network",), "reserved_ip_range": ("network",),
        "tensorboard": ("service_account",), "gpus": ("gpu",), "max_wait": ("strategy",),
    }  # fmt: skip

    def spec(**settings: Any) -> dict[str, Any]:
        job = rendered(**settings)
        del job["labels"]["sdtune-run"]
        return job

    for name in Placement.model_fields:
        if name in elsewhere:
            continue
        settings = alone.get(name) or {name: EVERYTHING[name]}
        without = {other: settings[other] for other in beside.get(name, ())}
        assert spec(**settings) != spec(**without), name


def test_a_copy_has_no_gpu_and_no_output_directory() -> None:
    placement = Placement.from_settings(
        {"project": "my-project", "network": NETWORK, "nfs": "10.0.0.2:/vol1=models", "replicas": 4}
    )
    job = custom_job(plan_copy("gs://bkt/dog_lora", None, ["/mnt/nfs/models"], cpu_machine()), placement)
    (pool,) = job["jobSpec"]["workerPoolSpecs"]
    assert pool["machineSpec"] == {"machineType": "e2-standard-4"}
    assert pool["containerSpec"]["args"] == ["sync-nfs", "--from=gs://bkt/dog_lora", "--nfs=/mnt/nfs/models"]
    assert "baseOutputDirectory" not in job["jobSpec"]
    assert "sdtune-method" not in job["labels"]
    assert sent(job)


def test_two_submissions_have_two_names() -> None:
    assert rendered()["labels"]["sdtune-run"] != rendered()["labels"]["sdtune-run"]


@pytest.mark.parametrize(("text", "label"), [("0.1.0", "0-1-0"), ("A b" * 40, ("a-b" * 40)[:63])])
def test_labels_have_the_letters_that_labels_may_have(text: str, label: str) -> None:
    assert as_label(text) == label


def test_a_job_that_comes_back_is_read_as_it_was_sent() -> None:
    job = {
        **rendered(**EVERYTHING),
        "name": "projects/123/locations/us-central1/customJobs/77",
        "state": "JOB_STATE_PARTIALLY_SUCCEEDED",
        "createTime": "2026-11-25T10:00:00.123456Z",
        "startTime": "2026-11-25T10:05:00Z",
        "error": {"code": 3, "message": "no"},
    }
    record = record_of(job)
    assert (record.number, record.name, record.region, record.method) == (
        "77",
        "dog_lora",
        "us-central1",
        "dreambooth-lora",
    )
    assert (record.state, record.has_ended, record.error) == ("partially succeeded", True, "no")
    assert (record.machine_type, record.gpu, record.gpus, record.replicas) == ("a2-ultragpu-2g", "a100-80gb", 2, 3)
    assert record.output == "gs://bkt/dog_lora"
    assert record.started
    assert (record.started - record.created).seconds == 299
    assert record.ended is None
    assert "locations/us-central1/training/77?project=123" in record.url


def test_a_job_of_a_copy_is_read_too() -> None:
    spec = JobSpec("x", "sync-nfs", "", "diffusers", "gs://bkt/l", ("sync-nfs", "--from=gs://bkt/l"), cpu_machine())
    job = custom_job(spec, Placement(project="my-project"))
    job |= {"name": "projects/1/locations/r1/customJobs/7", "createTime": "2026-11-25T10:00:00Z"}
    record = record_of(job)
    assert (record.task, record.method, record.gpu, record.accelerators, record.output) == (
        "sync-nfs", "", "", "-", "gs://bkt/l",
    )  # fmt: skip
