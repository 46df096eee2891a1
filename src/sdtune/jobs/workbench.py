"""Workbench: notebooks on a machine with a GPU: how one is asked for, what is known of it, what a place must do.

A Workbench instance is a virtual machine that runs JupyterLab in one container image and is billed while it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from sdtune import __version__
from sdtune.errors import CapacityError, RecipeError
from sdtune.jobs.backend import StateChange
from sdtune.jobs.durations import parse_duration
from sdtune.jobs.images import CONTAINERS, image_name
from sdtune.jobs.machine_table import Gpu
from sdtune.jobs.machines import FORCE, Machine, choose_machine, cpu_machine, usable_gpus
from sdtune.jobs.placement import Names, Placement
from sdtune.methods.settings import Settings

WITHOUT_GPU = "none"
GPUS = ("t4", "p4", "p100", "v100", "l4", "a100", "a100-80gb", "h100", "h100-mega")
"""What Workbench has of the GPUs of Vertex AI, by their short names: AcceleratorConfig in the discovery document of
notebooks.googleapis.com, version 2."""
OTHER_ZONES = {"us-east1": "bcd", "europe-west1": "bcd"}
"""The zones of the regions in which they are not called a, b and c (cloud.google.com/compute/docs/regions-zones)."""
DiskType = Literal["pd-balanced", "pd-ssd", "pd-standard"]
_IMAGE = re.compile(r"[a-z0-9.-]+(?::\d+)?(?:/[\w.-]+)+(?::[\w.-]+)?")
_NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")


def _or_off(value: Any) -> Any:
    """Seconds, or None for ``off``. YAML reads a bare ``off`` as False."""
    return None if value is False or (isinstance(value, str) and value.strip().lower() == "off") else value


class WorkbenchSettings(Settings):
    """What kind of instance. Project, region, account, labels and key are those of jobs: see Placement."""

    name: ClassVar[str] = "workbench"

    image: Annotated[
        str,
        Field(
            description="Which of sdtune's images: diffusers or kohya; or the address of another that is built on "
            "Google's Workbench container."
        ),
    ] = "diffusers"
    gpu: Annotated[
        str | None,
        Field(description="GPU, such as t4 or l4 (sdtune machines); none: a machine without. Not given: l4."),
    ] = None
    gpus: Annotated[int | None, Field(ge=1, le=16, description="How many of them. Not given: 1, or the machine's.")] = (
        None
    )
    machine_type: Annotated[
        str | None, Field(description="Machine type. Not given: the smallest good one for the GPU.")
    ] = None
    force_machine: Annotated[
        bool, Field(description="Send a machine type or GPU that sdtune does not know, as it is.")
    ] = False
    zone: Annotated[
        Names,
        Field(
            description="Zone; repeatable or A,B: the next one where there is no such machine. Not given: those of the "
            "region."
        ),
    ] = ()
    boot_disk_gb: Annotated[
        int, Field(ge=100, le=64_000, description="Disk of the system and the image, in GB; the image takes 30.")
    ] = 150
    data_disk_gb: Annotated[
        int, Field(ge=10, le=64_000, description="Disk of /home/jupyter, which outlives a stop, in GB.")
    ] = 100
    disk_type: Annotated[DiskType, Field(description="Of both; pd-standard is the cheapest and the slowest.")] = (
        "pd-balanced"
    )
    idle_shutdown: Annotated[
        Annotated[int, Field(ge=600, le=86_400)] | None,
        BeforeValidator(parse_duration),
        BeforeValidator(_or_off),
        Field(
            description="Stop the instance when nothing has run in it for so long: 30m, 3h; off: never.",
            json_schema_extra={"metavar": "DURATION", "default": "3h"},
        ),
    ] = 10_800
    fuse: Annotated[bool, Field(description="Let the notebook mount buckets with Cloud Storage FUSE.")] = True
    owner: Annotated[
        str | None,
        Field(description="Address of the one user who may open it. Not given: all who may use its account."),
    ] = None
    network: Annotated[
        str | None, Field(description="Network: NAME or projects/P/global/networks/NAME. Not given: default.")
    ] = None
    subnet: Annotated[str | None, Field(description="Subnet of it: NAME or projects/P/regions/R/subnetworks/NAME.")] = (
        None
    )
    public_ip: Annotated[
        bool, Field(description="Give it an address of its own. Without, the subnet needs Private Google Access.")
    ] = True

    @classmethod
    def help_command(cls) -> str:
        return "sdtune workbench create --help"

    @classmethod
    def allowed(cls, field: str) -> str:
        return "a duration from 10m to 24h, or off" if field == "idle_shutdown" else super().allowed(field)

    @field_validator("image")
    @classmethod
    def _is_an_image(cls, value: str) -> str:
        if value in CONTAINERS:
            return value
        if "@" in value:
            raise ValueError(f"found {value!r}; Workbench takes no digest, only an address and a tag.")
        if not _IMAGE.fullmatch(value):
            raise ValueError(
                f"found {value!r}, wanted {' or '.join(CONTAINERS)}, or an address such as "
                "us-central1-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG."
            )
        return value

    @field_validator("gpus")
    @classmethod
    def _has_gpus(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and (info.data.get("gpu") or "").lower() == WITHOUT_GPU:
            raise ValueError(f"found {value} with --gpu none; leave one of them out.")
        return value

    @field_validator("zone")
    @classmethod
    def _are_zones(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if re.fullmatch(r"[a-z]+-[a-z]+\d+", value):
                raise ValueError(f"found {value!r}, which is a region; wanted a zone of it, such as {value}-b.")
            if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", value):
                raise ValueError(f"found {value!r}, wanted a zone, such as us-central1-a.")
        return tuple(dict.fromkeys(values))

    @field_validator("owner")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(r"[^@\s]+@[^@\s]+\.[^@\s]+", value):
            raise ValueError(f"found {value!r}, wanted an address such as ann@example.com.")
        return value

    @field_validator("network")
    @classmethod
    def _is_a_network(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(r"(?:projects/[^/]+/global/networks/)?[a-z][a-z0-9-]*", value):
            raise ValueError(f"found {value!r}, wanted NAME or projects/P/global/networks/NAME.")
        return value

    @field_validator("subnet")
    @classmethod
    def _is_a_subnet(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(r"(?:projects/[^/]+/regions/[^/]+/subnetworks/)?[a-z][a-z0-9-]*", value):
            raise ValueError(f"found {value!r}, wanted NAME or projects/P/regions/R/subnetworks/NAME.")
        return value

    def choose_machine(self) -> Machine:
        """The machine, from the same table as that of jobs. RecipeError: there is none, or Workbench has it not."""
        if (self.gpu or "").lower() == WITHOUT_GPU:
            return cpu_machine(self.machine_type)
        machine = choose_machine(self.gpu, self.gpus, self.machine_type, force=self.force_machine)
        if machine.gpu is None or self.force_machine:
            return machine
        able = [gpu.name for gpu in usable_gpus() if gpu.name in GPUS and not self._is_too_old(gpu)]
        if machine.gpu.name not in GPUS:
            raise RecipeError(
                f"gpu: Workbench has no {machine.gpu.name}, only {', '.join(able)}; use one of these, or train there "
                f"as a job: sdtune train ... --gpu {machine.gpu.name}. If Workbench has it since, {FORCE}."
            )
        if self._is_too_old(machine.gpu):
            raise RecipeError(
                f"gpu: sdtune's own images do not run on {machine.gpu.name}: {machine.gpu.own_image}; use one of "
                f"{', '.join(able)}, or give --image, one of your own."
            )
        return machine

    def _is_too_old(self, gpu: Gpu) -> bool:
        return bool(gpu.own_image) and self.image in CONTAINERS

    def zones_in(self, regions: Sequence[str]) -> tuple[str, ...]:
        """Where it may be, in the order in which that is tried."""
        return self.zone or tuple(f"{region}-{one}" for region in regions for one in OTHER_ZONES.get(region, "abc"))


def check_name(name: str) -> str:
    """``name`` if an instance can be called so. RecipeError otherwise."""
    if not _NAME.fullmatch(name):
        raise RecipeError(
            f"name: found {name!r}, wanted at most 63 lower-case letters, digits and '-', beginning with a letter and "
            "not ending with '-'."
        )
    return name


def region_of(zone: str) -> str:
    """``us-central1`` of ``us-central1-a``."""
    return zone.rpartition("-")[0]


@dataclass(frozen=True)
class InstanceSpec:
    """An instance to make. zones: tried in this order; repository, tag: its image; run_id: its mark, see new_run_id."""

    name: str
    settings: WorkbenchSettings
    placement: Placement
    machine: Machine
    zones: tuple[str, ...]
    run_id: str

    @property
    def container(self) -> str | None:
        """Which of sdtune's images; None for another."""
        return self.settings.image if self.settings.image in CONTAINERS else None

    @property
    def repository(self) -> str:
        """The image's address, without its tag."""
        if self.container is None:
            return self.settings.image.removesuffix(f":{self.tag}")
        for_jobs = self.placement.model_copy(update={"image": None}).image_of(self.container)
        return f"{for_jobs.rpartition('/')[0]}/{image_name(self.container, 'workbench')}"

    @property
    def tag(self) -> str:
        """That of this version, as jobs have it: what is called latest changes whenever an instance starts."""
        if self.container:
            return __version__
        last = self.settings.image.rpartition("/")[2]
        return last.partition(":")[2] or "latest"

    @property
    def image(self) -> str:
        """Both."""
        return f"{self.repository}:{self.tag}"


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """An instance that is there.

    instance_id: its full name; state: ``active``, ``stopped`` ...; url: where a browser opens it, empty until there is
    one; gpu: Google's name; version: of the sdtune that made it, empty for another's; run_id: see InstanceSpec;
    idle_shutdown: seconds, None where it is off; unhealthy: it runs, but something in it does not.
    """

    instance_id: str
    state: str
    url: str
    image: str
    machine_type: str
    gpu: str
    gpus: int
    created: datetime | None
    version: str
    run_id: str
    idle_shutdown: int | None
    unhealthy: bool = False

    @property
    def name(self) -> str:
        return self.instance_id.rpartition("/")[2]

    @property
    def zone(self) -> str:
        return self.instance_id.split("/")[3]

    @property
    def is_ready(self) -> bool:
        """Whether it can be opened."""
        return self.state == "active" and bool(self.url)


@dataclass(frozen=True, slots=True)
class Begun:
    """Something begins that takes minutes. doing: ``Creating``, ``Starting``, ``Stopping``, ``Deleting``."""

    doing: str
    name: str
    zone: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended. text: ``is ready``, ``is active already`` ...; record: as it is now, None once it is gone."""

    text: str
    name: str
    zone: str
    record: InstanceRecord | None


@dataclass(frozen=True, slots=True)
class Listing:
    """What is there, newest first. unreachable: zones that did not answer."""

    records: tuple[InstanceRecord, ...]
    unreachable: tuple[str, ...] = ()


class NoQuotaError(CapacityError):
    """No zone of the region has a machine for the project, whatever is free."""


class Workbenches(Protocol):
    """A place that has instances."""

    @property
    def place(self) -> str:
        """In words, for the user."""

    def render(self, spec: InstanceSpec, zone: str) -> dict[str, Any]:
        """The request, as plain data: what is sent, and no call."""
        ...

    def as_text(self, rendered: dict[str, Any]) -> str:
        """The same for people, with the command of gcloud that asks for it."""
        ...

    def instances(self, zone: str | None = None) -> Listing:
        """All of the project, or of one zone; also those that others have made."""
        ...

    def get(self, instance_id: str) -> InstanceRecord | None:
        """One by its full name; None: there is none."""
        ...

    def create(self, rendered: dict[str, Any]) -> str:
        """Make what ``render`` made, once, whatever becomes of an answer; the operation, empty where it is not known.

        CapacityError: the zone, NoQuotaError: the region has none. JobError, ProjectError: it is refused, and why.
        """
        ...

    def start(self, instance_id: str) -> str:
        """Start one that is stopped; the operation."""
        ...

    def stop(self, instance_id: str) -> str:
        """Stop one that runs; the operation."""
        ...

    def delete(self, instance_id: str) -> str:
        """Delete one, with its disks; the operation, empty where it is gone already."""
        ...

    def follow(self, instance_id: str, operation: str, until: str) -> Iterator[StateChange]:
        """Each state it passes through, until ``operation`` has ended and the state is ``until``: ``active`` with an
        address, ``stopped``, ``suspended`` or ``deleted``. Errors: as of ``create``; JobError: it takes too long.
        """
        ...
