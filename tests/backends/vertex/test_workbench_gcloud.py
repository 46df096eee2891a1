"""The same instance asked for by the real gcloud and by sdtune: what the server received, field by field."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sdtune import __version__
from tests.conftest import Command
from tests.servers.build import BuildServer
from tests.servers.notebooks import NotebooksServer
from tests.servers.registry import Request

pytestmark = pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")

IMAGE = "us-central1-docker.pkg.dev/my-project/sdtune/sdtune-kohya-workbench"
KEY = "projects/my-project/locations/us-central1/keyRings/ring/cryptoKeys/key"
NETWORK = "projects/host/global/networks/vpc"
SUBNET = "projects/host/regions/us-central1/subnetworks/lan"
ACCOUNT = "nb@my-project.iam.gserviceaccount.com"
WITH_T4 = [
    f"--container-repository={IMAGE}", f"--container-tag={__version__}", "--machine-type=n1-standard-8",
    "--accelerator-type=NVIDIA_TESLA_T4", "--accelerator-core-count=1", "--install-gpu-driver",
]  # fmt: skip
DISKS = ["--boot-disk-size=150", "--boot-disk-type=PD_BALANCED", "--data-disk-size=100", "--data-disk-type=PD_BALANCED"]
CASES: dict[str, tuple[list[str], list[str], str]] = {
    "as it comes": (
        ["--image", "kohya", "--gpu", "t4"],
        [*WITH_T4, *DISKS, "--metadata=idle-timeout-seconds=10800,container-allow-fuse=true"],
        "us-central1-a",
    ),
    "with all that can be set": (
        ["--image", "kohya", "--gpu", "t4", "--boot-disk-gb", "300", "--data-disk-gb", "50", "--disk-type", "pd-ssd",
         "--idle-shutdown", "off", "--no-fuse", "--owner", "ann@example.com", "--network", NETWORK, "--subnet", SUBNET,
         "--no-public-ip", "--service-account", ACCOUNT, "--labels", "team=art", "--kms-key", KEY,
         "--zone", "us-central1-b"],
        [*WITH_T4, "--boot-disk-size=300", "--boot-disk-type=PD_SSD", "--data-disk-size=50", "--data-disk-type=PD_SSD",
         "--boot-disk-encryption=CMEK", f"--boot-disk-kms-key={KEY}", "--data-disk-encryption=CMEK",
         f"--data-disk-kms-key={KEY}", "--metadata=idle-timeout-seconds=", "--instance-owners=ann@example.com",
         f"--network={NETWORK}", f"--subnet={SUBNET}", "--disable-public-ip", f"--service-account-email={ACCOUNT}",
         "--labels=team=art"],
        "us-central1-b",
    ),
    "without a GPU, in an image of one's own": (
        ["--image", "gcr.io/my-project/mine:2", "--gpu", "none", "--machine-type", "n2-standard-8"],
        ["--container-repository=gcr.io/my-project/mine", "--container-tag=2", "--machine-type=n2-standard-8", *DISKS,
         "--metadata=idle-timeout-seconds=10800,container-allow-fuse=true"],
        "us-central1-a",
    ),
    "on H100": (
        ["--image", "kohya", "--gpu", "h100", "--gpus", "8"],
        [*WITH_T4[:2], "--machine-type=a3-highgpu-8g", "--accelerator-type=NVIDIA_H100_80GB",
         "--accelerator-core-count=8", "--install-gpu-driver", *DISKS,
         "--metadata=idle-timeout-seconds=10800,container-allow-fuse=true"],
        "us-central1-a",
    ),
}  # fmt: skip
OURS = {"sdtune", "sdtune-run", "sdtune-image"}
"""The labels by which sdtune finds its instances again."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[NotebooksServer]:
    with NotebooksServer() as found, BuildServer() as build:
        build.registry.repository("my-project", "us-central1", "sdtune")
        build.registry.image(IMAGE, datetime.now(UTC), tags=[__version__])
        surroundings = {
            **build.environment, **found.environment, "CLOUDSDK_CORE_PROJECT": "my-project",
            "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        }  # fmt: skip
        for name, value in surroundings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        yield found


def gcloud(*words: str) -> str:
    ran = subprocess.run(["gcloud", *words], env=os.environ, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def received(server: NotebooksServer) -> Request:
    """The last request that made an instance; nothing is left of what it made."""
    found = [request for request in server.requests if request.method == "POST" and request.path.endswith("/instances")]
    server.instances.clear()
    server.operations.clear()
    return found[-1]


@pytest.mark.parametrize("case", CASES)
def test_an_instance_is_asked_for_as_gcloud_asks(case: str, server: NotebooksServer, sdtune: Command) -> None:
    words, theirs_words, zone = CASES[case]
    assert sdtune("workbench", "create", "cat", *words, "--detach")[0] == 0
    ours = received(server)
    gcloud("workbench", "instances", "create", "cat", f"--location={zone}", "--async", *theirs_words)
    theirs = received(server)

    assert ours.path == theirs.path == f"/v2/projects/my-project/locations/{zone}/instances"
    # By its id the API knows a request that comes again; how an answer is written is no part of the request.
    assert set(ours.query) - {"requestId"} == set(theirs.query) - {"alt"} == {"instanceId"}
    assert ours.query["instanceId"] == theirs.query["instanceId"] == "cat"
    # An output of the API, which it does not read.
    assert theirs.body.pop("name") == "cat"
    labels: dict[str, Any] = ours.body.pop("labels")
    assert set(labels) & OURS >= {"sdtune", "sdtune-run"}
    assert {name: value for name, value in labels.items() if name not in OURS} == theirs.body.pop("labels", {})
    assert ours.body == theirs.body


@pytest.mark.parametrize("case", ["with all that can be set", "without a GPU, in an image of one's own"])
def test_the_command_that_a_dry_run_prints_asks_for_just_that(
    case: str, server: NotebooksServer, sdtune: Command
) -> None:
    words, _, _ = CASES[case]
    code, out, err = sdtune("workbench", "create", "cat", *words, "--dry-run")
    assert code == 0, err
    assert not server.requests
    command = out.splitlines()[1].removeprefix("# By hand: ")
    program, *arguments = shlex.split(command)
    assert program == "gcloud"
    gcloud(*arguments, "--async")
    theirs = received(server)

    assert sdtune("workbench", "create", "cat", *words, "--detach")[0] == 0
    ours = received(server)
    assert theirs.body.pop("name") == "cat"
    for body in (ours.body, theirs.body):
        assert body["labels"].pop("sdtune-run")  # another one each time
    assert ours.body == theirs.body
    assert ours.path == theirs.path


def test_gcloud_waits_lists_stops_starts_and_deletes_there(server: NotebooksServer, sdtune: Command) -> None:
    """The server of these tests is one that gcloud takes for the API."""
    at = ("cat", "--location=us-central1-a")
    gcloud("workbench", "instances", "create", *at, *WITH_T4)
    (name,) = server.instances
    assert server.instances[name]["state"] == "ACTIVE"
    listed = gcloud("workbench", "instances", "list", "--location=-", "--format=value(name,proxyUri)")
    assert listed.split() == ["cat", server.instances[name]["proxyUri"]]
    gcloud("workbench", "instances", "stop", *at)
    assert server.instances[name]["state"] == "STOPPED"
    gcloud("workbench", "instances", "start", *at)
    assert server.instances[name]["state"] == "ACTIVE"
    # What gcloud has made is not sdtune's.
    assert sdtune("workbench", "delete", "cat", "--yes")[0] == 4
    gcloud("workbench", "instances", "delete", *at)
    assert not server.instances
