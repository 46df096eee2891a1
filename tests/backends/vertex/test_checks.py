"""What ``sdtune doctor`` finds in a project that lacks something, and that its commands mend it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from sdtune import __version__
from sdtune.backends.vertex.asking import Project
from sdtune.backends.vertex.image_checks import parse_image
from sdtune.backends.vertex.project_checks import credentials
from sdtune.commands.doctor import examine
from sdtune.jobs.findings import Check, Finding
from sdtune.jobs.placement import Placement
from tests.backends.vertex.doctor import ALL, L4, NETWORK, SHARE, SPOT_L4, TRAINER, ask, grades
from tests.servers.services import ServicesServer
from tests.servers.storage import StorageServer

pytestmark = pytest.mark.usefixtures("forgotten")


def test_nothing_is_missing(google: ServicesServer) -> None:
    found = ask(**ALL)
    assert len(found) == 14
    assert grades(found, "warning", "bad", "unasked") == ["secrets"], found
    assert "none needed" in found["credentials"].text
    assert found["project"].text == "my-project, number 123456789012"
    assert found["bucket"].text == "gs://my-bucket in US-CENTRAL1"
    assert "built 3 days ago" in found["image"].text
    assert "found 8 in us-central1" in found["GPU quota"].text
    assert not any(finding.commands for finding in found.values())
    assert not google.authorizations
    assert not [request for request in google.requests if request.startswith(("PUT", "PATCH", "DELETE"))]


def test_what_is_not_set_is_not_asked(google: ServicesServer) -> None:
    found = ask()
    assert set(grades(found, "unasked")) == {"bucket", "secrets", "network", "NFS shares"}
    assert not grades(found, "warning", "bad")
    assert "service-123456789012@gcp-sa-aiplatform-cc" in found["service account"].text
    assert not [request for request in google.requests if "/compute/" in request or "instances" in request]


LACKS: dict[str, tuple[Callable[[ServicesServer], Any], dict[str, Any], str, str, str]] = {
    # what is done to the project, more settings, the check, what it says, a command
    "billing": (lambda g: setattr(g, "billing", None), {}, "billing", "no billing account",
                "gcloud billing projects link my-project --billing-account=ACCOUNT_ID"),
    "APIs": (lambda g: g.services.difference_update({"logging", "cloudbuild"}), {}, "APIs",
             "2 of 8 are off: cloudbuild, logging",
             "gcloud services enable cloudbuild.googleapis.com logging.googleapis.com --project=my-project"),
    "an API of a setting": (lambda g: g.services.discard("secretmanager"), {"hf_token_secret": "token"}, "APIs",
                            "1 of 9 is off: secretmanager",
                            "gcloud services enable secretmanager.googleapis.com --project=my-project"),
    "permissions": (lambda g: g.denied.add("aiplatform.customJobs.create"), {}, "permissions",
                    "you lack aiplatform.customJobs.create",
                    "gcloud projects add-iam-policy-binding my-project --member=user:YOUR_ADDRESS "
                    "--role=roles/aiplatform.user"),
    "no bucket": (lambda g: g.buckets.clear(), {}, "bucket", "gs://my-bucket does not exist",
                  "gcloud storage buckets create gs://my-bucket --location=us-central1 "
                  "--uniform-bucket-level-access --project=my-project"),
    "a bucket to read": (lambda g: g.denied.add("storage.objects.create"), {}, "bucket",
                         "you lack storage.objects.create",
                         "gcloud storage buckets add-iam-policy-binding gs://my-bucket --member=user:YOUR_ADDRESS "
                         "--role=roles/storage.objectUser"),
    "no repository": (lambda g: g.repositories.clear(), {}, "registry", "no repository sdtune in us-central1",
                      "gcloud artifacts repositories create sdtune --repository-format=docker "
                      "--location=us-central1 --project=my-project"),
    "another format": (lambda g: g.repositories.update({("us-central1", "sdtune"): "PYTHON"}), {}, "registry",
                       "is for PYTHON, wanted DOCKER",
                       "gcloud artifacts repositories create sdtune-docker --repository-format=docker "
                       "--location=us-central1 --project=my-project"),
    "no image": (lambda g: g.images.clear(), {}, "image", f"sdtune-diffusers:{__version__} is not built yet",
                 "sdtune build diffusers"),
    "no own image": (lambda g: None, {"image": "us-central1-docker.pkg.dev/my-project/sdtune/team/own:v1"}, "image",
                     "there is no image",
                     "gcloud artifacts docker images list us-central1-docker.pkg.dev/my-project/sdtune "
                     "--include-tags"),
    "no account": (lambda g: g.accounts.clear(), {}, "service account", "does not exist",
                   "gcloud iam service-accounts create trainer --project=my-project"),
    "an account that is off": (lambda g: g.accounts[TRAINER].update(disabled=True), {}, "service account",
                               "is switched off", f"gcloud iam service-accounts enable {TRAINER}"),
    "an account of others": (lambda g: g.denied.add("iam.serviceAccounts.actAs"), {}, "service account",
                             "you may not let jobs act as",
                             f"gcloud iam service-accounts add-iam-policy-binding {TRAINER} "
                             "--member=user:YOUR_ADDRESS --role=roles/iam.serviceAccountUser"),
    "no network": (lambda g: g.networks.clear(), {}, "network", "there is no network vpc in project my-project",
                   "gcloud compute networks list --project=my-project"),
    "no peering": (lambda g: g.add_network("vpc", None), {}, "network", "is not peered",
                   "gcloud services vpc-peerings connect --service=servicenetworking.googleapis.com "
                   "--ranges=google-services --network=vpc --project=my-project"),
    "half a peering": (lambda g: g.add_network("vpc", "INACTIVE"), {}, "network", "is INACTIVE",
                       "gcloud services vpc-peerings connect --service=servicenetworking.googleapis.com "
                       "--ranges=google-services --network=vpc --project=my-project"),
    "a share out of reach": (lambda g: (g.instances.clear(), g.add_instance("10.0.0.2", mode="DIRECT_PEERING")), {},
                             "NFS shares", "by DIRECT_PEERING",
                             "gcloud filestore instances create models-peered --location=us-central1-a "
                             "--tier=BASIC_SSD --file-share=name=vol1,capacity=2560GB "
                             "--network=name=vpc,connect-mode=PRIVATE_SERVICE_ACCESS --project=my-project"),
    "a share that is not there": (lambda g: (g.instances.clear(), g.add_instance("10.0.0.2", share="other")), {},
                                  "NFS shares", "has no share /vol1, but: /other", ""),
    "quota": (lambda g: g.quotas[L4].clear(), {}, "GPU quota", "found 0 in us-central1", ""),
    "quota of another GPU": (lambda g: g.quotas.update({L4.replace("l4", "a100_80gb"): {"": 0}}),
                             {"gpu": "a100-80gb"}, "GPU quota", "a100-80gb: found 0 in us-central1", ""),
    "quota of many": (lambda g: None, {"gpus": 8, "replicas": 2}, "GPU quota", "wanted 16", ""),
    "quota of spot machines": (lambda g: g.quotas[SPOT_L4].update({"us-central1": 0}), {"spot": True}, "GPU quota",
                               "found 0 in us-central1", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", LACKS)
def test_what_is_missing_is_named_with_the_command_that_mends_it(case: str, google: ServicesServer) -> None:
    take_away, settings, check, text, command = LACKS[case]
    take_away(google)
    found = ask(**{**ALL, **settings})
    assert grades(found, "bad") == [check]
    assert text in found[check].text
    if command:
        assert command in found[check].commands
    else:
        assert not found[check].commands
    # The others are asked all the same.
    unset = set() if "hf_token_secret" in settings else {"secrets"}
    assert set(grades(found, "unasked")) == unset | ({"image"} if check == "registry" else set())


WARNINGS: dict[str, tuple[Callable[[ServicesServer], Any], dict[str, Any], str, str]] = {
    "a bucket elsewhere": (lambda g: setattr(g.buckets["my-bucket"], "location", "EUROPE-WEST4"), {}, "bucket",
                           "is in EUROPE-WEST4, the job in us-central1"),
    "another continent": (lambda g: vars(g.buckets["my-bucket"]).update(location="EU", kind="multi-region"), {},
                          "bucket", "is in EU, the job in us-central1"),
    "rights of objects": (lambda g: setattr(g.buckets["my-bucket"], "uniform", False), {}, "bucket",
                          "no uniform access"),
    "a bucket that hides": (lambda g: g.denied.add("storage.buckets.get"), {}, "bucket", "may not be asked"),
    "an account without the bucket": (lambda g: setattr(g.buckets["my-bucket"], "members", {}), {},
                                      "service account", "is not allowed by the bucket or the project to write"),
    "no right to build": (lambda g: g.denied.add("cloudbuild.builds.create"), {}, "permissions",
                          "you can train, but not build images"),
    "an API that is off": (lambda g: g.off.add("compute"), {}, "network",
                           "cannot be asked: compute.googleapis.com is off"),
    "no right to ask": (lambda g: g.denied.add("serviceusage.quotas.get"), {}, "GPU quota",
                        "cannot be asked: Permission 'serviceusage.quotas.get' denied"),
    "a broken service": (lambda g: g.fail("GET /v1/projects/my-project/billingInfo", 400), {}, "billing",
                         "cannot be asked: The server was told to answer 400."),
    "a share of others": (lambda g: g.instances.clear(), {}, "NFS shares", "no Filestore instance of this project"),
    "one region of two": (lambda g: None, {"region": ["europe-west4", "us-central1"]}, "GPU quota",
                          "found 0 in europe-west4, 8 in us-central1 for all jobs together, wanted 1: only "
                          "us-central1 will do"),
    "an unknown quota": (lambda g: g.quotas.clear(), {}, "GPU quota", f"nothing is told of {L4}"),
    "another project's image": (lambda g: g.add_image("own", "v1"),
                                {"image": "us-central1-docker.pkg.dev/other-project/sdtune/own:v1"}, "image",
                                "it is project other-project's"),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNINGS)
def test_what_may_be_right_is_a_warning(case: str, google: ServicesServer) -> None:
    change, settings, check, text = WARNINGS[case]
    change(google)
    google.repositories["europe-west4", "sdtune"] = "DOCKER"
    found = ask(**{**ALL, **settings})
    assert (grades(found, "warning"), grades(found, "bad")) == ([check], [])
    assert text in found[check].text


def test_policies_that_hide_say_nothing_of_accounts(google: ServicesServer) -> None:
    google.buckets["my-bucket"].members = google.policy = google.pushers = None
    found = ask(**ALL)
    assert (sorted(grades(found, "warning")), grades(found, "bad")) == (["build account", "service account"], [])
    for name in ("service account", "build account"):
        assert "is not known to be allowed to" in found[name].text


def test_a_multi_region_is_remarked_and_good(google: ServicesServer) -> None:
    google.buckets["my-bucket"].location, google.buckets["my-bucket"].kind = "US", "multi-region"
    found = ask(**ALL)["bucket"]
    assert (found.grade, found.text) == ("good", "gs://my-bucket in US, a multi-region; one region costs less")


def test_buckets_with_their_objects(google: ServicesServer, storage: StorageServer) -> None:
    storage.put("my-bucket", "1.png", b"")
    storage.locations["my-bucket"] = "US-CENTRAL1"
    storage.denied.add("storage.objects.delete")
    found = ask(bucket="gs://my-bucket")["bucket"]
    assert (found.grade, found.text) == ("bad", "gs://my-bucket: you lack storage.objects.delete")


def test_accounts_that_google_makes(google: ServicesServer) -> None:
    email = "123456789012-compute@developer.gserviceaccount.com"
    google.accounts[email] = {"email": email}
    google.policy = {"roles/storage.objectAdmin": [f"serviceAccount:{email}"]}
    found = ask(service_account=email, bucket="gs://my-bucket")["service account"]
    assert (found.grade, found.commands) == ("good", ())
    assert f"GET /v1/projects/-/serviceAccounts/{email}" in google.requests
    del google.accounts[email]
    assert ask(service_account=email)["service account"].commands == ("gcloud iam service-accounts list",)


def test_an_account_that_may_be_used_but_not_looked_at(google: ServicesServer) -> None:
    google.denied.add("iam.serviceAccounts.get")
    assert ask(**ALL)["service account"].grade == "good"


def test_a_network_of_another_project(google: ServicesServer) -> None:
    google.number = "999999999999"
    assert ask(**ALL)["network"].text == "there is no network vpc in project 123456789012"
    google.hosts.add("123456789012")
    found = ask(**ALL)["network"]
    assert found.grade == "warning"
    assert "vpc of project 123456789012 is peered with Google's services; this project is 999999999999" in found.text


def test_several_shares(google: ServicesServer) -> None:
    google.add_instance("10.0.0.3", mode="DIRECT_PEERING")
    found = ask(network=NETWORK, nfs=[SHARE, "10.0.0.3:/vol1=more", "10.0.0.4:/vol1=others"])["NFS shares"]
    assert (found.grade, len(found.commands)) == ("bad", 1)
    assert "10.0.0.3:/vol1" in found.text


def test_an_image_elsewhere_is_not_asked_about(google: ServicesServer) -> None:
    found = ask(image="docker.io/me/own:v1")
    assert found["registry"] == Finding("unasked", "docker.io/me/own:v1 is not in Artifact Registry")
    assert found["image"].grade == "unasked"


def test_an_image_by_its_digest(google: ServicesServer) -> None:
    digest = google.add_image("own", "v1", days=0)
    found = ask(image=f"us-central1-docker.pkg.dev/my-project/sdtune/own@{digest}")["image"]
    assert (found.grade, found.text) == ("good", f"own, {digest[:19]}, built today")


def test_the_names_of_images() -> None:
    found = parse_image("europe-docker.pkg.dev/example.com/my-project/sdtune/team/own:v1")
    assert found
    assert found.parent == "projects/example.com:my-project/locations/europe/repositories/sdtune"
    assert (found.package, found.tag) == ("team/own", "v1")
    assert parse_image("gcr.io/my-project/own") is None


def test_a_metric_that_is_only_in_the_list(google: ServicesServer) -> None:
    google.fail(r"GET /.*/consumerQuotaMetrics/", 404)
    google.quotas |= {f"aiplatform.googleapis.com/a_{number:04}": {"": 1} for number in range(600)}
    assert "found 8 in us-central1" in ask()["GPU quota"].text
    assert sum("pageSize=500" in request for request in google.requests) == 2


def test_a_project_that_is_not_there_is_the_only_thing_asked_about(google: ServicesServer) -> None:
    found = ask(**ALL | {"project": "no-project"})
    assert grades(found, "bad") == ["project"]
    assert "no-project does not exist, or you may not see it" in found["project"].text
    assert len(grades(found, "unasked")) == 12
    assert google.requests == ["GET /v3/projects/no-project"]


def test_a_project_that_cannot_be_seen_for_want_of_an_api_stops_nothing(google: ServicesServer) -> None:
    google.off.add("cloudresourcemanager")
    found = ask(**ALL)
    assert grades(found, "bad", "unasked") == ["secrets"]
    command = "gcloud services enable cloudresourcemanager.googleapis.com --project=123456789012"
    assert found["project"].commands == found["permissions"].commands == (command,)


def test_a_quota_project_that_is_missing(google: ServicesServer) -> None:
    message = "The serviceusage.googleapis.com API requires a quota project, which is not set by default."
    google.fail("GET /v3/projects/my-project$|services:batchGet", 403, message)
    found = ask()
    assert found["project"] == found["APIs"]
    assert found["project"].text == "cannot be asked: your credentials have no quota project"
    assert found["project"].commands == ("gcloud auth application-default set-quota-project my-project",)


def test_a_service_out_of_reach(google: ServicesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtune.backends.vertex.asking.PATIENCE", None)
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDBILLING", "http://127.0.0.1:1/")
    assert ask()["billing"] == Finding("warning", "cannot be asked: no connection to 127.0.0.1")


def test_busy_services_are_asked_again(google: ServicesServer) -> None:
    google.fail("GET /v3/projects/my-project$", 503, times=1)
    assert ask()["project"].grade == "good"
    assert google.requests.count("GET /v3/projects/my-project") == 2


# --- credentials -----------------------------------------------------------------------------------------------------


@pytest.fixture
def key_file(google: ServicesServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A key of a service account, whose tokens the server gives; the addresses are no longer overridden."""
    openssl = ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]
    private = subprocess.run(openssl, capture_output=True, text=True, check=True).stdout
    path = tmp_path / "key.json"
    path.write_text(
        json.dumps(
            {"type": "service_account", "client_email": TRAINER, "private_key": private, "private_key_id": "1",
             "token_uri": f"{google.address}/token", "project_id": "my-project"}
        )
    )  # fmt: skip
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    return path


def credentials_of(monkeypatch: pytest.MonkeyPatch) -> tuple[Finding, str]:
    """The finding, and the member that commands name; nobody else is asked."""
    for name in [name for name in os.environ if name.startswith("CLOUDSDK_API_ENDPOINT_OVERRIDES_")]:
        monkeypatch.delenv(name)
    project = Project(Placement(project="my-project"))
    return credentials(project), project.member


def test_without_credentials_nobody_is_called(google: ServicesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CLOUDSDK_API_ENDPOINT_OVERRIDES_")]:
        monkeypatch.delenv(name)
    found = ask(**ALL)
    assert found["credentials"] == Finding("bad", "there are none here", ("gcloud auth application-default login",))
    assert len(grades(found, "unasked")) == 13
    assert not google.requests


def test_an_address_that_may_not_be_spoken_to(google: ServicesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_IAM", "http://example.com/")
    found = ask(**ALL)
    assert grades(found, "bad") == ["credentials"]
    assert "plain http to another machine" in found["credentials"].text
    assert not google.requests


def test_a_service_account_is_named(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert credentials_of(monkeypatch) == (Finding("good", TRAINER), f"serviceAccount:{TRAINER}")


def test_credentials_that_are_no_longer_taken(
    key_file: Path, google: ServicesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    google.revoked = True
    found, _ = credentials_of(monkeypatch)
    assert found.grade == "bad"
    assert found.text.startswith("no longer taken: ")
    # A login alone would change nothing: the variable wins.
    assert found.commands == ("unset GOOGLE_APPLICATION_CREDENTIALS", "gcloud auth application-default login")


def test_a_file_that_is_not_there(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_file.unlink()
    found, _ = credentials_of(monkeypatch)
    assert (found.grade, str(key_file) in found.text) == ("bad", True)


def test_credentials_that_cannot_be_renewed(
    key_file: Path, google: ServicesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file.write_text(key_file.read_text().replace(google.address, "http://127.0.0.1:1"))
    found, _ = credentials_of(monkeypatch)
    assert (found.grade, found.text) == ("bad", "cannot be renewed: Google is not in reach")


@pytest.fixture
def login(google: ServicesServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """What ``gcloud auth application-default login`` leaves, with the server in the place of Google's."""
    folder = tmp_path / "gcloud"
    folder.mkdir()
    content = {"type": "authorized_user", "client_id": "1", "client_secret": "2", "refresh_token": "3"}
    (folder / "application_default_credentials.json").write_text(json.dumps(content))
    monkeypatch.setattr("google.oauth2.credentials._GOOGLE_OAUTH2_TOKEN_ENDPOINT", f"{google.address}/token")
    return content


def test_a_user_without_a_quota_project(login: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    found, member = credentials_of(monkeypatch)
    assert found.grade == "warning"
    assert found.commands == ("gcloud auth application-default set-quota-project my-project",)
    assert member == "user:ann@example.com"


def test_a_user_is_named_by_the_identity_of_the_login(
    login: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "gcloud" / "application_default_credentials.json"
    path.write_text(json.dumps(login | {"quota_project_id": "my-project"}))
    assert credentials_of(monkeypatch) == (Finding("good", "ann@example.com"), "user:ann@example.com")


# --- asked at once ---------------------------------------------------------------------------------------------------


def test_checks_are_asked_at_once(google: ServicesServer) -> None:
    ask()  # imports
    before, google.delay = len(google.requests), 0.3
    began = time.monotonic()
    ask(**ALL)
    assert time.monotonic() - began < 0.7 * google.delay * (len(google.requests) - before)


def test_a_check_waits_for_those_that_it_needs() -> None:
    order: list[str] = []

    def found(name: str, grade: Any = "good") -> Callable[[], Finding]:
        return lambda: (order.append(name), Finding(grade, name))[1]

    checks = [
        Check("a", found("a")),
        Check("b", found("b", "warning"), ("a",)),
        Check("c", found("c", "bad"), ("b",)),
        Check("d", found("d"), ("c",)),
        Check("e", found("e"), ("d",)),
    ]
    answers = dict(examine(checks))
    assert order == ["a", "b", "c"]
    assert answers["d"].text == "not asked until this is mended: c"
    assert answers["e"].grade == "unasked"


def test_a_mistake_of_ours_is_not_taken_for_a_finding() -> None:
    def broken() -> Finding:
        raise KeyError("name")

    with pytest.raises(KeyError):
        list(examine([Check("a", broken)]))


# --- the server, which is as strict as the services -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("v3/projects/my-project/nothing", 404, "was not found on this server"),
        ("v3/projects/my-project?pageSise=1", 400, 'Unknown name "pageSise"'),
        ("v1/projects/my-project/services:batchGet", 400, "Between 1 and 30 services"),
        ("v3/projects/other-project", 403, "The caller does not have permission"),
    ],
)
def test_what_a_service_would_refuse(google: ServicesServer, path: str, status: int, message: str) -> None:
    answer = requests.get(f"{google.address}/{path}", timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
    assert message in answer.json()["error"]["message"]


# --- the real gcloud -------------------------------------------------------------------------------------------------


def gcloud(words: str) -> str:
    ran = subprocess.run(shlex.split(words), capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, (words, ran.stderr)
    return ran.stdout


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_the_real_gcloud_is_answered(google: ServicesServer) -> None:
    described = json.loads(gcloud("gcloud projects describe my-project --format=json"))
    assert described["projectNumber"] == "123456789012"
    listed = json.loads(gcloud("gcloud services list --enabled --format=json"))
    assert {service["config"]["name"] for service in listed} >= {"aiplatform.googleapis.com"}


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_the_commands_mend_what_is_bad(google: ServicesServer) -> None:
    google.services -= {"logging", "cloudbuild"}
    google.denied |= {"aiplatform.customJobs.create", "iam.serviceAccounts.actAs", "storage.objects.create"}
    google.repositories.clear()
    google.accounts[TRAINER]["disabled"] = True
    google.buckets["my-bucket"].members = {}
    assert google.policy is not None
    google.policy.pop("roles/cloudbuild.builds.builder")
    for finding in ask(**ALL).values():
        for command in finding.commands:
            gcloud(command.replace("YOUR_ADDRESS", "ann@example.com"))
    found = ask(**ALL)
    assert grades(found, "warning", "bad", "unasked") == ["secrets"], found


def test_secrets_are_there_and_readable_by_the_account_of_jobs_and_never_read(google: ServicesServer) -> None:
    member = f"serviceAccount:{TRAINER}"
    named = {**ALL, "hf_token_secret": "hf-token", "wandb_key_secret": "projects/my-project/secrets/wandb-key"}
    found = ask(**named)["secrets"]
    assert (found.grade, found.text) == ("bad", "there is no secret hf-token; there is no secret wandb-key")
    assert found.commands[0] == "gcloud secrets create hf-token --data-file=FILE --project=my-project"
    google.secrets = {"hf-token": {}, "wandb-key": {"roles/secretmanager.secretAccessor": [member]}}
    found = ask(**named)["secrets"]
    assert found.grade == "warning"
    assert f"hf-token is not known to be readable by {TRAINER}; wandb-key, which jobs may read" in found.text
    assert found.commands == (
        f"gcloud secrets add-iam-policy-binding hf-token --member={member} --role=roles/secretmanager.secretAccessor "
        "--project=my-project",
    )
    google.secrets["hf-token"] = None
    assert "who may read it cannot be seen by you" in ask(**named)["secrets"].text
    google.secrets["hf-token"] = google.secrets["wandb-key"]
    assert ask(**named)["secrets"].grade == "good"
    assert ask(**{**named, "hf_token_secret": "hf-token/versions/3"})["secrets"].text.startswith("hf-token, version 3")
    google.denied.add("secretmanager.secrets.get")
    assert "hf-token cannot be seen by you, or is not there" in ask(**named)["secrets"].text
    assert not [request for request in google.requests if ":access" in request]
    # Vertex AI's own account, where none is given.
    google.denied.clear()
    agent = "service-123456789012@gcp-sa-aiplatform-cc.iam.gserviceaccount.com"
    assert f"readable by {agent}" in ask(hf_token_secret="hf-token")["secrets"].text


@pytest.mark.parametrize("role", ["roles/owner", "roles/editor", "roles/secretmanager.secretAccessor"])
def test_an_account_of_jobs_that_may_do_more_than_they_need(role: str, google: ServicesServer) -> None:
    assert google.policy is not None
    google.policy[role] = [f"serviceAccount:{TRAINER}"]
    found = ask(**ALL)["service account"]
    assert found.grade == "warning"
    assert f"{TRAINER}, which may do more in the project than a job needs: {role}" in found.text
    own = "sdtune-jobs@my-project.iam.gserviceaccount.com"
    assert found.commands == (
        "gcloud iam service-accounts create sdtune-jobs --project=my-project",
        f"gcloud storage buckets add-iam-policy-binding gs://my-bucket --member=serviceAccount:{own} "
        "--role=roles/storage.objectUser",
    )
