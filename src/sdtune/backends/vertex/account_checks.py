"""Check of the account that the job acts as: it is there, the caller may use it, and it may write to the bucket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.vertex.asking import Project, holds, is_of_the_credentials
from sdtune.backends.vertex.bucket_checks import ROLES_OF_WRITERS, allow, bucket_of, may_write
from sdtune.jobs.findings import Finding

ACT_AS = "iam.serviceAccounts.actAs"
USER = "roles/iam.serviceAccountUser"
BROAD = (
    "roles/owner", "roles/editor", "roles/aiplatform.admin", "roles/storage.admin", "roles/secretmanager.admin",
    "roles/secretmanager.secretAccessor", "roles/iam.serviceAccountAdmin", "roles/iam.serviceAccountKeyAdmin",
    "roles/iam.serviceAccountTokenCreator", "roles/iam.serviceAccountUser", "roles/resourcemanager.projectIamAdmin",
)  # fmt: skip
"""Roles in a whole project that no job needs. What it needs is in docs/security.md: some buckets, some secrets."""


def service_account(project: Project) -> Finding:
    """The account of ``--service-account``, or Vertex AI's own."""
    email = project.placement.service_account
    if not email:
        return _own_of_vertex(project)
    found = _in_bucket(project, email)
    if wrong := unusable(project, email, "jobs"):
        return replace(wrong, commands=(*wrong.commands, *found.commands))
    return found


def unusable(project: Project, email: str, actors: str) -> Finding | None:
    """What keeps ``actors`` (jobs, builds) of the caller from acting as an account; None: nothing that can be seen."""
    # With "-" for the project Google answers 403 also for accounts that do not exist.
    resource = f"v1/projects/{_project_of(email) or '-'}/serviceAccounts/{email}"
    bad: list[tuple[str, str]] = []
    seen = True
    try:
        if project.get("iam", resource).get("disabled"):
            bad.append((f"{email} is switched off", f"gcloud iam service-accounts enable {email}"))
    except api.NotFound:
        return Finding("bad", f"{email} does not exist", create(email))
    except api.Forbidden as error:
        # To let a job act as an account, and to look at the account, are two rights.
        if is_of_the_credentials(error):
            raise
        seen = False
    if project.lacks("iam", resource, [ACT_AS]):
        text = f"you may not let {actors} act as {email}" + ("" if seen else ", or it does not exist")
        command = f"gcloud iam service-accounts add-iam-policy-binding {email} --member={project.member} --role={USER}"
        bad.append((text, command))
    if not bad:
        return None
    texts, commands = zip(*bad, strict=True)
    return Finding("bad", "; ".join(texts), commands, note="The owner of the account allows it.")


def _in_bucket(project: Project, email: str) -> Finding:
    """Whether the account may write to the bucket, as far as policies tell."""
    address, member = bucket_of(project), f"serviceAccount:{email}"
    if too_much := needless(project, member):
        own = f"sdtune-jobs@{project.id}.iam.gserviceaccount.com"
        bound = (allow(address, f"serviceAccount:{own}"),) if address else ()
        return Finding(
            "warning",
            f"{email}, which may do more in the project than a job needs: {', '.join(too_much)}",
            (*create(own), *bound),
            note="What a job runs may do all that its account may. These make one for jobs alone: docs/security.md.",
        )
    if not address:
        return Finding("good", f"{email}, which you may use", note="With --bucket, its rights there are checked too.")
    answers = [may_write(address, member), _may_write_in_project(project, member)]
    if any(answers):
        return Finding("good", f"{email}, which you may use and which may write to {address}")
    # Groups, roles of their own making and folders above the project may give it all the same.
    unseen = "is not known to be allowed" if None in answers else "is not allowed by the bucket or the project"
    return Finding("warning", f"{email} {unseen} to write to {address}", (allow(address, member),))


def _own_of_vertex(project: Project) -> Finding:
    """Jobs without an account act as a service agent, which may use the buckets of its project, and no others."""
    if not project.number:
        return Finding("unasked", "none given: jobs act as Vertex AI's own")
    member, address = member_of_jobs(project), bucket_of(project)
    text = f"none given: jobs act as Vertex AI's own, {member.partition(':')[2]}"
    policy = policy_of_project(project)
    if policy is None:
        return Finding("good", text, note="What it may do cannot be seen by you.")
    if holds(policy, member, ("roles/aiplatform.customCodeServiceAgent", *ROLES_OF_WRITERS)):
        return Finding("good", text)
    if address and may_write(address, member):
        return Finding("good", text)
    # Google makes it, and gives it its role, when the first job is sent.
    return Finding(
        "warning",
        f"{text}; it has no role in the project, as before the first job",
        (project.grant("roles/aiplatform.customCodeServiceAgent", member),),
        note="Only needed if a job is refused its bucket: Google gives the role when the first job is sent.",
    )


def member_of_jobs(project: Project) -> str:
    """Whom jobs act as, as IAM policies write it."""
    agent = f"service-{project.number}@gcp-sa-aiplatform-cc.iam.gserviceaccount.com"
    return f"serviceAccount:{project.placement.service_account or agent}"


def needless(project: Project, member: str) -> list[str]:
    """Those of the roles in the project that are broad and the account has, as far as its policy may be read."""
    policy = policy_of_project(project) or {}
    return [role for role in BROAD if holds(policy, member, (role,))]


def _may_write_in_project(project: Project, member: str) -> bool | None:
    policy = policy_of_project(project)
    return None if policy is None else holds(policy, member, ROLES_OF_WRITERS)


def policy_of_project(project: Project) -> Mapping[str, Any] | None:
    """The project's; None where it may not be read."""
    try:
        return project.post(
            "cloudresourcemanager",
            f"v3/projects/{project.id}:getIamPolicy",
            {"options": {"requestedPolicyVersion": 3}},
        )
    except api.Forbidden:
        return None


def create(email: str) -> tuple[str, ...]:
    """The command that makes an account; for those that Google makes, the one that lists them."""
    if project := _project_of(email):
        return (f"gcloud iam service-accounts create {email.partition('@')[0]} --project={project}",)
    return ("gcloud iam service-accounts list",)


def _project_of(email: str) -> str:
    """Of ``name@PROJECT.iam.gserviceaccount.com``; empty for those that Google makes, and in projects of a domain."""
    _, _, domain = email.partition("@")
    project, _, rest = domain.partition(".")
    return project if rest == "iam.gserviceaccount.com" else ""
