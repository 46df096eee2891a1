"""Checks of what an NFS share is reached through: the peered network, and the Filestore instance in it.

Source: Mount an NFS share for custom training, in Google's documentation of Vertex AI.
"""

from __future__ import annotations

from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.endpoints import override
from sdtune.backends.vertex.asking import Project
from sdtune.jobs.findings import Finding
from sdtune.jobs.mounts import NfsMount

PEER = "servicenetworking"
PEERED = "PRIVATE_SERVICE_ACCESS"


def network(project: Project) -> Finding:
    """The network of ``--network``, peered with Google's services."""
    given = project.placement.network
    if not given:
        return Finding("unasked", "none given (--network); only NFS shares need one")
    _, number, *_, name = given.split("/")
    of = project.id if number == project.number else number
    try:
        found = project.get("compute", f"{_compute()}projects/{of}/global/networks/{name}")
    except api.NotFound:
        return Finding(
            "bad",
            f"there is no network {name} in project {of}",
            (f"gcloud compute networks list --project={of}",),
            note="This shows which there are; then give --network.",
        )
    peerings = [peering for peering in found.get("peerings", ()) if _is_of_services(peering)]
    active = [peering for peering in peerings if peering.get("state") == "ACTIVE"]
    if not active:
        text = f"{name} is not peered with Google's services"
        if peerings:
            text = f"the peering of {name} with Google's services is {peerings[0].get('state', 'not active')}"
        return Finding("bad", text, _peer(name, of))
    if of != project.id and project.number:
        return Finding(
            "warning",
            f"{name} of project {number} is peered with Google's services; this project is {project.number}",
            note="That is right for a Shared VPC, whose host project the other one must be.",
        )
    return Finding("good", f"{name} is peered with Google's services")


def _compute() -> str:
    """gcloud's variable for this service has the path of the API in it."""
    return "" if (override("compute") or "").endswith("/compute/v1/") else "compute/v1/"


def _is_of_services(peering: dict[str, Any]) -> bool:
    return str(peering.get("network", "")).rpartition("/")[2] == PEER or str(peering.get("name", "")).startswith(PEER)


def _peer(name: str, project: str) -> tuple[str, ...]:
    return (
        f"gcloud compute addresses create google-services --global --purpose=VPC_PEERING --prefix-length=16 "
        f"--network={name} --project={project}",
        f"gcloud services vpc-peerings connect --service={PEER}.googleapis.com --ranges=google-services "
        f"--network={name} --project={project}",
    )


def shares(project: Project) -> Finding:
    """The Filestore instances behind ``--nfs``, found by their addresses."""
    mounts = project.placement.mounts
    if not mounts:
        return Finding("unasked", "none given (--nfs)")
    instances = {
        address: instance
        for instance in project.pages("file", f"v1/projects/{project.id}/locations/-/instances", "instances")
        for at in instance.get("networks", ())
        for address in at.get("ipAddresses", ())
    }
    findings = [_share(mount, instances.get(mount.server), project) for mount in mounts]
    # The worst of them; what mends the others comes with it.
    worst = min(findings, key=lambda finding: ("bad", "warning", "good").index(finding.grade))
    bad = [finding for finding in findings if finding.grade == worst.grade]
    return Finding(
        worst.grade,
        "; ".join(finding.text for finding in bad),
        tuple(command for finding in bad for command in finding.commands),
        worst.note,
    )


def _share(mount: NfsMount, instance: dict[str, Any] | None, project: Project) -> Finding:
    source = f"{mount.server}:{mount.path}"
    if instance is None:
        return Finding(
            "warning",
            f"{source} is no Filestore instance of this project; whether a job reaches it cannot be known",
            note="It must export the share without a password to the peered network.",
        )
    _, _, _, location, _, name = instance["name"].split("/")
    (at, *_), named = instance["networks"], [share["name"] for share in instance.get("fileShares", ())]
    network = str(project.placement.network).rpartition("/")[2]
    if instance.get("state") != "READY":
        return Finding("bad", f"{name} ({source}) is {instance.get('state', 'not ready')}, wanted READY")
    if mount.path.split("/")[1] not in named:
        return Finding("bad", f"{name} has no share {mount.path}, but: {', '.join(f'/{share}' for share in named)}")
    if at.get("connectMode") != PEERED or str(at.get("network", "")).rpartition("/")[2] != network:
        how = f"in {str(at.get('network', '')).rpartition('/')[2]} by {at.get('connectMode', 'DIRECT_PEERING')}"
        share = instance["fileShares"][0]
        return Finding(
            "bad",
            f"{name} ({source}) is {how}; wanted in {network} by {PEERED}, or no job reaches it",
            (
                f"gcloud filestore instances create {name}-peered --location={location} --tier={instance.get('tier')} "
                f"--file-share=name={share['name']},capacity={share.get('capacityGb')}GB "
                f"--network=name={network},connect-mode={PEERED} --project={project.id}",
            ),
            note="An instance cannot be moved; this makes another one.",
        )
    return Finding("good", f"{name} ({source}), reached through {network}")
