"""What the Notebooks API refuses of an instance at once: by its published messages, and by the comments in them."""

from __future__ import annotations

import copy
import re
from typing import Any

from google.cloud.notebooks_v2 import types

from tests.servers.vertex_json import bad_request, parse

NEWER_GPUS = {"NVIDIA_H100_80GB", "NVIDIA_H100_MEGA_80GB"}
"""In the API's discovery document, and not yet in the library's messages."""


def check(body: dict[str, Any]) -> None:
    """ApiError, with all mistakes of ``body``."""
    known = copy.deepcopy(body)
    for gpu in known.get("gceSetup", {}).get("acceleratorConfigs", []):
        if gpu.get("type") in NEWER_GPUS:
            gpu["type"] = "NVIDIA_L4"
    message = types.Instance.pb()()
    parse(known, message, "instance")
    setup = message.gce_setup
    wrong: list[tuple[str, str]] = []
    for name in ("accelerator_configs", "data_disks", "network_interfaces", "service_accounts"):
        if len(getattr(setup, name)) > 1:
            wrong.append((f"instance.gce_setup.{name}", "supports only one."))
    if len(message.instance_owners) > 1:
        wrong.append(("instance.instance_owners", "supports one owner only."))
    for disk in (setup.boot_disk, *setup.data_disks):
        if not 10 <= (disk.disk_size_gb or 100) <= 64_000:
            wrong.append(("disk_size_gb", "must be between 10 and 64000."))
        if bool(disk.kms_key) != (disk.disk_encryption == types.DiskEncryption.CMEK):
            wrong.append(("kms_key", "is only applicable if disk_encryption is CMEK."))
    if re.search(r"[@:]", setup.container_image.repository.partition("/")[2]) or "/" in setup.container_image.tag:
        wrong.append(("instance.gce_setup.container_image", "repository is an address without a tag."))
    if not re.fullmatch(r"\d*", setup.metadata.get("idle-timeout-seconds", "")):
        wrong.append(("instance.gce_setup.metadata", "idle-timeout-seconds must be an integer."))
    if setup.gpu_driver_config.enable_gpu_driver and not setup.accelerator_configs:
        wrong.append(("instance.gce_setup.gpu_driver_config", "is only applicable to instances with GPUs."))
    for key, value in message.labels.items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key) or not re.fullmatch(r"[a-z0-9_-]{0,63}", value):
            wrong.append(("instance.labels", f"{key}={value} is no label."))
    forms = {
        "network": r"projects/[^/]+/global/networks/[^/]+", "subnet": r"projects/[^/]+/regions/[^/]+/subnetworks/[^/]+",
    }  # fmt: skip
    for interface in setup.network_interfaces:
        for name, form in forms.items():
            value = getattr(interface, name)
            if value and not re.fullmatch(form, value):
                wrong.append((f"instance.gce_setup.network_interfaces.{name}", f"{value} is not of its form."))
    if wrong:
        raise bad_request("; ".join(f"{name} {text}" for name, text in wrong), wrong)
