"""The loopback cloud as a whole: what a job does to the bucket, what is read of its lines."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Client

from tests.servers.cloud import loopback_cloud
from tests.servers.emulator import Emulator
from tests.servers.storage import StorageServer
from tests.servers.vertex_examples import job, post

IN_THE_JOB = """if True:
    import os
    from google.cloud.storage import Client
    bucket = Client().bucket("bucket")
    found = bucket.blob("dog/a.txt").download_as_bytes()
    bucket.blob(os.environ["AIP_MODEL_DIR"].removeprefix("gs://bucket/") + "b.txt").upload_from_string(found + b"!")
    print("copied", flush=True)
"""


@pytest.mark.parametrize("storage", [StorageServer, Emulator])
def test_a_job_works_on_the_bucket(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback_cloud(storage) as cloud:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", cloud.environment["STORAGE_EMULATOR_HOST"])
        client = Client(project="my-project", credentials=AnonymousCredentials())
        if storage is StorageServer:
            cloud.storage.buckets["bucket"] = {}
        else:
            client.create_bucket("bucket")
        client.bucket("bucket").blob("dog/a.txt").upload_from_string(b"woof")
        body = job(IN_THE_JOB, spec={"baseOutputDirectory": {"outputUriPrefix": "gs://bucket/out"}})
        _, made = post(cloud.vertex, body)
        assert cloud.vertex.job(made["name"]).wait() == "JOB_STATE_SUCCEEDED", cloud.vertex.job(made["name"]).message
        assert client.bucket("bucket").blob("out/model/b.txt").download_as_bytes() == b"woof!"


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_makes_a_job_and_streams_its_lines(tmp_path: Any) -> None:
    with loopback_cloud() as cloud:
        cloud.storage.put("bucket", "dog/a.txt", b"woof")

        def gcloud(*args: str) -> subprocess.CompletedProcess[str]:
            environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **cloud.environment}
            return subprocess.run(["gcloud", *args], env=environment, capture_output=True, text=True, timeout=90)

        assert gcloud("storage", "ls", "gs://bucket/dog/").stdout == "gs://bucket/dog/a.txt\n"
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(job("print('one'); raise SystemExit(1)")["jobSpec"]))
        made = gcloud(
            "ai", "custom-jobs", "create", "--region=europe-west4", "--display-name=x", f"--config={config}"
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        (running,) = cloud.vertex.jobs.values()
        assert running.wait() == "JOB_STATE_FAILED"
        streamed = gcloud(
            "ai", "custom-jobs", "stream-logs", running.id, "--region=europe-west4", "--polling-interval=1"
        )  # fmt: skip
        lines = [line.split("\t") for line in streamed.stdout.splitlines()]
        assert ["service", "Job is running."] in [line[-2:] for line in lines]
        assert ["workerpool0-0", "one"] in [line[-2:] for line in lines]
        assert ["ERROR", "service"] in [[line[0], line[2]] for line in lines if "status of 1" in line[-1]]
        assert lines[-1][-2:] == ["service", "Job failed."]
