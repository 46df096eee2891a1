"""What the Vertex AI server refuses and takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers.vertex import VertexServer
from tests.servers.vertex_examples import (
    ACCOUNT,
    FAST,
    FLEX,
    L4,
    NETWORK,
    ON_L4,
    POOL,
    REMOVED,
    changed,
    job,
    post,
)
from tests.servers.vertex_rules import counts_of


@pytest.fixture
def server() -> Iterator[VertexServer]:
    with VertexServer(delays=FAST) as server:
        yield server


T4 = {"machineType": "n1-standard-8", "acceleratorType": "NVIDIA_TESLA_T4", "acceleratorCount": 1}
A100 = {"machineType": "a2-highgpu-1g", "acceleratorType": "NVIDIA_TESLA_A100", "acceleratorCount": 1}
POOL_SPEC, ON_L4_SPEC = (made["jobSpec"]["workerPoolSpecs"][0] for made in (job(), ON_L4))
BOARD = "projects/my-project/locations/us-central1/tensorboards/1"
MOUNT = {"server": "10.0.0.2", "path": "/vol1", "mountPoint": "models"}
NAMED = changed("jobSpec.network", NETWORK)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        # JSON
        (b"{", "Invalid JSON payload received. Unexpected token."),
        (changed("dispalyName", "x"), "Unknown name \"dispalyName\" at 'custom_job': Cannot find field."),
        (changed(f"{POOL}.replicas", 1), "Unknown name \"replicas\" at 'custom_job.job_spec.worker_pool_specs[0]'"),
        (changed("display_name", "x"), "'display_name' is given twice"),
        (changed("displayName", 5), "Invalid value at 'custom_job.display_name' (TYPE_STRING), 5"),
        (changed("displayName", ["x"]), "Proto field is not repeating, cannot start list."),
        (changed("labels", ["x"]), "Invalid value at 'custom_job.labels' (Map)"),
        (changed("jobSpec.workerPoolSpecs", {}), "Invalid value at 'custom_job.job_spec.worker_pool_specs' (List)"),
        (changed(f"{POOL}.replicaCount", "one"), "(TYPE_INT64), \"one\""),
        (changed(f"{POOL}.machineSpec.acceleratorType", "V100"),
         "(type.googleapis.com/google.cloud.aiplatform.v1.AcceleratorType), \"V100\""),
        (changed(f"{POOL}.machineSpec.acceleratorType", 99), "AcceleratorType), 99"),
        (changed("jobSpec.scheduling.timeout", "24h"), "duration must end with 's'"),
        (changed("jobSpec.enableWebAccess", "yes"), "(TYPE_BOOL), \"yes\""),
        # Required fields, names, labels
        (changed("displayName", REMOVED), "1.Field: custom_job.display_name; Message: Required field is not set.\t"),
        (changed("displayName", "x" * 129), "custom_job.display_name"),
        (changed("labels", {"Method": "x"}), "1.Field: custom_job.labels; Message: There can be no more"),
        (changed("labels", {"method": "Dream Booth"}), "custom_job.labels"),
        (changed("labels", {"method": "x" * 64}), "custom_job.labels"),
        (changed("labels", {"x" * 64: "y"}), "custom_job.labels"),
        (changed("labels", {"_x": "y"}), "custom_job.labels"),
        (changed("labels", {f"x{number}": "y" for number in range(65)}), "custom_job.labels"),
        (changed("encryptionSpec.kmsKeyName", "projects/p/locations/us-east1/keyRings/r/cryptoKeys/k"), "kms_key_name"),
        # Pools
        (changed("jobSpec.workerPoolSpecs", []), "job_spec.worker_pool_specs; Message: Required"),
        (changed("jobSpec.workerPoolSpecs", [POOL_SPEC] * 5), "no more than 4"),
        (changed(f"{POOL}.replicaCount", 2), "job_spec.worker_pool_specs[0].replica_count; Message:"),
        (changed("jobSpec.workerPoolSpecs", [POOL_SPEC, {**POOL_SPEC, "replicaCount": 0}]), "[1].replica_count"),
        (changed(f"{POOL}.replicaCount", REMOVED), "job_spec.worker_pool_specs[0].replica_count"),
        (changed(f"{POOL}.containerSpec", REMOVED), "job_spec.worker_pool_specs[0].container_spec; Message: Required"),
        (changed(f"{POOL}.containerSpec.imageUri", ""), "container_spec.image_uri; Message: Required"),
        (changed(f"{POOL}.containerSpec.imageUri", "gcr.io/my project/x"), "container_spec.image_uri"),
        (changed(f"{POOL}.containerSpec.env", [{"name": "1A", "value": "x"}]), "env[0].name"),
        (changed(f"{POOL}.containerSpec.env", [{"name": f"A{n}", "value": ""} for n in range(101)]), "more than 100"),
        (changed(f"{POOL}.containerSpec.env", [{"name": "A", "value": "1"}] * 2), "EnvVar names must be unique."),
        (changed(f"{POOL}.diskSpec", {"bootDiskType": "pd-fast"}), "boot_disk_type"),
        (changed(f"{POOL}.diskSpec", {"bootDiskSizeGb": 20}), "boot_disk_size_gb"),
        # Machines
        (changed(f"{POOL}.machineSpec", REMOVED), "machine_spec.machine_type; Message: Required"),
        (changed(f"{POOL}.machineSpec.acceleratorType", "NVIDIA_TESLA_T4"), "machine_spec.accelerator_count; Message:"),
        (changed(f"{POOL}.machineSpec.acceleratorCount", 1), "machine_spec.accelerator_type; Message:"),
        (changed(f"{POOL}.machineSpec", {**T4, "acceleratorCount": -1}), "machine_spec.accelerator_count; Message:"),
        (changed(f"{POOL}.machineSpec.machineType", "c3-standard-4"), 'Machine type "c3-standard-4" is not supported.'),
        (changed(f"{POOL}.machineSpec", {**L4, "machineType": "n1-standard-8"}),
         'Accelerator "NVIDIA_L4" is not supported for machine type "n1-standard-8".'),
        (changed(f"{POOL}.machineSpec", {"machineType": "n1-standard-8", "acceleratorType": "NVIDIA_TESLA_A100",
                                         "acceleratorCount": 2}),
         'Accelerator "NVIDIA_TESLA_A100" is not supported for machine type "n1-standard-8".'),
        (changed(f"{POOL}.machineSpec", {**T4, "machineType": "n1-standard-32"}), "Accelerator count 1 is not"),
        (changed(f"{POOL}.machineSpec", {**L4, "acceleratorCount": 2}), "Accelerator count 2 is not supported"),
        (changed(f"{POOL}.machineSpec", {"machineType": "g2-standard-8"}), 'requires accelerator "NVIDIA_L4"'),
        (changed(f"{POOL}.machineSpec.reservationAffinity", {"reservationAffinityType": "SPECIFIC_RESERVATION"}),
         "reservation_affinity"),
        # Scheduling
        (changed("jobSpec.scheduling", {"maxWaitDuration": "60s"}), "scheduling.max_wait_duration"),
        (changed("jobSpec.scheduling", {**FLEX, "maxWaitDuration": "-1s"}, ON_L4), "scheduling.max_wait_duration"),
        (changed("jobSpec", {"scheduling": FLEX, "workerPoolSpecs": [ON_L4_SPEC, {**ON_L4_SPEC, "machineSpec": A100}]}),
         "All worker pools must have the same machine"),
        (changed("jobSpec.scheduling", {"timeout": "0s"}), "scheduling.timeout"),
        (changed("jobSpec.scheduling", FLEX, changed(f"{POOL}.machineSpec", T4)),
         "The strategy FLEX_START does not support NVIDIA_TESLA_T4."),
        (changed("jobSpec.scheduling", FLEX), "job_spec.scheduling.strategy"),
        (changed("jobSpec.scheduling", {**FLEX, "timeout": "604801s"}, ON_L4), "at most 7 days"),
        # Network, shares, accounts
        (changed("jobSpec.network", "projects/my-project/global/networks/default"), "job_spec.network; Message:"),
        (changed("jobSpec.reservedIpRanges", ["r"]), "reserved_ip_ranges"),
        (changed("jobSpec.pscInterfaceConfig", {"networkAttachment": "a"}, NAMED), "psc_interface_config"),
        (changed(f"{POOL}.nfsMounts", [MOUNT]), "worker_pool_specs[0].nfs_mounts; Message:"),
        (changed(f"{POOL}.nfsMounts", [{**MOUNT, "path": "vol1"}], NAMED), "nfs_mounts[0].path"),
        (changed(f"{POOL}.nfsMounts", [{**MOUNT, "mountPoint": "/mnt/models"}], NAMED), "nfs_mounts[0].mount_point"),
        (changed(f"{POOL}.nfsMounts", [{**MOUNT, "server": "filer"}], NAMED), "nfs_mounts[0].server"),
        (changed("jobSpec.baseOutputDirectory", {"outputUriPrefix": "/gcs/bucket/x"}), "output_uri_prefix"),
        (changed("jobSpec.tensorboard", BOARD), "job_spec.service_account; Message:"),
        (changed("jobSpec.tensorboard", BOARD.replace("central", "west"), changed("jobSpec.serviceAccount", ACCOUNT)),
         "job_spec.tensorboard; Message:"),
        (changed("jobSpec.serviceAccount", "runner"), "job_spec.service_account"),
        (changed("jobSpec.persistentResourceId", "Mine"), "job_spec.persistent_resource_id; Message:"),
    ],
)  # fmt: skip
def test_what_the_service_refuses(server: VertexServer, body: Any, message: str) -> None:
    status, answer = post(server, body)
    error = answer.get("error", {})
    assert (status, error.get("code"), error.get("status")) == (400, 400, "INVALID_ARGUMENT")
    assert message in error["message"]
    assert not server.jobs
    if "Message:" in message:
        assert error["message"].startswith("List of found errors:\t1.Field: ")
        assert error["message"].endswith("\t")
        assert error["details"][0]["fieldViolations"]


def test_all_mistakes_are_told_together(server: VertexServer) -> None:
    _, answer = post(server, {"displayNam": "x", "jobSpec": {"network": 1}})
    assert len(answer["error"]["message"].split("\n")) == len(answer["error"]["details"][0]["fieldViolations"]) == 2
    _, answer = post(server, changed("labels", {"X": ""}, changed("jobSpec.network", "default")))
    assert re.findall(r"\t(\d)\.Field: ([\w.]+);", answer["error"]["message"]) == [
        ("1", "custom_job.labels"), ("2", "job_spec.network")
    ]  # fmt: skip


def test_what_the_service_takes(server: VertexServer) -> None:
    everything = job(
        spec={
            "network": NETWORK, "reservedIpRanges": ["range"], "serviceAccount": ACCOUNT, "tensorboard": BOARD,
            "scheduling": {**FLEX, "timeout": "86400s", "maxWaitDuration": "0s"}, "enableWebAccess": True,
            "baseOutputDirectory": {"outputUriPrefix": "gs://bucket"},
        },
        labels={"made-by": "sdtune", "1x": "", "k" * 63: "v" * 63},
        encryptionSpec={"kmsKeyName": "projects/p/locations/us-central1/keyRings/r/cryptoKeys/k"},
    )  # fmt: skip
    pool = everything["jobSpec"]["workerPoolSpecs"][0]
    pool |= {"machineSpec": L4, "diskSpec": {"bootDiskType": "pd-ssd", "bootDiskSizeGb": 200}, "replicaCount": 1}
    server.nfs("10.0.0.2", "/vol1")
    pool["nfsMounts"] = [{**MOUNT, "mountPoint": "/mnt/nfs/models"}]
    status, answer = post(server, everything)
    assert status == 200, answer
    assert answer["state"] == "JOB_STATE_QUEUED"
    assert answer["jobSpec"]["workerPoolSpecs"][0]["machineSpec"] == {**L4, "acceleratorCount": 1}
    assert server.job(answer["name"]).wait() == "JOB_STATE_SUCCEEDED"
    pool["machineSpec"] = {"machine_type": "g2-standard-8", "accelerator_type": 11, "accelerator_count": "1"}
    assert post(server, {"display_name": "x", "job_spec": everything["jobSpec"]})[0] == 200
    assert post(server, changed("state", "JOB_STATE_FAILED"))[1]["state"] == "JOB_STATE_QUEUED"


@pytest.mark.parametrize(
    ("machine", "accelerator", "counts"),
    [
        ("n1-standard-4", "NVIDIA_TESLA_T4", {1, 2, 4}), ("n1-highmem-96", "NVIDIA_TESLA_T4", {4}),
        ("n1-standard-16", "NVIDIA_TESLA_V100", {2, 4, 8}), ("n1-standard-64", "NVIDIA_TESLA_P100", set()),
        ("n1-highcpu-64", "NVIDIA_TESLA_P100", {4}), ("n1-standard-2", "NVIDIA_TESLA_T4", set()),
        ("g2-standard-24", "NVIDIA_L4", {2}), ("a2-highgpu-1g", "NVIDIA_A100_80GB", set()),
        ("a2-ultragpu-8g", "NVIDIA_A100_80GB", {8}), ("a3-ultragpu-8g", "NVIDIA_H200_141GB", {8}),
        ("n2-standard-8", "NVIDIA_TESLA_T4", set()),
    ],
)  # fmt: skip
def test_machines(machine: str, accelerator: str, counts: set[int]) -> None:
    assert counts_of(machine, accelerator) == counts


def test_a_region_must_be_one(server: VertexServer) -> None:
    assert post(server, job(), "projects/my-project/locations/us-central9")[0] == 404
