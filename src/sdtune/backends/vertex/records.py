"""A CustomJob, as Vertex AI returns it, as a JobRecord."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sdtune.backends.vertex.names import job_url
from sdtune.backends.vertex.specs import METHOD_LABEL, RUN_LABEL, TASK_LABEL
from sdtune.jobs.archive import JobRecord
from sdtune.jobs.machines import find_gpu

STATE = "JOB_STATE_"


def record_of(job: Mapping[str, Any]) -> JobRecord:
    """What is shown of ``job``."""
    labels = job.get("labels", {})
    pools = job["jobSpec"].get("workerPoolSpecs", [{}])
    machine = pools[0].get("machineSpec", {})
    args = pools[0].get("containerSpec", {}).get("args", [])
    job_id = job["name"]
    return JobRecord(
        job_id=job_id,
        number=job_id.rpartition("/")[2],
        name=job.get("displayName", ""),
        task=labels.get(TASK_LABEL, "train"),
        method=labels.get(METHOD_LABEL, ""),
        state=state_of(job),
        region=job_id.split("/")[3],
        machine_type=machine.get("machineType", ""),
        gpu=_gpu(machine.get("acceleratorType", "")),
        gpus=int(machine.get("acceleratorCount", 0)),
        replicas=sum(int(pool.get("replicaCount", 1)) for pool in pools),
        output=_option(args, "--output") or _option(args, "--from"),
        created=_time(job["createTime"]) or datetime.min,
        started=_time(job.get("startTime")),
        ended=_time(job.get("endTime")),
        error=job.get("error", {}).get("message", ""),
        url=job_url(job_id),
        run_id=labels.get(RUN_LABEL, ""),
    )


def state_of(job: Mapping[str, Any]) -> str:
    """``JOB_STATE_PARTIALLY_SUCCEEDED`` as ``partially succeeded``."""
    return str(job.get("state", "JOB_STATE_UNSPECIFIED")).removeprefix(STATE).replace("_", " ").lower()


def _gpu(accelerator_type: str) -> str:
    """Its short name; Vertex AI's own where there is none, nothing for no GPU."""
    known = find_gpu(accelerator_type, force=True) if accelerator_type else None
    return known.name if known else accelerator_type


def _option(args: Sequence[str], name: str) -> str:
    return next((arg.partition("=")[2] for arg in args if arg.startswith(f"{name}=")), "")


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
