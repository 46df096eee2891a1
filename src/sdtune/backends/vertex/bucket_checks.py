"""Check of the bucket: where it lies, and whether the caller may write to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.storage import RETRY, WRITER, can_write, open_client
from sdtune.backends.vertex.asking import Project, holds
from sdtune.jobs.findings import Finding
from sdtune.methods.places import BUCKETS, bucket_and_path

PATIENCE = RETRY.with_timeout(15.0)
ROLES_OF_WRITERS = (
    WRITER, "roles/storage.objectAdmin", "roles/storage.admin", "roles/storage.legacyBucketOwner",
    "roles/storage.legacyBucketWriter", "roles/editor", "roles/owner",
)  # fmt: skip
"""Google's own roles that allow to write objects: of a bucket, or of its project."""
CONTINENTS = {"US": "us-", "EU": "europe-", "ASIA": "asia-"}
"""Multi-regions, and how the regions in them begin."""


def bucket(project: Project) -> Finding:
    """The bucket of ``--bucket``: there, near the job, and one that the caller may write to."""
    address = bucket_of(project)
    if not address:
        return Finding("unasked", "none given (--bucket): what is here is uploaded to the --output's bucket")
    client = open_client()
    try:
        found = client.get_bucket(bucket_and_path(address)[0], retry=PATIENCE)
    except api.NotFound:
        return Finding("bad", f"{address} does not exist", (_create(address, project),))
    except api.Forbidden:
        found = None  # the right to write objects does not include it
    if lacking := can_write(client, address):
        return Finding(
            "bad",
            f"{address}: you lack {', '.join(lacking)}",
            (allow(address, project.member),),
            note="The owner of the bucket gives them.",
        )
    if found is None:
        return Finding("warning", f"{address} may be written to; where it lies may not be asked")
    where = str(found.location)
    if not _is_near(where, str(found.location_type or ""), project.placement.region):
        return Finding(
            "warning",
            f"{address} is in {where}, the job in {', '.join(project.placement.region)}: slower, traffic is "
            "charged, and Vertex AI may refuse it",
            (_create(f"{address}-{project.region}", project),),
            note="A bucket cannot be moved; this makes another one.",
        )
    if not found.iam_configuration.uniform_bucket_level_access_enabled:
        return Finding(
            "warning",
            f"{address} in {where}; its objects may have rights of their own (no uniform access)",
            (f"gcloud storage buckets update {address} --uniform-bucket-level-access",),
        )
    kind = str(found.location_type or "")
    of_many = f", a {kind}; one region costs less" if kind in ("multi-region", "dual-region") else ""
    return Finding("good", f"{address} in {where}{of_many}")


def bucket_of(project: Project) -> str:
    """gs://bucket without a path; empty if none is given."""
    given = project.placement.bucket
    return f"{BUCKETS}{bucket_and_path(given)[0]}" if given else ""


def may_write(address: str, member: str) -> bool | None:
    """Whether the bucket's own policy lets ``member`` write to it. None: there is none that may be read."""
    try:
        policy = policy_of_bucket(address)
    except api.NotFound:
        return None
    return None if policy is None else holds(policy, member, ROLES_OF_WRITERS)


def policy_of_bucket(address: str) -> Mapping[str, Any] | None:
    """The bucket's; None where it may not be read. NotFound: there is no such bucket."""
    bucket = open_client().bucket(bucket_and_path(address)[0])
    try:
        return {"bindings": bucket.get_iam_policy(requested_policy_version=3, retry=PATIENCE).bindings}
    except api.NotFound:
        raise
    except api.GoogleAPICallError:
        return None


def allow(address: str, member: str, role: str = WRITER) -> str:
    """The command that gives ``member`` a role in a bucket: to write to it, if no other is named."""
    return f"gcloud storage buckets add-iam-policy-binding {address} --member={member} --role={role}"


def _create(address: str, project: Project) -> str:
    return (
        f"gcloud storage buckets create {address} --location={project.region} --uniform-bucket-level-access "
        f"--project={project.id}"
    )


def _is_near(location: str, kind: str, regions: Iterable[str]) -> bool:
    """Whether one of ``regions`` is there. Of places made of two regions, such as NAM4, none is known not to be."""
    if kind == "dual-region":
        return True
    if continent := CONTINENTS.get(location):
        return any(region.startswith(continent) for region in regions)
    return location.lower() in regions
