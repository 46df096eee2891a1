"""The loopback Notebooks API: Google's own client speaks to it, and it refuses what the service refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
from google.api_core import exceptions as api
from google.auth.credentials import AnonymousCredentials
from google.cloud.notebooks_v2 import NotebookServiceClient
from google.cloud.notebooks_v2.types import Instance, State

from tests.servers.notebooks import NotebooksServer

PARENT = "projects/my-project/locations/us-central1-a"
IMAGE = {"containerImage": {"repository": "gcr.io/p/mine", "tag": "1"}}


@pytest.fixture
def server() -> Iterator[NotebooksServer]:
    with NotebooksServer() as found:
        yield found


@pytest.fixture
def client(server: NotebooksServer) -> NotebookServiceClient:
    return NotebookServiceClient(
        transport="rest", credentials=AnonymousCredentials(), client_options={"api_endpoint": server.address}
    )


def instance(**setup: Any) -> Instance:
    return Instance(gce_setup={"container_image": {"repository": "gcr.io/p/mine", "tag": "1"}, **setup})


def test_googles_client_makes_starts_stops_lists_and_deletes(
    server: NotebooksServer, client: NotebookServiceClient
) -> None:
    made = client.create_instance(parent=PARENT, instance=instance(), instance_id="cat").result(timeout=60)
    assert (made.name, made.state) == (f"{PARENT}/instances/cat", State.ACTIVE)
    assert made.proxy_uri.endswith("us-central1.notebooks.googleusercontent.com")
    assert [one.name for one in client.list_instances(parent="projects/my-project/locations/-")] == [made.name]
    assert client.stop_instance({"name": made.name}).result(timeout=60).state == State.STOPPED
    assert client.start_instance({"name": made.name}).result(timeout=60).state == State.ACTIVE
    client.delete_instance(name=made.name).result(timeout=60)
    with pytest.raises(api.NotFound):
        client.get_instance(name=made.name)


def test_an_order_in_the_wrong_state_or_meanwhile_is_refused(
    server: NotebooksServer, client: NotebookServiceClient
) -> None:
    name = server.put("cat")
    with pytest.raises(api.BadRequest, match="is in state ACTIVE"):
        client.start_instance({"name": name})
    client.stop_instance({"name": name})
    with pytest.raises(api.Conflict, match="unable to queue the operation"):
        client.delete_instance(name=name)


def test_a_request_that_comes_again_makes_nothing_twice(server: NotebooksServer, client: NotebookServiceClient) -> None:
    request = {"parent": PARENT, "instance": instance(), "instance_id": "cat",
               "request_id": "7c1b1a86-3d4a-4d43-9a5c-9e9a5b1b2a10"}  # fmt: skip
    first, second = (client.create_instance(request).operation.name for _ in range(2))
    assert first == second
    with pytest.raises(api.Conflict, match="already exists"):
        client.create_instance(parent=PARENT, instance=instance(), instance_id="cat")


def post(server: NotebooksServer, body: dict[str, Any], query: str = "instanceId=cat", parent: str = PARENT) -> Any:
    return requests.post(f"{server.address}/v2/{parent}/instances?{query}", json=body, timeout=10)


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ({**IMAGE, "colour": "red"}, 'Unknown name "colour"'),
        ({**IMAGE, "machineType": 4}, "Invalid value at 'instance.gce_setup.machine_type'"),
        ({**IMAGE, "acceleratorConfigs": [{"type": "NVIDIA_H200_141GB", "coreCount": "1"}]}, "NVIDIA_H200_141GB"),
        ({**IMAGE, "acceleratorConfigs": [{"type": "NVIDIA_L4"}, {"type": "NVIDIA_L4"}]}, "supports only one"),
        ({**IMAGE, "gpuDriverConfig": {"enableGpuDriver": True}}, "only applicable to instances with GPUs"),
        ({**IMAGE, "bootDisk": {"diskSizeGb": "70000"}}, "between 10 and 64000"),
        ({**IMAGE, "bootDisk": {"diskType": "FLOPPY"}}, "FLOPPY"),
        ({**IMAGE, "dataDisks": [{"kmsKey": "k"}]}, "only applicable if disk_encryption is CMEK"),
        ({**IMAGE, "metadata": {"idle-timeout-seconds": "3h"}}, "must be an integer"),
        ({**IMAGE, "networkInterfaces": [{"network": "vpc"}]}, "vpc is not of its form"),
        ({"containerImage": {"repository": "gcr.io/p/mine:1"}}, "without a tag"),
        ({**IMAGE, "vmImage": {"project": "p", "family": "f"}}, "should not have multiple"),
    ],
)
def test_what_the_service_refuses_is_refused(setup: dict[str, Any], words: str, server: NotebooksServer) -> None:
    answer = post(server, {"gceSetup": setup})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert not server.instances


def test_the_rest_of_the_request_is_checked_too(server: NotebooksServer) -> None:
    body = {"gceSetup": IMAGE}
    assert post(server, body, "instanceId=Cat").status_code == 400
    assert post(server, body, "instanceId=cat&requestId=1").status_code == 400
    assert post(server, body, "instanceId=cat&colour=red").status_code == 400
    assert post(server, body, parent="projects/my-project/locations/nowhere-a").status_code == 403
    assert post(server, {**body, "labels": {"Team": "art"}}).status_code == 400
    assert post(server, {**body, "instanceOwners": ["a@b.c", "d@e.f"]}).status_code == 400
    assert requests.get(f"{server.address}/v2/{PARENT}/runtimes", timeout=10).status_code == 404
    assert not server.instances
    # An output that is sent along, as gcloud does, is not read.
    assert post(server, {**body, "name": "x", "state": "DELETED"}).status_code == 200
    (made,) = server.instances.values()
    assert (made["name"], made["state"]) == (f"{PARENT}/instances/cat", "INITIALIZING")
