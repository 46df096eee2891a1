"""A Workbench instance as the Notebooks API (version 2) is sent it, and as it comes back. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import yaml

from sdtune import __version__
from sdtune.backends.vertex.specs import RUN_LABEL, VERSION_LABEL, as_label
from sdtune.jobs.workbench import InstanceRecord, InstanceSpec, region_of

IMAGE_LABEL = "sdtune-image"
IDLE = "idle-timeout-seconds"
"""Left out, it would be the service's three hours; empty, it is off."""
FUSE = "container-allow-fuse"
Instance = Mapping[str, Any]


def create_request(spec: InstanceSpec, zone: str) -> dict[str, Any]:
    """The three parts of the request that makes the instance: where, under which name, and what."""
    settings, placement = spec.settings, spec.placement
    optional = {
        "acceleratorConfigs": _accelerators(spec),
        "gpuDriverConfig": {"enableGpuDriver": True} if spec.machine.accelerator_type else None,
        "networkInterfaces": _network(spec, zone),
        "disablePublicIp": not settings.public_ip,
        "serviceAccounts": [{"email": placement.service_account}] if placement.service_account else None,
    }
    instance: dict[str, Any] = {
        "gceSetup": {
            "machineType": spec.machine.machine_type,
            "containerImage": {"repository": spec.repository, "tag": spec.tag},
            "bootDisk": _disk(spec, settings.boot_disk_gb),
            "dataDisks": [_disk(spec, settings.data_disk_gb)],
            **{name: value for name, value in optional.items() if value},
            "metadata": {
                IDLE: "" if settings.idle_shutdown is None else str(settings.idle_shutdown),
                **({FUSE: "true"} if settings.fuse else {}),
            },
        },
        "labels": {**_labels(spec), **placement.label_pairs},
    }
    if settings.owner:
        instance["instanceOwners"] = [settings.owner]
    return {
        "parent": f"projects/{placement.project}/locations/{zone}",
        "instanceId": spec.name,
        "instance": instance,
    }


def _accelerators(spec: InstanceSpec) -> list[dict[str, Any]]:
    machine = spec.machine
    # 64-bit integers are texts in Google's JSON.
    return (
        [{"type": machine.accelerator_type, "coreCount": str(machine.accelerator_count)}]
        if machine.accelerator_type
        else []
    )


def _disk(spec: InstanceSpec, size: int) -> dict[str, Any]:
    disk = {"diskSizeGb": str(size), "diskType": spec.settings.disk_type.upper().replace("-", "_")}
    key = spec.placement.kms_key
    return {**disk, "diskEncryption": "CMEK", "kmsKey": key} if key else disk


def _network(spec: InstanceSpec, zone: str) -> list[dict[str, str]]:
    """The interface; what was given by its name alone is one of the project, and of the zone's region."""
    project, settings = spec.placement.project, spec.settings
    starts = {
        "network": (settings.network, f"projects/{project}/global/networks"),
        "subnet": (settings.subnet, f"projects/{project}/regions/{region_of(zone)}/subnetworks"),
    }
    found = {name: value if "/" in value else f"{start}/{value}" for name, (value, start) in starts.items() if value}
    return [found] if found else []


def _labels(spec: InstanceSpec) -> dict[str, str]:
    made = {VERSION_LABEL: as_label(__version__), RUN_LABEL: spec.run_id}
    return made | ({IMAGE_LABEL: spec.container} if spec.container else {})


def gcloud_words(rendered: Mapping[str, Any]) -> list[str]:
    """The command of gcloud that asks for the same."""
    instance, setup = rendered["instance"], rendered["instance"]["gceSetup"]
    _, project, _, zone = rendered["parent"].split("/")
    image, boot, (data,) = setup["containerImage"], setup["bootDisk"], setup["dataDisks"]
    words = [
        "gcloud", "workbench", "instances", "create", rendered["instanceId"], f"--project={project}",
        f"--location={zone}", f"--machine-type={setup['machineType']}",
        f"--container-repository={image['repository']}", f"--container-tag={image['tag']}",
    ]  # fmt: skip
    for kind, disk in (("boot", boot), ("data", data)):
        words += [f"--{kind}-disk-size={disk['diskSizeGb']}", f"--{kind}-disk-type={disk['diskType']}"]
        if "kmsKey" in disk:
            words += [f"--{kind}-disk-encryption=CMEK", f"--{kind}-disk-kms-key={disk['kmsKey']}"]
    for gpu in setup.get("acceleratorConfigs", ()):
        words += [f"--accelerator-type={gpu['type']}", f"--accelerator-core-count={gpu['coreCount']}"]
    if setup.get("gpuDriverConfig"):
        words.append("--install-gpu-driver")
    for interface in setup.get("networkInterfaces", ()):
        words += [f"--{name}={value}" for name, value in interface.items()]
    words += ["--disable-public-ip"] if setup.get("disablePublicIp") else []
    words += [f"--service-account-email={account['email']}" for account in setup.get("serviceAccounts", ())]
    words += [f"--instance-owners={owner}" for owner in instance.get("instanceOwners", ())]
    for option, pairs in (("metadata", setup["metadata"]), ("labels", instance["labels"])):
        words.append(f"--{option}=" + ",".join(f"{name}={value}" for name, value in pairs.items()))
    return words


def as_text(rendered: Mapping[str, Any], address: str) -> str:
    """The request for people. address: of the service."""
    body = yaml.safe_dump(rendered["instance"], sort_keys=False, allow_unicode=True, width=1_000_000)
    where = f"{address}v2/{rendered['parent']}/instances?instanceId={rendered['instanceId']}"
    return f"# POST {where}\n# By hand: {shlex.join(gcloud_words(rendered))}\n{body}".rstrip()


# --- what comes back -------------------------------------------------------------------------------------------------


def record_of(instance: Instance) -> InstanceRecord:
    """An instance as the API describes it."""
    setup = instance.get("gceSetup", {})
    gpu: Instance = next(iter(setup.get("acceleratorConfigs", ())), {})
    image, labels = setup.get("containerImage", {}), instance.get("labels", {})
    created, uri = instance.get("createTime"), instance.get("proxyUri", "")
    state = state_of(instance)
    return InstanceRecord(
        instance_id=instance["name"],
        state=state,
        # The address stays when the machine has gone.
        url=(uri if uri.startswith("https://") else f"https://{uri}") if uri and state == "active" else "",
        image=f"{image['repository']}:{image.get('tag') or 'latest'}" if image else "",
        machine_type=setup.get("machineType", "").rpartition("/")[2],
        gpu=gpu.get("type", ""),
        gpus=int(gpu.get("coreCount") or 0),
        created=datetime.fromisoformat(created) if created else None,
        version=labels.get(VERSION_LABEL, ""),
        run_id=labels.get(RUN_LABEL, ""),
        idle_shutdown=_seconds(setup.get("metadata", {}).get(IDLE, "10800")),
        unhealthy=state == "active" and instance.get("healthState") == "UNHEALTHY",
    )


def state_of(instance: Instance) -> str:
    """``active``, ``stopped`` ..."""
    return str(instance.get("state", "STATE_UNSPECIFIED")).lower()


def _seconds(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d+", text) else None
