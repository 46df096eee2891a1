"""What Vertex AI refuses in a custom job, and how it says so.

The table of machines and the limits are written from Google's documents anew and share nothing with sdtune's own, so
that each checks the other. Wordings that are known from users' reports: labels, machine and accelerator, required
fields. Of the others only the form is known, a list of fields and messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from google.cloud.aiplatform_v1.types import AcceleratorType, CustomJob, Scheduling

from tests.servers.vertex_json import ApiError, Violation, bad_request

# acceleratorCount that a machine type of the n1 family can have, by accelerator. "-": none.
N1 = """
machine          T4     P4     P100   V100
n1-standard-4    1,2,4  1,2,4  1,2,4  1,2,4,8
n1-standard-8    1,2,4  1,2,4  1,2,4  1,2,4,8
n1-standard-16   1,2,4  1,2,4  1,2,4  2,4,8
n1-standard-32   2,4    2,4    2,4    4,8
n1-standard-64   4      4      -      8
n1-standard-96   4      4      -      8
n1-highmem-2     1,2,4  1,2,4  1,2,4  1,2,4,8
n1-highmem-4     1,2,4  1,2,4  1,2,4  1,2,4,8
n1-highmem-8     1,2,4  1,2,4  1,2,4  1,2,4,8
n1-highmem-16    1,2,4  1,2,4  1,2,4  2,4,8
n1-highmem-32    2,4    2,4    2,4    4,8
n1-highmem-64    4      4      -      8
n1-highmem-96    4      4      -      8
n1-highcpu-16    1,2,4  1,2,4  1,2,4  2,4,8
n1-highcpu-32    2,4    2,4    2,4    4,8
n1-highcpu-64    4      4      4      8
n1-highcpu-96    4      4      -      8
"""
# Machine types that come with their accelerators.
ACCELERATED = {
    "NVIDIA_L4": {"g2-standard-4": 1, "g2-standard-8": 1, "g2-standard-12": 1, "g2-standard-16": 1,
                  "g2-standard-32": 1, "g2-standard-24": 2, "g2-standard-48": 4, "g2-standard-96": 8},
    "NVIDIA_TESLA_A100": {"a2-highgpu-1g": 1, "a2-highgpu-2g": 2, "a2-highgpu-4g": 4, "a2-highgpu-8g": 8,
                          "a2-megagpu-16g": 16},
    "NVIDIA_A100_80GB": {"a2-ultragpu-1g": 1, "a2-ultragpu-2g": 2, "a2-ultragpu-4g": 4, "a2-ultragpu-8g": 8},
    "NVIDIA_H100_80GB": {"a3-highgpu-1g": 1, "a3-highgpu-2g": 2, "a3-highgpu-4g": 4, "a3-highgpu-8g": 8},
    "NVIDIA_H100_MEGA_80GB": {"a3-megagpu-8g": 8},
    "NVIDIA_H200_141GB": {"a3-ultragpu-8g": 8},
    "NVIDIA_B200": {"a4-highgpu-8g": 8},
    "NVIDIA_RTX_PRO_6000": {"g4-standard-48": 1, "g4-standard-96": 2, "g4-standard-192": 4, "g4-standard-384": 8},
}  # fmt: skip
FLEX_START = {
    "NVIDIA_L4", "NVIDIA_TESLA_A100", "NVIDIA_A100_80GB", "NVIDIA_H100_80GB", "NVIDIA_H100_MEGA_80GB",
    "NVIDIA_H200_141GB", "NVIDIA_B200",
}  # fmt: skip
CPU_ONLY = re.compile(
    r"e2-(standard-(4|8|16|32)|highmem-(2|4|8|16)|highcpu-(16|32))|c2-standard-(4|8|16|30|60)"
    r"|n2-(standard-(4|8|16|32|48|64|80|96|128)|highmem-(2|4|8|16|32|48|64|80|96|128)|highcpu-(16|32|48|64|80|96))"
)
DISK_TYPES = {"", "pd-ssd", "pd-standard", "hyperdisk-balanced"}
REGIONS = {
    f"{area}{number}"
    for area, numbers in {
        "africa-south": (1,), "asia-east": (1, 2), "asia-northeast": (1, 2, 3), "asia-south": (1,),
        "asia-southeast": (1, 2), "australia-southeast": (1, 2), "europe-central": (2,), "europe-north": (1,),
        "europe-southwest": (1,), "europe-west": (1, 2, 3, 4, 6, 8, 9, 12), "me-central": (1, 2), "me-west": (1,),
        "northamerica-northeast": (1, 2), "southamerica-east": (1,), "southamerica-west": (1,), "us-central": (1,),
        "us-east": (1, 4, 5), "us-south": (1,), "us-west": (1, 2, 3, 4),
    }.items()
    for number in numbers
}  # fmt: skip
LABELS = (
    "There can be no more than 64 labels attached to a single resource. Label keys and values can only contain "
    "lowercase letters, numbers, dashes and underscores. Label keys must start with a letter or number, must be less "
    "than 64 characters in length, and must be less that 128 bytes in length when encoded in UTF-8. Label values must "
    "be less than 64 characters in length, and must be less that 128 bytes in length when encoded in UTF-8."
)
PERSISTENT_RESOURCE = (
    "persistent_resource_id can only contain numbers, lower case letters and hyphens. The first character must be a "
    "letter, and the last character must be a letter or number."
)
DAY = 86_400


def _n1_counts() -> dict[str, dict[str, set[int]]]:
    (_, *columns), *rows = [line.split() for line in N1.split("\n") if line]
    return {
        machine: {
            f"NVIDIA_TESLA_{column}": set() if counts == "-" else {int(count) for count in counts.split(",")}
            for column, counts in zip(columns, cells, strict=True)
        }
        for machine, *cells in rows
    }


N1_COUNTS = _n1_counts()


def counts_of(machine: str, accelerator: str) -> set[int]:
    """How many of the accelerator the machine type can have; empty: not together."""
    if machine in N1_COUNTS:
        return N1_COUNTS[machine].get(accelerator, set())
    count = ACCELERATED.get(accelerator, {}).get(machine)
    return {count} if count else set()


def is_machine(machine: str) -> bool:
    return machine in N1_COUNTS or bool(CPU_ONLY.fullmatch(machine)) or comes_with(machine) is not None


def comes_with(machine: str) -> str | None:
    """The accelerator that is part of the machine type."""
    return next((name for name, machines in ACCELERATED.items() if machine in machines), None)


def check(job: Any, region: str, project_number: str) -> None:
    """ApiError if Vertex AI would refuse the job: a CustomJob message of protobuf."""
    found = [*_job_mistakes(job, region), *_pools_mistakes(job.job_spec), *_spec_mistakes(job.job_spec, region)]
    if found:
        listed = "\t".join(f"{number}.Field: {field}; Message: {text}" for number, (field, text) in enumerate(found, 1))
        raise bad_request(f"List of found errors:\t{listed}\t", found)
    for pool in job.job_spec.worker_pool_specs:
        _check_machine(pool.machine_spec)


def _job_mistakes(job: Any, region: str) -> Iterator[Violation]:
    if not job.display_name:
        yield "custom_job.display_name", "Required field is not set."
    if len(job.display_name) > 128:
        yield "custom_job.display_name", "The length must be at most 128 characters."
    key, value = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}"), re.compile(r"[a-z0-9_-]{0,63}")
    wrong = [name for name in job.labels if not key.fullmatch(name) or not value.fullmatch(job.labels[name])]
    if wrong or len(job.labels) > 64:
        yield "custom_job.labels", LABELS
    kms_key = job.encryption_spec.kms_key_name
    if kms_key and not re.fullmatch(rf"projects/[^/]+/locations/{region}/keyRings/[^/]+/cryptoKeys/[^/]+", kms_key):
        wanted = f"projects/PROJECT/locations/{region}/keyRings/RING/cryptoKeys/KEY"
        yield "custom_job.encryption_spec.kms_key_name", f"The key must be in the region of the job: {wanted}."


def _pools_mistakes(spec: Any) -> Iterator[Violation]:
    pools = spec.worker_pool_specs
    if not pools:
        yield "job_spec.worker_pool_specs", "Required field is not set."
    if len(pools) > 4:
        yield "job_spec.worker_pool_specs", "There can be no more than 4 worker pools."
    for number, pool in enumerate(pools):
        at = f"job_spec.worker_pool_specs[{number}]"
        if number and not pool.ByteSize():
            continue  # a pool that is left out
        if number == 0 and pool.replica_count != 1:
            yield f"{at}.replica_count", "The replica count of the first worker pool must be 1."
        if pool.replica_count < 1 and number:
            yield f"{at}.replica_count", "The replica count must be greater than 0."
        yield from _task_mistakes(pool, at)
        yield from _machine_mistakes(pool, at, bool(spec.persistent_resource_id))
        for one, mount in enumerate(pool.nfs_mounts):
            yield from _mount_mistakes(mount, f"{at}.nfs_mounts[{one}]")
        if pool.nfs_mounts and not spec.network:
            yield f"{at}.nfs_mounts", "NFS mounts need the network of the job: job_spec.network is not set."


def _task_mistakes(pool: Any, at: str) -> Iterator[Violation]:
    if pool.WhichOneof("task") != "container_spec":
        yield f"{at}.container_spec", "Required field is not set."
        return
    container = pool.container_spec
    if not container.image_uri:
        yield f"{at}.container_spec.image_uri", "Required field is not set."
    elif not re.fullmatch(r"[a-z0-9][\w./-]*(:\d+/[\w./-]+)?(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", container.image_uri):
        yield f"{at}.container_spec.image_uri", f"{container.image_uri} is no valid image URI."
    if len(container.env) > 100:
        yield f"{at}.container_spec.env", "There can be no more than 100 environment variables."
    names = [variable.name for variable in container.env]
    for one, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"{at}.container_spec.env[{one}].name", f"{name!r} is no valid C identifier."
    if len(set(names)) < len(names):
        yield f"{at}.container_spec.env", "EnvVar names must be unique."


def _machine_mistakes(pool: Any, at: str, persistent: bool) -> Iterator[Violation]:
    machine, disk = pool.machine_spec, pool.disk_spec
    if not machine.machine_type and not persistent:
        yield f"{at}.machine_spec.machine_type", "Required field is not set."
    if bool(machine.accelerator_type) != bool(machine.accelerator_count):
        unset = "accelerator_type" if machine.accelerator_count else "accelerator_count"
        yield f"{at}.machine_spec.{unset}", "accelerator_type and accelerator_count must be set together."
    if machine.accelerator_count < 0:
        yield f"{at}.machine_spec.accelerator_count", "The accelerator count must not be negative."
    reserved = machine.reservation_affinity
    if bool(reserved.key) != bool(reserved.values) or (reserved.reservation_affinity_type == 3) != bool(reserved.key):
        text = "key and values must be set for SPECIFIC_RESERVATION, and for nothing else."
        yield f"{at}.machine_spec.reservation_affinity", text
    if disk.boot_disk_type not in DISK_TYPES:
        yield f"{at}.disk_spec.boot_disk_type", f"Boot disk type {disk.boot_disk_type} is not supported."
    if pool.HasField("disk_spec") and disk.boot_disk_size_gb and not 100 <= disk.boot_disk_size_gb <= 64_000:
        yield f"{at}.disk_spec.boot_disk_size_gb", "The size of the boot disk must be between 100 and 64000 GB."


def _mount_mistakes(mount: Any, at: str) -> Iterator[Violation]:
    if not re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", mount.server):
        yield f"{at}.server", "The server must be an IP address."
    if not mount.path.startswith("/"):
        yield f"{at}.path", "The path must start with /."
    if not re.fullmatch(r"(/mnt/nfs/)?\w[\w.-]*", mount.mount_point, re.ASCII):
        yield f"{at}.mount_point", "The mount point must be a name below /mnt/nfs/."


def _spec_mistakes(spec: Any, region: str) -> Iterator[Violation]:
    if spec.network and not re.fullmatch(r"projects/\d+/global/networks/[a-z][a-z0-9-]*", spec.network):
        text = "The network must be projects/PROJECT_NUMBER/global/networks/NAME, with the number of the project."
        yield "job_spec.network", text
    if spec.reserved_ip_ranges and not spec.network:
        yield "job_spec.reserved_ip_ranges", "Reserved IP ranges need a network."
    if spec.psc_interface_config.ByteSize() and spec.network:
        yield "job_spec.psc_interface_config", "Only one of network and psc_interface_config can be set."
    output = spec.base_output_directory.output_uri_prefix
    if spec.HasField("base_output_directory") and not re.fullmatch(r"gs://[a-z0-9][\w.-]+[a-z0-9](/.*)?", output):
        yield (
            "job_spec.base_output_directory.output_uri_prefix",
            "It must be a path in Cloud Storage: gs://BUCKET/PATH.",
        )
    if spec.service_account and not re.fullmatch(r"[^@\s]+@[^@\s]+\.[a-z]+", spec.service_account):
        yield "job_spec.service_account", "It must be the email address of a service account."
    if spec.tensorboard and not re.fullmatch(rf"projects/[^/]+/locations/{region}/tensorboards/\w+", spec.tensorboard):
        wanted = f"projects/PROJECT/locations/{region}/tensorboards/ID"
        yield "job_spec.tensorboard", f"The Tensorboard must be in the region of the job: {wanted}."
    if spec.tensorboard and not spec.service_account:
        yield "job_spec.service_account", "A service account is required when a Tensorboard is specified."
    name = spec.persistent_resource_id
    if name and not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        yield "job_spec.persistent_resource_id", PERSISTENT_RESOURCE
    yield from _scheduling_mistakes(spec)


def _scheduling_mistakes(spec: Any) -> Iterator[Violation]:
    scheduling, at = spec.scheduling, "job_spec.scheduling"
    flexible = scheduling.strategy == Scheduling.Strategy.FLEX_START
    if scheduling.HasField("timeout") and scheduling.timeout.seconds <= 0:
        yield f"{at}.timeout", "The timeout must be positive."
    if scheduling.HasField("max_wait_duration") and not flexible:
        yield f"{at}.max_wait_duration", "max_wait_duration can only be set with the strategy FLEX_START."
    if scheduling.max_wait_duration.seconds < 0:
        yield f"{at}.max_wait_duration", "It must not be negative."
    if not flexible:
        return
    if scheduling.timeout.seconds > 7 * DAY:
        yield f"{at}.timeout", "The timeout must be at most 7 days with the strategy FLEX_START."
    machines = [pool.machine_spec for pool in spec.worker_pool_specs if pool.ByteSize()]
    if any(machine.SerializeToString() != machines[0].SerializeToString() for machine in machines):
        yield f"{at}.strategy", "All worker pools must have the same machine with the strategy FLEX_START."
    for accelerator in sorted({AcceleratorType(machine.accelerator_type).name for machine in machines}):
        if accelerator not in FLEX_START:
            yield f"{at}.strategy", f"The strategy FLEX_START does not support {accelerator}."


def _check_machine(spec: Any) -> None:
    """400 in the service's own words, which name machine type and accelerator and no field."""
    machine, accelerator = spec.machine_type, AcceleratorType(spec.accelerator_type).name
    if not machine:
        return
    if not is_machine(machine):
        raise ApiError(400, f'Machine type "{machine}" is not supported.')
    if not spec.accelerator_type:
        if wanted := comes_with(machine):
            raise ApiError(400, f'Machine type "{machine}" requires accelerator "{wanted}".')
        return
    counts = counts_of(machine, accelerator)
    if not counts:
        raise ApiError(400, f'Accelerator "{accelerator}" is not supported for machine type "{machine}".')
    if spec.accelerator_count not in counts:
        raise ApiError(
            400,
            f'Accelerator count {spec.accelerator_count} is not supported for accelerator "{accelerator}" and machine '
            f'type "{machine}".',
        )


def quota_use(spec: Any) -> dict[str, int]:
    """How much of which quota a job takes, by the metric's name."""
    cheap = spec.scheduling.strategy in (
        Scheduling.Strategy.SPOT, Scheduling.Strategy.FLEX_START, Scheduling.Strategy.LOW_COST
    )  # fmt: skip
    start = "custom_model_training_" + ("preemptible_" if cheap else "")
    used: dict[str, int] = {}
    for pool in spec.worker_pool_specs:
        machine = pool.machine_spec
        if machine.accelerator_type:
            name = AcceleratorType(machine.accelerator_type).name.lower()
            name = name.replace("tesla_", "").replace("h100_80gb", "h100").replace("mega_80gb", "mega")
            metric = f"{start}{name.replace('h200_141gb', 'h200')}_gpus"
            used[metric] = used.get(metric, 0) + machine.accelerator_count * pool.replica_count
        if vcpus := re.fullmatch(r"\w+-\w+-(\d+)", machine.machine_type):
            used[f"{start}cpus"] = used.get(f"{start}cpus", 0) + int(vcpus[1]) * pool.replica_count
    return used


def outputs_cleared(job: Any) -> Any:
    """The job without what only the service may set: a client that sends it is not heard, and not refused."""
    outputs = ("name", "state", "create_time", "start_time", "end_time", "update_time", "error", "web_access_uris")
    for name in (*outputs, "satisfies_pzs", "satisfies_pzi"):
        job.ClearField(name)
    return job


def new_job() -> Any:
    """An empty CustomJob, as protobuf's own message: proto-plus would hide which fields are set."""
    return CustomJob.pb(CustomJob())
