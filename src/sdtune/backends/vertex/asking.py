"""Project: what the checks of a Google Cloud project have in common: whom they ask, and what they make of a refusal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from google.api_core import exceptions as api
from requests import RequestException

from sdtune.backends.vertex.google import RETRY, Session
from sdtune.jobs.findings import Finding
from sdtune.jobs.placement import Placement

PATIENCE = RETRY.with_timeout(15.0)
"""Someone is sitting in front of it."""


@dataclass
class Project:
    """The project that is asked about, and who asks.

    build_account: that builds act as; empty for Cloud Build's choice. number: empty until the check of the project has
    found it; member: the caller as IAM policies write it, found by the check of the credentials.
    """

    placement: Placement
    build_account: str = ""
    session: Session = field(default_factory=Session)
    number: str = ""
    member: str = "user:YOUR_ADDRESS"

    @property
    def id(self) -> str:
        return self.placement.project or ""

    @property
    def region(self) -> str:
        """The first of its regions, where things are made."""
        return self.placement.region[0]

    def get(self, service: str, path: str, **query: Any) -> dict[str, Any]:
        """One answer. GoogleAPICallError: a refusal."""
        return self.session.call(service, "GET", path, query=query or None, retry=PATIENCE)

    def post(self, service: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The same for questions that have a body; nothing is changed by them."""
        return self.session.call(service, "POST", path, body, retry=PATIENCE)

    def pages(self, service: str, path: str, key: str, **query: Any) -> Iterable[dict[str, Any]]:
        """What a list has under ``key``, page by page as it is taken."""
        token = ""
        while True:
            page = self.get(service, path, **query, **({"pageToken": token} if token else {}))
            yield from page.get(key, [])
            if not (token := page.get("nextPageToken", "")):
                return

    def lacks(self, service: str, resource: str, permissions: Iterable[str]) -> list[str]:
        """Those of ``permissions`` that the caller has not on ``resource``, such as v3/projects/P."""
        wanted = list(permissions)
        answer = self.post(service, f"{resource}:testIamPermissions", {"permissions": wanted})
        return [permission for permission in wanted if permission not in answer.get("permissions", [])]

    def grant(self, role: str, member: str | None = None) -> str:
        """The command that gives ``role`` in the project."""
        return f"gcloud projects add-iam-policy-binding {self.id} --member={member or self.member} --role={role}"


def not_answered(error: Exception, project: Project) -> Finding:
    """The finding where an error came instead of an answer: it says nothing of what was asked about."""
    told: Mapping[str, str] = getattr(error, "metadata", None) or {}
    consumer = told.get("consumer", "").removeprefix("projects/")
    if QUOTA_PROJECT in str(error) or consumer in OF_GCLOUD:
        return Finding("warning", "cannot be asked: your credentials have no quota project", (quota_project(project),))
    if getattr(error, "reason", None) == "SERVICE_DISABLED" and (service := told.get("service")):
        # Asked for someone who logged in as a user, the switch is that of the project of the credentials.
        of = project.id if consumer in ("", project.number) else consumer
        return Finding(
            "warning", f"cannot be asked: {service} is off", (f"gcloud services enable {service} --project={of}",)
        )
    return Finding("warning", f"cannot be asked: {first_line(error)}")


QUOTA_PROJECT = "requires a quota project"
"""Part of what Google says to users whose credentials have none.

Source: cloud.google.com/docs/authentication/troubleshoot-adc.
"""
OF_GCLOUD = ("764086051850", "32555940559")
"""The projects that such questions count against: those of gcloud itself, as google.auth and gcloud have them."""


def is_of_the_credentials(error: api.GoogleAPICallError) -> bool:
    """Whether a refusal says nothing of what was asked about, but of the project that the question counts against."""
    return QUOTA_PROJECT in str(error) or error.reason in ("SERVICE_DISABLED", "USER_PROJECT_DENIED")


def quota_project(project: Project) -> str:
    """The command that says against whose quota a user's questions count."""
    return f"gcloud auth application-default set-quota-project {project.id}"


def first_line(error: Exception) -> str:
    """What an error says, without the address that was asked."""
    cause = getattr(error, "cause", None) or error  # a retry that gave up says only that it did
    if isinstance(cause, RequestException) and cause.request is not None:
        return f"no connection to {urlsplit(cause.request.url).hostname}"
    said = re.sub(r"^(?:\d{3} )?[A-Z]+ https?://\S+: ", "", str(getattr(cause, "message", None) or cause)).strip()
    return said.splitlines()[0] if said else type(cause).__name__


def holds(policy: Mapping[str, Any], member: str, roles: Iterable[str]) -> bool:
    """Whether an IAM policy gives ``member`` one of ``roles``, without a condition."""
    wanted = set(roles)
    return any(
        binding["role"] in wanted and not binding.get("condition") and member in binding.get("members", ())
        for binding in policy.get("bindings", ())
    )
