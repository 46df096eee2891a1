"""Checks of the project itself: credentials, billing, APIs, what the caller may do."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from typing import Any

from google.api_core import exceptions as api
from google.auth.exceptions import GoogleAuthError, RefreshError, TransportError

from sdtune.backends.endpoints import override, takes_credentials
from sdtune.backends.vertex.asking import Project, first_line, is_of_the_credentials, quota_project
from sdtune.backends.vertex.google import SCOPE, default_credentials
from sdtune.errors import ProjectError
from sdtune.jobs.findings import Finding
from sdtune.jobs.placement import Placement
from sdtune.methods.passwords import without_passwords

LOGIN = "gcloud auth application-default login"
KEY_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
ASKED = (
    "cloudresourcemanager", "cloudbilling", "serviceusage", "iam", "compute", "artifactregistry", "file", "storage",
    "secretmanager", "cloudbuild",
)  # fmt: skip
"""The services that checks ask."""


def credentials(project: Project) -> Finding:
    """Application Default Credentials that are still good; whose they are."""
    try:
        if not any(map(_takes_credentials, ASKED)):
            return Finding("good", "none needed: the environment puts other addresses in the place of Google's")
    except ProjectError as error:
        return Finding("bad", str(error))
    try:
        found = default_credentials()
        _refresh(found)
    except ProjectError:
        given = os.environ.get(KEY_FILE)
        there = f"{KEY_FILE} names {given}, which is not there or has none" if given else "there are none here"
        return Finding("bad", there, _login())
    except RefreshError as error:
        return Finding("bad", f"no longer taken: {first_line(error)}", _login())
    except TransportError:
        return Finding("bad", "cannot be renewed: Google is not in reach", note="Is there a network, or a proxy?")
    kind, email = _who(found)
    if email:
        project.member = f"{kind}:{email}"
    text = email or "there, and taken; they do not say whose they are"
    # Of a user Google wants to know whose quota a question counts against, or many an API gives no answer.
    if hasattr(found, "refresh_token") and not found.quota_project_id:
        return Finding("warning", f"{text}; without a quota project, which some APIs want", (quota_project(project),))
    return Finding("good", text)


def _takes_credentials(service: str) -> bool:
    if service == "storage" and os.environ.get("STORAGE_EMULATOR_HOST"):
        return False
    return takes_credentials(override(service))


def _login() -> tuple[str, ...]:
    """What gives new credentials; a variable that names a file would win over them."""
    return (f"unset {KEY_FILE}", LOGIN) if os.environ.get(KEY_FILE) else (LOGIN,)


def _refresh(found: Any) -> None:
    from google.auth.transport.requests import Request

    request = Request()
    without_passwords(request.session)
    found.refresh(request)


def _who(found: Any) -> tuple[str, str]:
    """user or serviceAccount, and the address; empty where it cannot be known."""
    account = getattr(found, "service_account_email", "")
    if account and account != "default":
        return "serviceAccount", account
    if account := getattr(found, "account", ""):
        return "user", account
    return "user", _email_of_user(found)


def _email_of_user(found: Any) -> str:
    """From the identity that comes with an access token if it is asked for."""
    from google.oauth2.credentials import Credentials

    if not isinstance(found, Credentials):
        return ""
    named = Credentials(
        None, refresh_token=found.refresh_token, token_uri=found.token_uri, client_id=found.client_id,
        client_secret=found.client_secret, scopes=[SCOPE, "openid", "https://www.googleapis.com/auth/userinfo.email"],
    )  # fmt: skip
    try:
        _refresh(named)
        payload = (named.id_token or "..").split(".")[1]
        email: str = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)) or "{}").get("email", "")
        return email
    except (GoogleAuthError, ValueError):
        return ""


def project(project: Project) -> Finding:
    """The project is there, and the caller may see it."""
    try:
        found = project.get("cloudresourcemanager", f"v3/projects/{project.id}")
    except (api.Forbidden, api.NotFound) as error:
        if is_of_the_credentials(error):
            raise
        return Finding(
            "bad",
            f"{project.id} does not exist, or you may not see it",
            ("gcloud projects list", project.grant("roles/aiplatform.user")),
            note="The first shows the projects that you may see; an owner of this one lets you in by the second.",
        )
    project.number = found["name"].removeprefix("projects/")
    if found.get("state") == "DELETE_REQUESTED":
        return Finding("bad", f"{project.id} is about to be deleted", (f"gcloud projects undelete {project.id}",))
    return Finding("good", f"{project.id}, number {project.number}")


def billing(project: Project) -> Finding:
    """Somebody pays."""
    found = project.get("cloudbilling", f"v1/projects/{project.id}/billingInfo")
    if found.get("billingEnabled"):
        return Finding("good", f"on, {found.get('billingAccountName', '').removeprefix('billingAccounts/')}")
    return Finding(
        "bad",
        "the project has no billing account, and Vertex AI is not free",
        ("gcloud billing accounts list", f"gcloud billing projects link {project.id} --billing-account=ACCOUNT_ID"),
        note="The first shows what to put in the place of ACCOUNT_ID.",
    )


NEEDED = ("aiplatform", "artifactregistry", "cloudbuild", "logging", "storage")
NEEDED_IF: dict[str, tuple[Callable[[Placement], bool], str]] = {
    "compute": (lambda placement: bool(placement.network), "--network"),
    "servicenetworking": (lambda placement: bool(placement.network), "--network"),
    "file": (lambda placement: bool(placement.nfs), "--nfs"),
    "secretmanager": (
        lambda placement: bool(placement.hf_token_secret or placement.wandb_key_secret),
        "--hf-token-secret",
    ),
    "notebooks": (lambda placement: False, "Workbench"),
}
"""By API: whether what is set uses it, and what that is."""


def apis(project: Project) -> Finding:
    """The APIs that jobs need are on."""
    names = [f"projects/{project.id}/services/{api}.googleapis.com" for api in (*NEEDED, *NEEDED_IF)]
    found = project.get("serviceusage", f"v1/projects/{project.id}/services:batchGet", names=names)["services"]
    on = {service["name"].rpartition("/")[2].partition(".")[0] for service in found if service["state"] == "ENABLED"}
    needed = [*NEEDED, *(name for name, (used, _) in NEEDED_IF.items() if used(project.placement))]
    unused = [f"{name} ({what})" for name, (_, what) in NEEDED_IF.items() if name not in (*needed, *on)]
    note = f"Off, and needed for nothing that is set here: {', '.join(unused)}." if unused else ""
    if off := [name for name in needed if name not in on]:
        which = " ".join(f"{name}.googleapis.com" for name in off)
        text = f"{len(off)} of {len(needed)} {'is' if len(off) == 1 else 'are'} off: {', '.join(off)}"
        return Finding("bad", text, (f"gcloud services enable {which} --project={project.id}",), note)
    return Finding("good", f"{len(needed)} of {len(needed)} are on", note=note)


ROLES = {
    "roles/aiplatform.user": (
        "aiplatform.customJobs.create",
        "aiplatform.customJobs.get",
        "aiplatform.customJobs.list",
        "aiplatform.customJobs.cancel",
    ),
    "roles/logging.viewer": ("logging.logEntries.list",),
    "roles/serviceusage.serviceUsageConsumer": ("serviceusage.services.use",),
    "roles/artifactregistry.writer": (
        "artifactregistry.repositories.downloadArtifacts",
        "artifactregistry.repositories.uploadArtifacts",
    ),
    "roles/cloudbuild.builds.editor": ("cloudbuild.builds.create",),
}
"""What the caller must be allowed in the project, by the smallest role that allows it. Buckets are asked themselves."""
TO_BUILD = ("roles/artifactregistry.writer", "roles/cloudbuild.builds.editor")
"""Those without which jobs run, but images are not built."""


def permissions(project: Project) -> Finding:
    """What the caller may do in the project."""
    wanted = [permission for permissions in ROLES.values() for permission in permissions]
    lacking = project.lacks("cloudresourcemanager", f"v3/projects/{project.id}", wanted)
    if not lacking:
        return Finding("good", f"you may do all that sdtune does there ({len(wanted)} permissions)")
    roles = [role for role, permissions in ROLES.items() if set(permissions) & set(lacking)]
    only_builds = all(role in TO_BUILD for role in roles)
    return Finding(
        "warning" if only_builds else "bad",
        f"you lack {', '.join(lacking)}" + (": you can train, but not build images" if only_builds else ""),
        tuple(map(project.grant, roles)),
        note="An owner of the project gives them.",
    )
