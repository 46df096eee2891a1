"""From a JobSpec to the CustomJob that Vertex AI is sent: plain dicts, in the names of its REST API."""

from __future__ import annotations

import re
from typing import Any

from sdtune import __version__
from sdtune.jobs.environment import ENVIRONMENT
from sdtune.jobs.machines import Machine
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import JobSpec

COMMAND = ("python", "-m", "sdtune.training")
"""Given always: it replaces the entry point of an image that has one and is needed by an image that has none."""
RUN_LABEL = "sdtune-run"
METHOD_LABEL = "sdtune-method"
TASK_LABEL = "sdtune-task"
VERSION_LABEL = "sdtune"
STRATEGIES = {"spot": "SPOT", "flex-start": "FLEX_START"}


def custom_job(job: JobSpec, placement: Placement) -> dict[str, Any]:
    """The CustomJob of ``job``, as JSON."""
    rendered: dict[str, Any] = {
        "displayName": job.name[:128],
        "labels": {**_labels(job), **placement.label_pairs},
        "jobSpec": job_spec(job, placement),
    }
    if placement.kms_key:
        rendered["encryptionSpec"] = {"kmsKeyName": placement.kms_key}
    return rendered


def job_spec(job: JobSpec, placement: Placement) -> dict[str, Any]:
    """The CustomJobSpec: of a job, or of each trial of a search."""
    # The output is the base directory, so that AIP_TENSORBOARD_LOG_DIR and AIP_CHECKPOINT_DIR lie in it.
    optional = {
        "serviceAccount": placement.service_account,
        "network": placement.network,
        "reservedIpRanges": list(placement.reserved_ip_range),
        "baseOutputDirectory": {"outputUriPrefix": job.output} if job.task == "train" else None,
        "tensorboard": placement.tensorboard if job.task == "train" else None,
        "enableWebAccess": placement.web_access,
        "persistentResourceId": placement.persistent_resource,
    }
    return {
        "workerPoolSpecs": worker_pools(job, placement),
        "scheduling": scheduling(placement),
        **{name: value for name, value in optional.items() if value},
    }


def worker_pools(job: JobSpec, placement: Placement) -> list[dict[str, Any]]:
    """One pool with the first machine, and a second with all others."""
    others = placement.replicas - 1 if job.task == "train" else 0
    return [worker_pool(job, placement, replicas) for replicas in (1, others) if replicas]


def worker_pool(job: JobSpec, placement: Placement, replicas: int) -> dict[str, Any]:
    """The WorkerPoolSpec of ``replicas`` machines."""
    assert job.machine is not None
    pool: dict[str, Any] = {
        "machineSpec": machine_spec(job.machine),
        # 64-bit integers are texts in Google's JSON.
        "replicaCount": str(replicas),
        "diskSpec": {"bootDiskSizeGb": placement.boot_disk_gb},
        "containerSpec": {
            "imageUri": placement.image_of(job.container),
            "command": list(COMMAND),
            "args": list(job.args),
            "env": [{"name": name, "value": value} for name, value in environment(placement).items()],
        },
    }
    if placement.mounts:
        pool["nfsMounts"] = [
            {"server": mount.server, "path": mount.path, "mountPoint": mount.mount_point} for mount in placement.mounts
        ]
    return pool


def machine_spec(machine: Machine) -> dict[str, Any]:
    """The MachineSpec; a type without GPUs has neither accelerator field."""
    spec: dict[str, Any] = {"machineType": machine.machine_type}
    if machine.accelerator_type:
        spec |= {"acceleratorType": machine.accelerator_type, "acceleratorCount": machine.accelerator_count}
    return spec


def scheduling(placement: Placement) -> dict[str, Any]:
    """How long, and at whose pleasure."""
    found: dict[str, Any] = {"timeout": f"{placement.timeout}s"}
    if placement.effective_strategy in STRATEGIES:
        found["strategy"] = STRATEGIES[placement.effective_strategy]
    if placement.max_wait is not None:
        found["maxWaitDuration"] = f"{placement.max_wait}s"
    if placement.restart_on_preemption:
        found["restartJobOnWorkerRestart"] = True
    return found


def environment(placement: Placement) -> dict[str, str]:
    """What every container gets; secrets by their names in Secret Manager, never themselves."""
    secrets = {"HF_TOKEN_SECRET": placement.hf_token_secret, "WANDB_API_KEY_SECRET": placement.wandb_key_secret}
    named = {name: placement.secret_of(secret) for name, secret in secrets.items() if secret}
    # Vertex AI puts the value of a variable in place of $(NAME), unless it is written with one $ more.
    own = {name: value.replace("$(", "$$(") for name, value in placement.env_pairs.items()}
    return {**ENVIRONMENT, **named, **own}


def _labels(job: JobSpec) -> dict[str, str]:
    labels = {VERSION_LABEL: as_label(__version__), TASK_LABEL: job.task, RUN_LABEL: job.run_id}
    return labels | ({METHOD_LABEL: job.method} if job.method else {})


def as_label(text: str) -> str:
    """``text`` in the letters that a label's value may have."""
    return re.sub(r"[^a-z0-9_-]", "-", text.lower())[:63]
