"""Check of the account that builds act as: it is there, the caller may use it, it may push images and keep its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.vertex.account_checks import create, needless, policy_of_project, unusable
from sdtune.backends.vertex.asking import Project, holds
from sdtune.backends.vertex.bucket_checks import allow, policy_of_bucket
from sdtune.jobs.findings import Finding
from sdtune.jobs.images import bucket_of
from sdtune.methods.places import BUCKETS, bucket_and_path

PUSHER = "roles/artifactregistry.writer"
KEEPER = "roles/storage.admin"
"""Of the one bucket: where logs are kept in a bucket of the user's, Cloud Build looks at the bucket itself, too, which
no role for objects allows. Source: cloud.google.com/build/docs/securing-builds/store-view-build-logs.
"""
ALL_OF_IT = ("roles/cloudbuild.builds.builder", "roles/editor", "roles/owner")
"""What Google itself gives the accounts that builds act as, in the whole project; and the project's owner."""
PUSHERS = (
    PUSHER, "roles/artifactregistry.repoAdmin", "roles/artifactregistry.admin",
    "roles/artifactregistry.createOnPushWriter", "roles/artifactregistry.createOnPushRepoAdmin", *ALL_OF_IT,
)  # fmt: skip
KEEPERS = (KEEPER, *ALL_OF_IT)
OWN_OF_CLOUD_BUILD = "@cloudbuild.gserviceaccount.com"
"""The account of older projects: it lies in none of the user's, and who may build needs no leave to let it act."""


def build_account(project: Project) -> Finding:
    """The account of ``sdtune build --service-account``, or the one that Cloud Build takes without it."""
    email = project.build_account or _chosen_by_cloud_build(project)
    found = _may_build(project, email)
    if not email.endswith(OWN_OF_CLOUD_BUILD) and (wrong := unusable(project, email, "builds")):
        found = replace(wrong, commands=(*wrong.commands, *found.commands))
    if project.build_account:
        return found
    if found.grade == "bad":
        found = replace(found, grade="warning", text=f"{found.text}: you can train, but not build images")
    return found if found.note else replace(found, note="Cloud Build takes it where --build-account names no other.")


def _chosen_by_cloud_build(project: Project) -> str:
    """What builds act as that name no account: in new projects another one than in old ones, or as a policy says."""
    path = f"v1/projects/{project.id}/locations/{project.region}/defaultServiceAccount"
    account: str = project.get("cloudbuild", path)["serviceAccountEmail"]
    return account.rpartition("/")[2]


def _may_build(project: Project, email: str) -> Finding:
    """Whether the account may do what a build does, as far as policies tell."""
    repository, bucket = project.placement.repository, f"{BUCKETS}{bucket_and_path(bucket_of(project.placement))[0]}"
    member = f"serviceAccount:{email}"
    if too_much := needless(project, member):
        own = f"sdtune-builds@{project.id}.iam.gserviceaccount.com"
        of_own = f"serviceAccount:{own}"
        return Finding(
            "warning",
            f"{email}, which may do more in the project than a build needs: {', '.join(too_much)}",
            (*create(own), _let_push(project, of_own), allow(bucket, of_own, KEEPER)),
            note=f"These make one for builds alone: sdtune build --service-account {own}",
        )
    of_project = policy_of_project(project)
    texts: list[str] = []
    commands: list[str] = []
    if doubt := _doubt(member, PUSHERS, _policy_of_repository(project), of_project):
        texts.append(f"{doubt} to push to {repository}")
        commands.append(_let_push(project, member))
    try:
        of_bucket, there = policy_of_bucket(bucket), True
    except api.NotFound:
        of_bucket, there = None, False
    if doubt := _doubt(member, KEEPERS, of_bucket, of_project):
        texts.append(f"{doubt} to keep its log in {bucket}" + ("" if there else ", which is not there"))
        commands += [*([] if there else ["sdtune setup"]), allow(bucket, member, KEEPER)]
    if texts:
        return Finding("warning", f"{email} {', and '.join(texts)}", tuple(commands))
    return Finding("good", f"{email}, which may push to {repository} and keep its log in {bucket}")


def _doubt(member: str, roles: tuple[str, ...], *policies: Mapping[str, Any] | None) -> str:
    """Why ``member`` may lack what ``roles`` give; empty: one of the policies gives it. None: it may not be read."""
    answers = [None if policy is None else holds(policy, member, roles) for policy in policies]
    if any(answers):
        return ""
    # Groups, roles of their own making and folders above the project may give it all the same.
    return "is not known to be allowed" if None in answers else "has no role that allows it"


def _policy_of_repository(project: Project) -> Mapping[str, Any] | None:
    """The repository's; None where it may not be read, or there is none, which another check tells."""
    path = f"v1/projects/{project.id}/locations/{project.region}/repositories/{project.placement.repository}"
    try:
        query = {"options.requestedPolicyVersion": 3}
        return project.get("artifactregistry", f"{path}:getIamPolicy", **query)
    except (api.Forbidden, api.NotFound):
        return None


def _let_push(project: Project, member: str) -> str:
    """The command that lets ``member`` push images."""
    return (
        f"gcloud artifacts repositories add-iam-policy-binding {project.placement.repository} "
        f"--location={project.region} --project={project.id} --member={member} --role={PUSHER}"
    )
