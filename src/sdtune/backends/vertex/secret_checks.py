"""Check of the secrets whose names are given: they are there, and the account of jobs may read them. It reads none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.vertex.account_checks import member_of_jobs, policy_of_project
from sdtune.backends.vertex.asking import Project, holds, is_of_the_credentials
from sdtune.jobs.findings import Finding

ACCESSOR = "roles/secretmanager.secretAccessor"
READERS = (ACCESSOR, "roles/secretmanager.admin", "roles/owner")
"""Google's own roles that allow to read a secret."""


def secrets(project: Project) -> Finding:
    """``--hf-token-secret`` and ``--wandb-key-secret``."""
    given = (project.placement.hf_token_secret, project.placement.wandb_key_secret)
    if not any(given):
        return Finding("unasked", "none given (--hf-token-secret, --wandb-key-secret): jobs have no tokens")
    found = [_secret(project, name) for name in dict.fromkeys(given) if name]
    worst = max(found, key=lambda one: ("good", "warning", "bad").index(one.grade))
    commands = tuple(command for one in found for command in one.commands)
    return Finding(worst.grade, "; ".join(one.text for one in found), commands, worst.note)


def _secret(project: Project, given: str) -> Finding:
    full, _, version = project.placement.secret_of(given).partition("/versions/")
    _, owner, _, name = full.split("/")
    try:
        project.get("secretmanager", f"v1/{full}")
    except api.NotFound:
        return Finding(
            "bad", f"there is no secret {name}", (f"gcloud secrets create {name} --data-file=FILE --project={owner}",)
        )
    except api.Forbidden as error:
        # To see a secret and to let a job read it are two rights.
        if is_of_the_credentials(error):
            raise
        return Finding("warning", f"{name} cannot be seen by you, or is not there")
    member = member_of_jobs(project)
    shown = name if version == "latest" else f"{name}, version {version}"
    command = f"gcloud secrets add-iam-policy-binding {name} --member={member} --role={ACCESSOR} --project={owner}"
    try:
        policy: Mapping[str, Any] = project.get(
            "secretmanager", f"v1/{full}:getIamPolicy", **{"options.requestedPolicyVersion": 3}
        )
    except api.Forbidden:
        return Finding("warning", f"{shown}; who may read it cannot be seen by you", (command,))
    of_project = policy_of_project(project) if owner in (project.id, project.number) else None
    if holds(policy, member, READERS) or (of_project and holds(of_project, member, READERS)):
        return Finding("good", f"{shown}, which jobs may read")
    # Groups, and folders above the project, may give it all the same.
    return Finding("warning", f"{shown} is not known to be readable by {member.partition(':')[2]}", (command,))
