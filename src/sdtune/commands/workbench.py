"""Workbench: instances planned, made where there is a machine, waited for, stopped, deleted."""

from __future__ import annotations

from collections.abc import Iterator

from sdtune import events
from sdtune.commands.checks import Mistakes
from sdtune.errors import CapacityError, JobError, ProjectError, RecipeError, SdtuneError
from sdtune.jobs.backend import StateChange
from sdtune.jobs.builder import Builder
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import new_run_id
from sdtune.jobs.workbench import (
    Begun,
    InstanceRecord,
    InstanceSpec,
    NoQuotaError,
    Outcome,
    Workbenches,
    WorkbenchSettings,
    check_name,
    region_of,
)

Told = Begun | StateChange | Outcome | events.Note
DONE = {"active": "is ready", "stopped": "is stopped", "suspended": "is suspended", "deleted": "is deleted"}
BEING_DONE = {
    "active": "is being started", "stopped": "is being stopped", "suspended": "is being suspended",
    "deleted": "is being deleted",
}  # fmt: skip
AT_REST_SOON = {"stopping": "stopped", "suspending": "suspended"}
"""States that end by themselves in another, which is left only when it is asked for."""


def plan_instance(name: str, settings: WorkbenchSettings, placement: Placement) -> InstanceSpec:
    """The instance that is asked for. Asks nobody. RecipeError tells all mistakes."""
    mistakes = Mistakes()
    zones = settings.zones_in(placement.region)
    with mistakes:
        check_name(name)
    with mistakes:
        machine = settings.choose_machine()
    with mistakes:
        _check_regions(zones, settings, placement)
    mistakes.raise_if_any()
    return InstanceSpec(name, settings, placement, machine, zones, new_run_id())


def _check_regions(zones: tuple[str, ...], settings: WorkbenchSettings, placement: Placement) -> None:
    """What lies in a region serves no machine in another."""
    named = {"subnet": (settings.subnet or "").split("/"), "kms_key": (placement.kms_key or "").split("/")}
    for option, parts in named.items():
        region = parts[3] if len(parts) > 3 else ""
        apart = [zone for zone in zones if region_of(zone) != region]
        if region and region != "global" and apart:
            raise RecipeError(f"{option}: is in {region}, and the instance may be in {', '.join(apart)}; give --zone.")


class CreateRun:
    """Iterate over it to make the instance; what it yields is what the user sees.

    detach: do not wait until it can be opened. instance_id: what goes on by itself if it is left; empty while there is
    nothing.
    """

    def __init__(self, spec: InstanceSpec, workbenches: Workbenches, builder: Builder, *, detach: bool = False) -> None:
        self.instance_id = ""
        self._spec, self._workbenches, self._builder, self._detach = spec, workbenches, builder, detach

    def __iter__(self) -> Iterator[Told]:
        spec, zones = self._spec, list(self._spec.zones)
        self._check_that_the_name_is_free()
        if note := image_note(self._builder, spec):
            yield events.Note(note, "warning")
        while True:
            zone = zones.pop(0)
            yield Begun("Creating", spec.name, zone)
            try:
                yield from self._create(zone)
                return
            except CapacityError as error:
                # A region that gives the project nothing gives it nothing in its other zones.
                if isinstance(error, NoQuotaError):
                    zones = [other for other in zones if region_of(other) != region_of(zone)]
                if not zones:
                    raise
                yield events.Note(f"{error} Now trying {zones[0]}.", "warning")

    def _create(self, zone: str) -> Iterator[Told]:
        rendered = self._workbenches.render(self._spec, zone)
        instance_id = f"{rendered['parent']}/instances/{rendered['instanceId']}"
        # An answer that is lost, or not waited for, may be one that says yes.
        self.instance_id = instance_id
        operation = self._workbenches.create(rendered)
        if self._detach:
            yield Outcome("is being created", self._spec.name, zone, self._workbenches.get(instance_id))
            return
        try:
            yield from self._workbenches.follow(instance_id, operation, "active")
        except CapacityError:
            # What is left of it would be listed, and its name be taken.
            if left := self._workbenches.get(instance_id):
                yield from delete(self._workbenches, left)
            self.instance_id = ""
            raise
        except SdtuneError as error:
            raise type(error)(f"{error}{self._what_is_left(instance_id)}") from None
        yield Outcome(DONE["active"], self._spec.name, zone, self._workbenches.get(instance_id))

    def _what_is_left(self, instance_id: str) -> str:
        left = self._workbenches.get(instance_id)
        if left is None:
            return ""
        return (
            f"\n{left.name} is there all the same ({left.state}), and paid for. To wait for it: sdtune workbench start "
            f"{left.name}; to be rid of it: sdtune workbench delete {left.name}"
        )

    def _check_that_the_name_is_free(self) -> None:
        """In other zones, too: an instance that was forgotten there is paid for."""
        for record in self._workbenches.instances().records:
            if record.name == self._spec.name:
                raise JobError(
                    f"there is an instance {record.name} in {record.zone} already ({record.state}); start it: sdtune "
                    f"workbench start {record.name}, delete it: sdtune workbench delete {record.name}, or choose "
                    "another name."
                )


def image_note(builder: Builder, spec: InstanceSpec) -> str | None:
    """What should be known of the image; None: it is there, or not sdtune's. ProjectError: it is not there.

    Without its image an instance never becomes ready, and is paid for all the same.
    """
    if spec.container is None:
        return None
    try:
        if builder.digest_of(spec.image):
            return None
    except SdtuneError as error:
        # Who may make an instance need not be one who may look at images.
        return f"whether the image {spec.image} is there is not known: {error}"
    raise ProjectError(f"the image {spec.image} is not there; build it: sdtune build {spec.container} --workbench")


def find(workbenches: Workbenches, name: str, zone: str | None = None) -> InstanceRecord | None:
    """sdtune's instance of this name; None: there is none. JobError: there are several, or it is another's."""
    found = [record for record in workbenches.instances(zone).records if record.name == name]
    ours = [record for record in found if record.version]
    if len(ours) > 1:
        zones = ", ".join(record.zone for record in ours)
        raise JobError(f"there are instances {name} in {zones}; say which: --zone {ours[0].zone}")
    if found and not ours:
        raise JobError(
            f"the instance {name} in {found[0].zone} was not made by sdtune, which leaves it alone; see: gcloud "
            f"workbench instances describe {name} --location={found[0].zone}"
        )
    return ours[0] if ours else None


def existing(workbenches: Workbenches, name: str, zone: str | None = None) -> InstanceRecord:
    """The same. JobError: there is none."""
    if record := find(workbenches, name, zone):
        return record
    raise JobError(
        f"there is no instance {name} of sdtune in {zone or 'any zone'} of {workbenches.place}; sdtune workbench list "
        "shows all."
    )


def start(workbenches: Workbenches, record: InstanceRecord, *, detach: bool = False) -> Iterator[Told]:
    """Until it can be opened, from whatever state it is in."""
    if record.is_ready:
        yield Outcome("is active already", record.name, record.zone, record)
        return
    if record.state in AT_REST_SOON:
        # It takes no other order before.
        yield from workbenches.follow(record.instance_id, "", AT_REST_SOON[record.state])
        record = workbenches.get(record.instance_id) or record
    operation = ""
    if record.state in AT_REST_SOON.values():
        yield Begun("Starting", record.name, record.zone)
        operation = workbenches.start(record.instance_id)
    yield from _until(workbenches, record, operation, "active", detach)


def stop(workbenches: Workbenches, record: InstanceRecord, *, detach: bool = False) -> Iterator[Told]:
    """Until it is no longer paid for, but for its disks."""
    if record.state in AT_REST_SOON.values():
        yield Outcome(f"is {record.state} already", record.name, record.zone, record)
        return
    operation = ""
    if record.state not in AT_REST_SOON:
        yield Begun("Stopping", record.name, record.zone)
        operation = workbenches.stop(record.instance_id)
    yield from _until(workbenches, record, operation, AT_REST_SOON.get(record.state, "stopped"), detach)


def delete(workbenches: Workbenches, record: InstanceRecord, *, detach: bool = False) -> Iterator[Told]:
    """Until it is gone, with its disks."""
    yield Begun("Deleting", record.name, record.zone)
    operation = workbenches.delete(record.instance_id)
    yield from _until(workbenches, record, operation, "deleted", detach)


def _until(
    workbenches: Workbenches, record: InstanceRecord, operation: str, state: str, detach: bool
) -> Iterator[Told]:
    if not detach:
        yield from workbenches.follow(record.instance_id, operation, state)
    text = BEING_DONE[state] if detach else DONE[state]
    yield Outcome(text, record.name, record.zone, workbenches.get(record.instance_id))
