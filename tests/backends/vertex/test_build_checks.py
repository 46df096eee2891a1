"""The account that builds act as, as ``sdtune doctor`` sees it: least rights, and the commands that give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.backends.vertex.doctor import TRAINER, ask, grades
from tests.servers.services import ServicesServer
from tests.servers.services_methods import Bucket

pytestmark = pytest.mark.usefixtures("forgotten")

CHOSEN = "123456789012-compute@developer.gserviceaccount.com"
BUILDER = "builder@my-project.iam.gserviceaccount.com"
OWN = "my-project-sdtune"
PUSH = (
    "gcloud artifacts repositories add-iam-policy-binding sdtune --location=us-central1 --project=my-project "
    "--member=serviceAccount:{} --role=roles/artifactregistry.writer"
)
KEEP = (
    f"gcloud storage buckets add-iam-policy-binding gs://{OWN} --member=serviceAccount:{{}} --role=roles/storage.admin"
)


@pytest.fixture
def bare(google: ServicesServer) -> ServicesServer:
    """The accounts have no role; builds have a bucket."""
    google.policy = {}
    google.buckets[OWN] = Bucket()
    google.add_account("builder")
    return google


def test_the_account_that_cloud_build_chooses(google: ServicesServer) -> None:
    found = ask()["build account"]
    assert found.grade == "good"
    assert found.text == f"{CHOSEN}, which may push to sdtune and keep its log in gs://{OWN}"
    assert "--build-account" in found.note
    assert "GET /v1/projects/my-project/locations/us-central1/defaultServiceAccount" in google.requests


def test_the_least_rights_are_enough(bare: ServicesServer) -> None:
    found = ask(BUILDER)["build account"]
    assert found.grade == "warning"
    assert found.text == (
        f"{BUILDER} has no role that allows it to push to sdtune, and has no role that allows it to keep its log in "
        f"gs://{OWN}"
    )
    assert found.commands == (PUSH.format(BUILDER), KEEP.format(BUILDER))
    bare.pushers = {"roles/artifactregistry.writer": [f"serviceAccount:{BUILDER}"]}
    found = ask(BUILDER)["build account"]
    assert (found.grade, found.commands) == ("warning", (KEEP.format(BUILDER),))
    # With rights on objects alone Cloud Build may not look at the bucket of its logs.
    bare.buckets[OWN].members = {"roles/storage.objectAdmin": [f"serviceAccount:{BUILDER}"]}
    assert ask(BUILDER)["build account"].commands == (KEEP.format(BUILDER),)
    bare.buckets[OWN].members = {"roles/storage.admin": [f"serviceAccount:{BUILDER}"]}
    found = ask(BUILDER)["build account"]
    assert (found.grade, found.commands) == ("good", ())
    assert not [request for request in bare.requests if "defaultServiceAccount" in request]


def test_the_bucket_is_that_of_builds(bare: ServicesServer) -> None:
    bare.pushers = {"roles/artifactregistry.writer": [f"serviceAccount:{BUILDER}"]}
    bare.buckets["my-bucket"].members = {"roles/storage.admin": [f"serviceAccount:{BUILDER}"]}
    assert ask(BUILDER)["build account"].grade == "warning"
    assert ask(BUILDER, bucket="gs://my-bucket/a/folder")["build account"].grade == "good"


def test_a_bucket_that_is_not_there_is_made_first(bare: ServicesServer) -> None:
    del bare.buckets[OWN]
    found = ask(BUILDER)["build account"]
    assert found.text.endswith(f"to keep its log in gs://{OWN}, which is not there")
    assert found.commands == (PUSH.format(BUILDER), "sdtune setup", KEEP.format(BUILDER))


@pytest.mark.parametrize("role", ["roles/editor", "roles/owner", "roles/storage.admin"])
def test_an_account_that_may_do_more_than_builds_need(role: str, google: ServicesServer) -> None:
    google.policy = {role: [f"serviceAccount:{CHOSEN}"]}
    found = ask()["build account"]
    own = "sdtune-builds@my-project.iam.gserviceaccount.com"
    assert (found.grade, found.text) == (
        "warning", f"{CHOSEN}, which may do more in the project than a build needs: {role}",
    )  # fmt: skip
    assert found.commands == (
        "gcloud iam service-accounts create sdtune-builds --project=my-project", PUSH.format(own), KEEP.format(own),
    )  # fmt: skip
    assert f"sdtune build --service-account {own}" in found.note


UNUSABLE: dict[str, tuple[Callable[[ServicesServer, str], Any], str, str]] = {
    # what is done to the account, what is said of it, a command
    "gone": (lambda g, email: g.accounts.pop(email), "{} does not exist", "gcloud iam service-accounts "),
    "off": (lambda g, email: g.accounts[email].update(disabled=True), "{} is switched off",
            "gcloud iam service-accounts enable {}"),
    "not yours": (lambda g, email: g.denied.add("iam.serviceAccounts.actAs"), "you may not let builds act as {}",
                  "gcloud iam service-accounts add-iam-policy-binding {} --member=user:YOUR_ADDRESS "
                  "--role=roles/iam.serviceAccountUser"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
@pytest.mark.parametrize("given", [BUILDER, ""])
def test_an_account_that_builds_may_not_act_as(case: str, given: str, google: ServicesServer) -> None:
    google.add_account("builder")
    assert google.policy is not None
    google.policy["roles/cloudbuild.builds.builder"].append(f"serviceAccount:{BUILDER}")
    spoil, text, command = UNUSABLE[case]
    email = given or CHOSEN
    spoil(google, email)
    found = ask(given)["build account"]
    assert text.format(email) in found.text
    assert any(found.startswith(command.format(email)) for found in found.commands)
    # Who named it wants to build; without it jobs are trained all the same.
    assert found.grade == ("bad" if given else "warning")
    assert ("you can train, but not build images" in found.text) == (not given)


def test_cloud_builds_own_account_of_older_projects_needs_no_leave(google: ServicesServer) -> None:
    google.builder = "123456789012@cloudbuild.gserviceaccount.com"
    google.policy = {"roles/cloudbuild.builds.builder": [f"serviceAccount:{google.builder}"]}
    google.denied.add("iam.serviceAccounts.actAs")
    found = ask()["build account"]
    assert (found.grade, found.text.partition(",")[0]) == ("good", google.builder)


def test_a_project_that_never_built(google: ServicesServer) -> None:
    google.off.add("cloudbuild")
    found = ask()["build account"]
    assert (found.grade, found.text) == ("warning", "cannot be asked: cloudbuild.googleapis.com is off")
    assert found.commands == ("gcloud services enable cloudbuild.googleapis.com --project=my-project",)
    # One that is named need not be asked for.
    assert ask(TRAINER)["build account"].text.startswith(TRAINER)


def test_it_changes_nothing(bare: ServicesServer) -> None:
    assert grades(ask(BUILDER), "bad") == []
    assert not [request for request in bare.requests if request.startswith(("PUT", "PATCH", "DELETE"))]
