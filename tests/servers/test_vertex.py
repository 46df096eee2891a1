"""The Vertex AI server under Google's real clients: jobs are made, run, followed and stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.api_core import exceptions
from google.cloud.aiplatform_v1 import JobServiceClient
from google.cloud.aiplatform_v1.types import JobState

from tests.servers.processes import expand
from tests.servers.vertex import VertexServer
from tests.servers.vertex_examples import (
    FAST,
    IMAGE,
    L4,
    NETWORK,
    Lines,
    client_of,
    container,
    job,
    post,
    submit,
)


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def server(lines: Lines) -> Iterator[VertexServer]:
    with VertexServer(logging=lines, delays=FAST) as server:
        yield server


@pytest.fixture
def client(server: VertexServer) -> JobServiceClient:
    return client_of(server)


# Running -------------------------------------------------------------------------------------------------------------


def test_a_job_runs_and_its_lines_are_logged(server: VertexServer, client: JobServiceClient, lines: Lines) -> None:
    code = "import sys; print('one'); print('two', flush=True); print('{\"step\": 1}', file=sys.stderr)"
    name = submit(client, job(code, labels={"made-by": "sdtune"}))
    number, job_id = server.number_of("my-project"), name.rsplit("/", 1)[-1]
    assert name == f"projects/{number}/locations/us-central1/customJobs/{job_id}"
    assert server.jobs[job_id].wait() == "JOB_STATE_SUCCEEDED"
    assert server.jobs[job_id].states == [
        "JOB_STATE_QUEUED", "JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_SUCCEEDED"
    ]  # fmt: skip
    found = client.get_custom_job(name=name)
    assert (found.state, found.display_name, dict(found.labels)) == (
        JobState.JOB_STATE_SUCCEEDED, "dog-lora", {"made-by": "sdtune"}
    )  # fmt: skip
    assert found.create_time <= found.start_time <= found.end_time == found.update_time
    assert found.error.code == 0
    assert [text for _, _, severity, text in lines.entries if severity == "INFO"][-5:-2] == [
        "Job is running.", "one", "two"
    ]  # fmt: skip
    assert {entry[1:] for entry in lines.entries} >= {
        ("workerpool0-0", "INFO", "two"), ("workerpool0-0", "ERROR", '{"step": 1}'),
        ("service", "INFO", "Waiting for job to be provisioned."), ("service", "INFO", "Job is running."),
    }  # fmt: skip
    assert lines.of("service")[-1] == "Job completed successfully."
    assert {entry[0] for entry in lines.entries} == {job_id}


def test_a_failing_replica_fails_the_job(server: VertexServer, client: JobServiceClient, lines: Lines) -> None:
    name = submit(client, job("import sys; print('no such file', file=sys.stderr); sys.exit(7)"))
    assert server.job(name).wait() == "JOB_STATE_FAILED"
    error = client.get_custom_job(name=name).error
    assert error.code == 3
    assert error.message.startswith(
        "The replica workerpool0-0 exited with a non-zero status of 7. Termination reason: Error. \nno such file\n"
    )
    assert "console.cloud.google.com/logs/viewer" in error.message
    assert lines.of("service")[-1] == "Job failed."


def test_environment_arguments_and_folders(client: JobServiceClient, lines: Lines, monkeypatch: Any) -> None:
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "x")
    code = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd(), sys.executable]))"
    body = job(code, "--seed=$(SEED)", "--price=$$(SEED)", "--left=$(NOT_THERE)")
    body["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["env"] = [
        {"name": "SEED", "value": "7"}, {"name": "WITH", "value": "$(SEED)-$(CLOUD_ML_REGION)"}
    ]  # fmt: skip
    body["jobSpec"]["baseOutputDirectory"] = {"outputUriPrefix": "gs://bucket/dog"}
    with VertexServer(lines, "http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"}, FAST) as server:
        assert post(server, body)[0] == 200
        (made,) = server.jobs.values()
        assert made.wait() == "JOB_STATE_SUCCEEDED"
    args, environment, folder, python = json.loads(lines.of("workerpool0-0")[0])
    assert args == ["--seed=7", "--price=$(SEED)", "--left=$(NOT_THERE)"]
    wanted = {
        "SEED": "7", "WITH": "7-us-central1", "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1",
        "AIP_MODEL_DIR": "gs://bucket/dog/model/", "AIP_CHECKPOINT_DIR": "gs://bucket/dog/checkpoints/",
        "AIP_TENSORBOARD_LOG_DIR": "gs://bucket/dog/logs/", "CLOUD_ML_JOB_ID": made.id,
        "CLOUD_ML_PROJECT_ID": made.number, "CLOUD_ML_REGION": "us-central1",
    }  # fmt: skip
    assert {name: environment.get(name) for name in wanted} == wanted
    assert environment.keys().isdisjoint({"SECRET_OF_THE_CALLER", "CLUSTER_SPEC", "VIRTUAL_ENV", "PWD"})
    assert environment["HOME"] != os.environ.get("HOME")
    assert Path(python) == Path(sys.executable)
    assert not Path(folder).exists()


def test_expansion_is_that_of_kubernetes() -> None:
    values = {"A": "1", "B": "$(A)"}
    texts = {"$(A)": "1", "$$(A)": "$(A)", "$$$(A)": "$1", "$(B)": "$(A)", "$(C)": "$(C)", "$A$": "$A$", "a$$b": "a$b"}
    assert {text: expand(text, values) for text in texts} == texts


def test_replicas_find_each_other(server: VertexServer, client: JobServiceClient, lines: Lines) -> None:
    code = """if True:
        import json, os, socket, time
        spec = json.loads(os.environ["CLUSTER_SPEC"])
        host, port = spec["cluster"]["workerpool0"][0].split(":")
        if spec["task"]["type"] == "workerpool0":
            with socket.create_server((host, int(port))) as listening:
                for _ in range(2):
                    with listening.accept()[0] as worker:
                        print("met", worker.recv(100).decode(), flush=True)
        else:
            for _ in range(200):
                try:
                    with socket.create_connection((host, int(port))) as chief:
                        chief.sendall(f"{spec['task']['type']}-{spec['task']['index']}".encode())
                    break
                except ConnectionRefusedError:
                    time.sleep(0.02)
    """
    body = job(code)
    body["jobSpec"]["workerPoolSpecs"].append({**body["jobSpec"]["workerPoolSpecs"][0], "replicaCount": "2"})
    name = submit(client, body)
    assert server.job(name).wait() == "JOB_STATE_SUCCEEDED", lines.entries
    assert sorted(lines.of("workerpool0-0")) == ["met workerpool1-0", "met workerpool1-1"]


def test_one_failing_worker_ends_them_all(server: VertexServer, client: JobServiceClient) -> None:
    body = job("import time; time.sleep(600)")
    worker = {**body["jobSpec"]["workerPoolSpecs"][0], "containerSpec": container("raise SystemExit(9)")}
    body["jobSpec"]["workerPoolSpecs"] += [{}, worker]
    name = submit(client, body)
    assert server.job(name).wait(timeout=20) == "JOB_STATE_FAILED"
    assert (
        "The replica workerpool2-0 exited with a non-zero status of 9" in client.get_custom_job(name=name).error.message
    )


def test_shares_are_folders(server: VertexServer, client: JobServiceClient, lines: Lines) -> None:
    folder = server.nfs("10.0.0.2", "/vol1")
    code = "import os, sys; open(sys.argv[1] + '/a', 'w').write('x'); print(sys.argv[1], os.environ['TO'], sys.argv[2])"
    body = job(code, "/mnt/nfs/models", "--see=/mnt/nfs/models-of-others", spec={"network": NETWORK})
    pool = body["jobSpec"]["workerPoolSpecs"][0]
    pool["containerSpec"]["env"] = [{"name": "TO", "value": "/mnt/nfs/models/b"}]
    pool["nfsMounts"] = [{"server": "10.0.0.2", "path": "/vol1", "mountPoint": "models"}]
    name = submit(client, body)
    assert server.job(name).wait() == "JOB_STATE_SUCCEEDED"
    assert (folder / "a").read_text() == "x"
    assert lines.of("workerpool0-0") == ["/mnt/nfs/models /mnt/nfs/models/b --see=/mnt/nfs/models-of-others"]
    pool["nfsMounts"][0]["path"] = "/vol2"
    name = submit(client, body)
    assert server.job(name).wait() == "JOB_STATE_FAILED"
    assert "10.0.0.2:/vol2" in client.get_custom_job(name=name).error.message


def test_gcs_can_be_a_folder(lines: Lines, tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a.txt").write_text("content")
    with VertexServer(lines, delays=FAST, gcs=tmp_path) as server:
        post(
            server,
            job("import sys; print(open(sys.argv[1]).read(), sys.argv[1:])", "/gcs/bucket/a.txt", "gs://b/gcs/x"),
        )
        (made,) = server.jobs.values()
        assert made.wait() == "JOB_STATE_SUCCEEDED"
    assert lines.of("workerpool0-0") == ["content ['/gcs/bucket/a.txt', 'gs://b/gcs/x']"]


@pytest.mark.parametrize(
    ("command", "args", "status", "text"),
    [
        ([], ["--help"], "JOB_STATE_SUCCEEDED", ""),
        (["no-such-program"], [], "JOB_STATE_FAILED", 'exec: "no-such-program": executable file not found in $PATH'),
    ],
    ids=["entry point", "no such program"],
)
def test_what_an_image_runs(command: list[str], args: list[str], status: str, text: str, lines: Lines) -> None:
    body = job()
    body["jobSpec"]["workerPoolSpecs"][0]["containerSpec"] = {"imageUri": IMAGE, "command": command, "args": args}
    with VertexServer(
        lines, delays=FAST, entry_points={"/sdtune/": ["python", "-c", "import sys; print(sys.argv)"]}
    ) as server:
        post(server, body)
        (made,) = server.jobs.values()
        assert made.wait() == status
        assert text in made.message.error.message
    assert lines.of("workerpool0-0") == ([] if text else ["['-c', '--help']"])


# States --------------------------------------------------------------------------------------------------------------


def test_a_running_job_is_cancelled(server: VertexServer, client: JobServiceClient, lines: Lines) -> None:
    code = """if True:
        import os, signal, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"saving\\n"), sys.exit(0)))
        print(child.pid, "ready", flush=True)
        print("ready", flush=True)
        time.sleep(600)
    """
    name = submit(client, job(code))
    made = server.job(name)
    lines.wait_for("ready")
    client.cancel_custom_job(name=name)
    assert made.wait(timeout=20) == "JOB_STATE_CANCELLED"
    assert made.states[-2:] == ["JOB_STATE_CANCELLING", "JOB_STATE_CANCELLED"]
    assert client.get_custom_job(name=name).error.code == 1
    assert "saving" in lines.of("workerpool0-0")
    child = Path("/proc") / lines.of("workerpool0-0")[0].split()[0]
    assert not child.exists() or "Z" in (child / "stat").read_text().split()[2]
    with pytest.raises(exceptions.BadRequest, match="JOB_STATE_CANCELLED"):
        client.cancel_custom_job(name=name)


def test_a_job_that_does_not_listen_is_killed(lines: Lines) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    with VertexServer(lines, delays=FAST, grace=0.2) as server:
        post(server, job(code))
        (made,) = server.jobs.values()
        lines.wait_for("up")
        made.cancel()
        assert made.wait(timeout=10) == "JOB_STATE_CANCELLED"


def test_a_job_that_waits_is_cancelled_at_once(lines: Lines) -> None:
    with VertexServer(lines, delays={"JOB_STATE_QUEUED": 600}) as server:
        post(server, job())
        (made,) = server.jobs.values()
        made.cancel()
        assert made.wait(timeout=5) == "JOB_STATE_CANCELLED"
        assert "JOB_STATE_RUNNING" not in made.states


def test_a_job_expires(server: VertexServer, client: JobServiceClient) -> None:
    name = submit(client, job("import time; time.sleep(600)", spec={"scheduling": {"timeout": "1s"}}))
    assert server.job(name).wait(timeout=20) == "JOB_STATE_EXPIRED"
    assert client.get_custom_job(name=name).error.code == 0


def test_a_preempted_job_starts_again(
    server: VertexServer, client: JobServiceClient, lines: Lines, tmp_path: Path
) -> None:
    code = """if True:
        import os, sys, time
        been_here = os.path.exists(sys.argv[1])
        open(sys.argv[1], "w")
        print("up", flush=True)
        time.sleep(0 if been_here else 600)
    """
    name = submit(client, job(code, str(tmp_path / "seen")))
    made = server.job(name)
    lines.wait_for("up")
    made.preempt()
    assert made.wait(timeout=20) == "JOB_STATE_SUCCEEDED"
    assert made.states.count("JOB_STATE_RUNNING") == 2
    assert lines.of("workerpool0-0") == ["up", "up"]


def test_processes_end_with_the_server(lines: Lines) -> None:
    with VertexServer(lines, delays=FAST) as server:
        post(server, job("import os, time; print(os.getpid(), flush=True); print('up', flush=True); time.sleep(600)"))
        lines.wait_for("up")
    with pytest.raises(ProcessLookupError):
        os.kill(int(lines.of("workerpool0-0")[0]), 0)


def test_delays(lines: Lines) -> None:
    with VertexServer(lines, delays={"JOB_STATE_PENDING": 0.2, "JOB_STATE_CANCELLING": 0.2}) as server:
        post(server, job("import time; time.sleep(600)"))
        (made,) = server.jobs.values()
        start = time.monotonic()
        assert made.wait("JOB_STATE_RUNNING") == "JOB_STATE_RUNNING"
        assert time.monotonic() - start > 0.15
        made.cancel()
        start = time.monotonic()
        assert made.wait() == "JOB_STATE_CANCELLED"
        assert time.monotonic() - start > 0.15


# gcloud --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud(server: VertexServer, lines: Lines, tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true", "CLOUDSDK_CORE_PROJECT": "my-project",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1", "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"{server.address}/",
    }  # fmt: skip

    def gcloud(verb: str, *args: str) -> subprocess.CompletedProcess[str]:
        command = ["gcloud", "ai", "custom-jobs", verb, *args, "--region=us-central1", "--format=json"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    config = tmp_path / "config.yaml"
    code = "import sys, time; print(sys.argv[1:], flush=True); time.sleep(600)"
    spec = job(code)["jobSpec"]
    config.write_text(yaml.safe_dump(spec))
    made = gcloud("create", "--display-name=dog", f"--config={config}", "--args=--steps=4,--rank=8", "--labels=a=b")
    assert made.returncode == 0, made.stderr
    (request,) = server.requests
    assert request.body["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"] == ["--steps=4", "--rank=8"]
    (running,) = server.jobs.values()
    lines.wait_for("['--steps=4', '--rank=8']")
    described = json.loads(gcloud("describe", running.id).stdout)
    assert (described["state"], described["labels"]) == ("JOB_STATE_RUNNING", {"a": "b"})
    assert gcloud("cancel", running.id).returncode == 0
    assert running.wait(timeout=20) == "JOB_STATE_CANCELLED"
    (listed,) = json.loads(gcloud("list").stdout)
    assert (listed["name"], listed["error"]["code"]) == (running.message.name, 1)

    server.quota("us-central1", "custom_model_training_nvidia_l4_gpus", 0)
    spec["workerPoolSpecs"][0]["machineSpec"] = L4
    config.write_text(yaml.safe_dump(spec))
    refused = gcloud("create", "--display-name=dog", f"--config={config}")
    assert refused.returncode == 1
    assert "RESOURCE_EXHAUSTED: The following quota metrics exceed quota limits" in refused.stderr
