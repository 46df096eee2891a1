"""Why a build was refused or failed, in the user's terms: what is lacking, and what mends it.

Wordings, as users met them: cert-manager/cert-manager issue 8851 (service account without a place for logs),
pytorch/xla issue 4597 (time), kserve/kserve issue 304 (disk), GoogleContainerTools/kaniko issue 1680 (memory).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.vertex.build_specs import SMOKE_TEST
from sdtune.backends.vertex.reasons import Place, explained, translate
from sdtune.errors import JobError, ProjectError
from sdtune.jobs.images import bucket_of
from sdtune.jobs.placement import Placement
from sdtune.methods.places import bucket_and_path

Hint = Callable[[re.Match[str], "Facts"], str]


@dataclass(frozen=True)
class Facts:
    """What a hint may name. build: as Cloud Build describes it, or as it was asked for; account: that it acts as."""

    placement: Placement
    build: Mapping[str, Any] = field(default_factory=dict)
    account: str = ""

    @property
    def place(self) -> Place:
        return Place(self.placement.project or "", self.placement.region[0])

    @property
    def who(self) -> str:
        return self.account or "the account of the build"

    @property
    def member(self) -> str:
        return f"serviceAccount:{self.account or 'ACCOUNT'}"

    @property
    def machine_type(self) -> str:
        return str(self.build.get("options", {}).get("machineType", "its machine"))

    def of_bucket(self, role: str) -> str:
        """The command that gives ``role`` in the bucket of sources and logs."""
        bucket = bucket_and_path(bucket_of(self.placement))[0]
        return f"gcloud storage buckets add-iam-policy-binding gs://{bucket} --member={self.member} --role={role}"

    def of_repository(self, role: str) -> str:
        """The same in the repository of images."""
        return (
            f"gcloud artifacts repositories add-iam-policy-binding {self.placement.repository} "
            f"--location={self.place.region} --project={self.place.project} --member={self.member} --role={role}"
        )


# --- a build that failed ---------------------------------------------------------------------------------------------


def why_failed(step: str, lines: Sequence[str], detail: str, facts: Facts) -> str:
    """What is known of a failure. lines: the last ones of the step; detail: Cloud Build's own words."""
    said = "\n".join([*lines, detail])
    for pattern, hint in _FAILURES:
        if found := re.search(pattern, said, re.IGNORECASE):
            return hint(found, facts)
    if step == SMOKE_TEST or "sdtune.training.smoke" in said:
        return (
            "the image was built but does not train, so nothing was pushed, and the image that was there is as it was. "
            "What the lines below name is not as the trainers need it."
        )
    return ""


def _disk(found: re.Match[str], facts: Facts) -> str:
    size = facts.build.get("options", {}).get("diskSizeGb", "100")
    return f"the build's disk of {size} GB is full; give it more: --disk-gb {2 * int(size)}"


def _memory(found: re.Match[str], facts: Facts) -> str:
    return (
        f"a process was killed, most often because the machine ({facts.machine_type}) ran out of memory; give it more: "
        "--machine-type E2_HIGHCPU_32"
    )


def _push(found: re.Match[str], facts: Facts) -> str:
    return f"{facts.who} may not push images; allow it with: {facts.of_repository('roles/artifactregistry.writer')}"


def _read(found: re.Match[str], facts: Facts) -> str:
    return f"{facts.who} may not read the source; allow it with: {facts.of_bucket('roles/storage.objectViewer')}"


def _logs(found: re.Match[str], facts: Facts) -> str:
    # Cloud Build looks at the bucket, too, which the roles for objects do not allow.
    return f"{facts.who} may not write the log; allow it with: {facts.of_bucket('roles/storage.admin')}"


def _said(text: str) -> Hint:
    return lambda found, facts: text


_FAILURES: tuple[tuple[str, Hint], ...] = (
    (r"no space left on device|disk quota exceeded", _disk),
    (r"artifactregistry\.repositories\.uploadArtifacts|PUSH_NOT_AUTHORIZED|denied:.*(?:permission|push)", _push),
    (r"storage\.objects\.create|LOGGING_FAILURE", _logs),
    (r"storage\.objects\.get|FETCH_SOURCE_FAILED", _read),
    (r"exit(?:ed)?[^\n]{0,40} 137\b|signal: killed|out of memory|cannot allocate memory|\bKilled$", _memory),
    (
        r"DO NOT MATCH THE HASHES|hashes are required",
        _said(
            "a package is not the one that the lock (requirements.txt) names by its hash: it was replaced on its "
            "index, or the lock was changed by hand. Install sdtune anew, or lock anew."
        ),
    ),
    (
        r"ResolutionImpossible|No matching distribution found|Could not find a version",
        _said(
            "a package that the lock (requirements.txt) names is no longer on its index; a newer sdtune has a newer "
            "lock."
        ),
    ),
    (
        r"Temporary failure in name resolution|Read timed out|Connection reset by peer|TLS handshake timeout",
        _said("the line to a package index broke off; run the same command again, which goes on from the last image."),
    ),
    (
        r"toomanyrequests|pull rate limit",
        _said("the registry of the base image gives no more to this address for now; run the same command in an hour."),
    ),
    (
        r"manifest unknown|failed to resolve source metadata|manifest for \S+ not found",
        _said("the base image that the Dockerfile names is not there any more; a newer sdtune names another."),
    ),
    (
        r"No module named '?sdtune",
        _said(
            "the image has no sdtune in it: its Dockerfile and the source do not belong together; install sdtune anew."
        ),
    ),
)


# --- a request that was refused --------------------------------------------------------------------------------------


@contextmanager
def asking(what: str, facts: Facts) -> Iterator[None]:
    """Errors of Cloud Build, Artifact Registry and Service Usage as sdtune's. what: was being done."""
    with explained(what, facts.place):
        try:
            yield
        except api.GoogleAPICallError as error:
            message = str(getattr(error, "message", "") or error)
            for pattern, hint in _REFUSALS:
                if found := re.search(pattern, message, re.IGNORECASE | re.DOTALL):
                    kind = ProjectError if isinstance(error, api.Forbidden) else JobError
                    raise kind(f"{what}: {hint(found, facts)}") from None
            raise


def _permission(found: re.Match[str], facts: Facts) -> str:
    permission = found[1]
    role = next((role for start, role in _ROLES.items() if permission.startswith(start)), "roles/editor")
    return (
        f"you lack the permission {permission} in project {facts.place.project}; its owner gives it with: gcloud "
        f"projects add-iam-policy-binding {facts.place.project} --member=user:YOU --role={role}"
    )


def _act_as(found: re.Match[str], facts: Facts) -> str:
    return translate(f"permission to act as service_account: {facts.account or 'ACCOUNT'}", facts.place).text


def _machine(found: re.Match[str], facts: Facts) -> str:
    return (
        f"project {facts.place.project} may not run builds on {facts.machine_type} in {facts.place.region}: new "
        "projects are kept to some regions and machines. Try --machine-type E2_STANDARD_2, another --region, or ask "
        "for quota at "
        f"https://console.cloud.google.com/iam-admin/quotas?project={facts.place.project}"
        "&service=cloudbuild.googleapis.com"
    )


_ROLES = {
    "cloudbuild.": "roles/cloudbuild.builds.editor",
    "artifactregistry.repositories.create": "roles/artifactregistry.admin",
    "artifactregistry.tags.": "roles/artifactregistry.repoAdmin",
    "artifactregistry.": "roles/artifactregistry.reader",
    "serviceusage.": "roles/serviceusage.serviceUsageAdmin",
    "storage.": "roles/storage.admin",
}
"""By the beginning of a permission, the most exact first."""

_REFUSALS: tuple[tuple[str, Hint], ...] = (
    (r"act as (?:the )?service[ _]account|iam\.serviceAccounts\.actAs", _act_as),
    (r"permission '?([\w.]+)'? denied", _permission),
    (r"quota restrictions|cannot run builds in this region|concurrent_\w+_build|build_cpus", _machine),
)
