"""``sdtune workbench``: notebooks on a machine with a GPU."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

import typer

from sdtune.backends.registry import open_builder, open_workbenches
from sdtune.cli import workbench_view
from sdtune.cli.options import own_parameters, parameters_of
from sdtune.cli.sections import sectioned
from sdtune.cli.session import JsonOption, ProjectOption, RegionOption
from sdtune.commands.gathering import archive_placement, open_placement, typed_settings
from sdtune.commands.workbench import CreateRun, delete, existing, find, plan_instance, start, stop
from sdtune.errors import INTERRUPTED, RecipeError
from sdtune.jobs.workbench import InstanceRecord, Workbenches, WorkbenchSettings

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, add_completion=False)
NameArgument = Annotated[str, typer.Argument(help="Name of the instance.", metavar="NAME")]
ZoneOption = Annotated[
    str | None, typer.Option("--zone", help="Its zone; needed where several have an instance of this name.")
]
DetachOption = Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")]


@app.callback()
def group() -> None:
    """Notebooks on a machine of Workbench, in sdtune's images."""


def create(*, instance: str, detach: bool, dry_run: bool, json: bool, **arguments: Any) -> None:
    """Make an instance, and wait until it can be opened."""
    settings = WorkbenchSettings.from_settings(typed_settings(WorkbenchSettings, arguments))
    placement = open_placement({name: arguments[name] for name in OF_PLACEMENT if arguments[name] not in (None, [])})
    spec = plan_instance(instance, settings, placement)
    workbenches = open_workbenches(placement)
    if dry_run:
        workbench_view.rendered(workbenches, spec, as_json=json)
        return
    workbench_view.plan(spec, workbenches.place, as_json=json)
    running = CreateRun(spec, workbenches, open_builder(placement), detach=detach)
    try:
        workbench_view.follow(running, as_json=json)
    except KeyboardInterrupt:
        workbench_view.left(spec.name, going_on=bool(running.instance_id), as_json=json)
        raise typer.Exit(INTERRUPTED) from None


def _show(told: Any, record: InstanceRecord, json: bool) -> None:
    try:
        workbench_view.follow(told, as_json=json)
    except KeyboardInterrupt:
        workbench_view.left(record.name, going_on=True, as_json=json)
        raise typer.Exit(INTERRUPTED) from None


OPTIONS: dict[str, tuple[Any, Any]] = {
    "instance": (
        Annotated[str, typer.Argument(help="Name of the instance: lower-case letters, digits, '-'.", metavar="NAME")],
        inspect.Parameter.empty,
    ),
    "detach": (
        Annotated[bool, typer.Option("--detach", help="Have it made, and do not wait until it can be opened.")],
        False,
    ),
    "dry_run": (
        Annotated[bool, typer.Option("--dry-run", help="Print the request, and make not one call.")],
        False,
    ),
    "json": (JsonOption, False),
    "project": (ProjectOption, None),
    "region": (RegionOption, None),
    "repository": (
        Annotated[str | None, typer.Option("--repository", help="Artifact Registry repository.  [default: sdtune]")],
        None,
    ),
    "service_account": (
        Annotated[
            str | None,
            typer.Option("--service-account", help="Account that it acts as. Not given: the project's of machines."),
        ],
        None,
    ),
    "labels": (
        Annotated[list[str] | None, typer.Option("--labels", help="Label of it; repeatable.", metavar="KEY=VALUE")],
        None,
    ),
    "kms_key": (
        Annotated[
            str | None,
            typer.Option("--kms-key", help="Key for its disks: projects/P/locations/REGION/keyRings/R/cryptoKeys/K."),
        ],
        None,
    ),
}
OF_PLACEMENT = ("project", "region", "repository", "service_account", "labels", "kms_key")


def command(**arguments: Any) -> None:
    create(**arguments)


command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *own_parameters(
            {name: option for name, (option, _) in OPTIONS.items()},
            {name: default for name, (_, default) in OPTIONS.items()},
        ),
        *parameters_of(WorkbenchSettings, taken=set(OPTIONS)),
    ]
)
SECTIONS = {
    "Command": {"instance", "detach", "dry_run", "json", "help"},
    "Instance": {"image", "gpu", "gpus", "machine_type", "force_machine", "boot_disk_gb", "data_disk_gb", "disk_type",
                 "idle_shutdown", "fuse", "labels"},
    "Place and access": set(),
}  # fmt: skip
app.command(
    "create",
    short_help="Make an instance, and show the address that opens it.",
    cls=sectioned(SECTIONS),
    help="Make an instance that runs JupyterLab in one of sdtune's images (made by sdtune build ... --workbench), wait "
    "until it can be opened, and show its address. It is paid for while it runs.",
)(command)


@app.command("list", short_help="List sdtune's instances, newest first.")
def list_instances(
    every: Annotated[bool, typer.Option("--all", help="Also those that were not made by sdtune.")] = False,
    zone: Annotated[str | None, typer.Option("--zone", help="Only those of one zone.")] = None,
    project: ProjectOption = None,
    json: JsonOption = False,
) -> None:
    """List sdtune's instances in all zones, newest first, each with the address that opens it."""
    listing = open_workbenches(archive_placement(project, None)).instances(zone)
    workbench_view.listing(listing, every=every, as_json=json)


@app.command("start", short_help="Start an instance, or wait for one that starts.")
def start_instance(
    name: NameArgument, zone: ZoneOption = None, detach: DetachOption = False, project: ProjectOption = None,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """Start an instance, or wait for one that is starting, and show its address."""
    workbenches = open_workbenches(archive_placement(project, None))
    record = existing(workbenches, name, zone)
    _show(start(workbenches, record, detach=detach), record, json)


@app.command("stop", short_help="Stop an instance; its data stays.")
def stop_instance(
    name: NameArgument, zone: ZoneOption = None, detach: DetachOption = False, project: ProjectOption = None,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """Stop an instance: what is in /home/jupyter stays, and only the disks are paid for."""
    workbenches = open_workbenches(archive_placement(project, None))
    record = existing(workbenches, name, zone)
    _show(stop(workbenches, record, detach=detach), record, json)


@app.command("delete", short_help="Delete an instance with its disks.")
def delete_instance(
    name: NameArgument, zone: ZoneOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    detach: DetachOption = False, project: ProjectOption = None, json: JsonOption = False,
) -> None:  # fmt: skip
    """Delete an instance with its disks: all that is not in a bucket is gone."""
    workbenches = open_workbenches(archive_placement(project, None))
    record = find(workbenches, name, zone)
    if record is None:
        workbench_view.nothing_to_delete(name, workbenches, as_json=json)
        return
    if not yes:
        _ask(record, workbenches, json)
    _show(delete(workbenches, record, detach=detach), record, json)


def _ask(record: InstanceRecord, workbenches: Workbenches, json: bool) -> None:
    """Go on only if the user says so."""
    if json or not sys.stdin.isatty():
        raise RecipeError(f"delete: asks before it deletes {record.name}, and nobody can answer here; add --yes.")
    workbench_view.facts(record)
    if not typer.confirm(f"Delete {record.name} ({workbenches.place}), and all that is on its disks?"):
        raise typer.Exit(1)
