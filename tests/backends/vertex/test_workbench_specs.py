"""The request that makes an instance, and what is read of one that is there."""

from __future__ import annotations

from typing import Any

import yaml

from sdtune import __version__
from sdtune.backends.vertex.workbench_specs import as_text, create_request, gcloud_words, record_of
from sdtune.jobs.placement import Placement
from sdtune.jobs.workbench import InstanceSpec, WorkbenchSettings

KEY = "projects/p/locations/us-central1/keyRings/r/cryptoKeys/k"


def request(zone: str = "us-central1-a", placement: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    settings = WorkbenchSettings.from_settings(given)
    where = Placement(project="my-project", **(placement or {}))
    return create_request(InstanceSpec("cat", settings, where, settings.choose_machine(), (zone,), "run-1"), zone)


def test_a_plain_instance() -> None:
    assert request(image="kohya", gpu="t4") == {
        "parent": "projects/my-project/locations/us-central1-a",
        "instanceId": "cat",
        "instance": {
            "gceSetup": {
                "machineType": "n1-standard-8",
                "containerImage": {
                    "repository": "us-central1-docker.pkg.dev/my-project/sdtune/sdtune-kohya-workbench",
                    "tag": __version__,
                },
                "bootDisk": {"diskSizeGb": "150", "diskType": "PD_BALANCED"},
                "dataDisks": [{"diskSizeGb": "100", "diskType": "PD_BALANCED"}],
                "acceleratorConfigs": [{"type": "NVIDIA_TESLA_T4", "coreCount": "1"}],
                "gpuDriverConfig": {"enableGpuDriver": True},
                "metadata": {"idle-timeout-seconds": "10800", "container-allow-fuse": "true"},
            },
            "labels": {
                "sdtune": __version__.replace(".", "-"), "sdtune-run": "run-1", "sdtune-image": "kohya",
            },
        },
    }  # fmt: skip


def test_everything_that_can_be_set_is_in_it() -> None:
    found = request(
        "europe-west4-b", {"region": ("us-central1",), "service_account": "nb@my-project.iam.gserviceaccount.com",
                           "labels": ("team=art",), "kms_key": KEY},
        gpu="a100", gpus=2, boot_disk_gb=200, data_disk_gb=300, disk_type="pd-ssd", idle_shutdown="off", fuse=False,
        owner="ann@example.com", network="vpc", subnet="lan", public_ip=False,
    )["instance"]  # fmt: skip
    setup = found["gceSetup"]
    assert setup["machineType"] == "a2-highgpu-2g"
    encrypted = {"diskType": "PD_SSD", "diskEncryption": "CMEK", "kmsKey": KEY}
    assert setup["bootDisk"] == {"diskSizeGb": "200", **encrypted}
    assert setup["dataDisks"] == [{"diskSizeGb": "300", **encrypted}]
    # Left out, idle shutdown would be on: three hours are the service's own.
    assert setup["metadata"] == {"idle-timeout-seconds": ""}
    assert setup["networkInterfaces"] == [
        {
            "network": "projects/my-project/global/networks/vpc",
            "subnet": "projects/my-project/regions/europe-west4/subnetworks/lan",
        }
    ]
    assert setup["disablePublicIp"] is True
    assert setup["serviceAccounts"] == [{"email": "nb@my-project.iam.gserviceaccount.com"}]
    assert found["instanceOwners"] == ["ann@example.com"]
    assert found["labels"]["team"] == "art"


def test_full_names_of_networks_stay_as_they_are() -> None:
    network, subnet = "projects/host/global/networks/vpc", "projects/host/regions/us-central1/subnetworks/lan"
    setup = request(network=network, subnet=subnet)["instance"]["gceSetup"]
    assert setup["networkInterfaces"] == [{"network": network, "subnet": subnet}]


def test_a_machine_without_a_gpu_gets_no_driver() -> None:
    setup = request(gpu="none")["instance"]["gceSetup"]
    assert not {"acceleratorConfigs", "gpuDriverConfig"} & set(setup)


def test_an_image_of_the_users_has_no_label_of_ours() -> None:
    found = request(image="gcr.io/p/mine:2")["instance"]
    assert found["gceSetup"]["containerImage"] == {"repository": "gcr.io/p/mine", "tag": "2"}
    assert set(found["labels"]) == {"sdtune", "sdtune-run"}


def test_the_text_is_the_request_and_a_command() -> None:
    rendered = request(idle_shutdown="off")
    text = as_text(rendered, "https://notebooks.googleapis.com/")
    head, command, *_ = text.splitlines()
    url = "https://notebooks.googleapis.com/v2/projects/my-project/locations/us-central1-a/instances?instanceId=cat"
    assert head == f"# POST {url}"
    assert command.startswith("# By hand: gcloud workbench instances create cat --project=my-project")
    assert "--metadata=idle-timeout-seconds=,container-allow-fuse=true" in gcloud_words(rendered)
    assert yaml.safe_load(text) == rendered["instance"]


INSTANCE = {
    "name": "projects/my-project/locations/us-central1-b/instances/cat", "state": "ACTIVE", "healthState": "UNHEALTHY",
    "proxyUri": "0a-dot-us-central1.notebooks.googleusercontent.com", "createTime": "2026-11-25T10:00:00.123456789Z",
    "gceSetup": {
        "machineType": "https://www.googleapis.com/compute/v1/projects/p/zones/us-central1-b/machineTypes/n1-standard-8",
        "acceleratorConfigs": [{"type": "NVIDIA_TESLA_T4", "coreCount": "2"}],
        "containerImage": {"repository": "gcr.io/p/mine"}, "metadata": {"idle-timeout-seconds": "600"},
    },
    "labels": {"sdtune": "0-1-0", "sdtune-run": "run-1"},
}  # fmt: skip


def test_what_comes_back_is_read() -> None:
    found = record_of(INSTANCE)
    assert (found.name, found.zone, found.state) == ("cat", "us-central1-b", "active")
    assert found.url == "https://0a-dot-us-central1.notebooks.googleusercontent.com"
    assert (found.image, found.machine_type) == ("gcr.io/p/mine:latest", "n1-standard-8")
    assert (found.gpu, found.gpus) == ("NVIDIA_TESLA_T4", 2)
    assert (found.version, found.run_id, found.idle_shutdown) == ("0-1-0", "run-1", 600)
    assert found.unhealthy
    assert found.created
    assert found.created.hour == 10


def test_a_stopped_instance_has_no_address_although_the_service_keeps_it() -> None:
    found = record_of({**INSTANCE, "state": "STOPPED"})
    assert (found.url, found.unhealthy, found.is_ready) == ("", False, False)


def test_of_anothers_instance_little_need_be_known() -> None:
    found = record_of({"name": INSTANCE["name"], "gceSetup": {"vmImage": {"project": "x"}}})
    assert (found.state, found.version, found.image, found.created) == ("state_unspecified", "", "", None)
    # Where nothing is said of it, the service stops it after three hours.
    assert found.idle_shutdown == 10_800
    assert record_of({**INSTANCE, "gceSetup": {"metadata": {"idle-timeout-seconds": ""}}}).idle_shutdown is None
