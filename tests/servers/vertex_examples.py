"""Custom jobs for tests of the Vertex AI server, and what brings them there."""

from __future__ import annotations

import copy
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from google.auth.credentials import AnonymousCredentials
from google.cloud.aiplatform_v1 import JobServiceClient
from google.cloud.aiplatform_v1.types import CustomJob

from tests.servers.vertex import VertexServer

PARENT = "projects/my-project/locations/us-central1"
IMAGE = "us-central1-docker.pkg.dev/my-project/sdtune/diffusers:1"
NETWORK = "projects/123456789012/global/networks/default"
FAST = {"JOB_STATE_PENDING": 0.0}


REMOVED = object()


class Lines:
    """A Cloud Logging that is a list of (job id, replica, severity, text)."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, str, str]] = []
        self.more = threading.Condition()

    def write(self, job_id: str, text: str, *, replica: str = "workerpool0-0", severity: str = "INFO") -> None:
        with self.more:
            self.entries.append((job_id, replica, severity, text))
            self.more.notify_all()

    def of(self, replica: str) -> list[str]:
        return [text for _, name, _, text in self.entries if name == replica]

    def wait_for(self, text: str) -> None:
        with self.more:
            assert self.more.wait_for(lambda: any(text == entry[3] for entry in self.entries), 20), self.entries


def client_of(server: VertexServer) -> JobServiceClient:
    """Google's own client."""
    return JobServiceClient(
        transport="rest", credentials=AnonymousCredentials(), client_options={"api_endpoint": server.address}
    )


def container(code: str, *args: str) -> dict[str, Any]:
    """A container that runs this Python."""
    return {"imageUri": IMAGE, "command": ["python3", "-c", code], "args": list(args)}


def job(code: str = "", *args: str, spec: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    pool = {
        "containerSpec": container(code, *args),
        "machineSpec": {"machineType": "n1-standard-4"},
        "replicaCount": "1",
    }
    return {"displayName": "dog-lora", "jobSpec": {"workerPoolSpecs": [pool], **(spec or {})}, **more}


def submit(client: JobServiceClient, body: Mapping[str, Any], parent: str = PARENT) -> str:
    made = client.create_custom_job(parent=parent, custom_job=CustomJob.from_json(json.dumps(body)))
    return str(made.name)


def changed(path: str, value: Any, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A good job with one value put at ``a.0.b``; REMOVED takes it away."""
    made: Any = copy.deepcopy(dict(body or job()))
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    at = made
    for step in steps:
        at = at.setdefault(step, {}) if isinstance(at, dict) else at[step]
    if value is REMOVED:
        del at[last]
    else:
        at[last] = value
    return made  # type: ignore[no-any-return]


def post(server: VertexServer, body: Any, parent: str = PARENT) -> tuple[int, dict[str, Any]]:
    """Status and answer, with the JSON sent as it is."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.address}/v1/{parent}/customJobs", data, method="POST")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


POOL = "jobSpec.workerPoolSpecs.0"
FLEX = {"strategy": "FLEX_START"}
L4 = {"machineType": "g2-standard-8", "acceleratorType": "NVIDIA_L4", "acceleratorCount": 1}
ON_L4 = changed(f"{POOL}.machineSpec", L4)
ACCOUNT = "runner@my-project.iam.gserviceaccount.com"
