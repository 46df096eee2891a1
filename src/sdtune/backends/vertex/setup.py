"""A Google Cloud project made ready: APIs switched on, a repository for images, a bucket."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.vertex.build_reasons import Facts, asking
from sdtune.backends.vertex.google import Session
from sdtune.errors import JobError, ProjectError
from sdtune.jobs.images import bucket_of
from sdtune.jobs.placement import Placement
from sdtune.jobs.provisioner import Provisioned, Resource
from sdtune.methods.places import bucket_and_path

APIS = ("aiplatform", "artifactregistry", "cloudbuild", "storage", "logging", "notebooks", "secretmanager")
LONGEST_OPERATION = 300.0
"""Seconds. Switching on APIs takes half a minute, a repository ten seconds."""
SETTLES_WITHIN = 120.0
"""Seconds for which an API that was just switched on may still say that it is off."""


class VertexSetup:
    """The project and the first region of ``placement``. See Provisioner."""

    def __init__(self, placement: Placement, pause: Callable[[float], None] = time.sleep) -> None:
        self.placement = placement
        self.project, self.region = placement.project or "", placement.region[0]
        self._pause = pause
        self._session = Session()
        self._switched_on = False

    @property
    def place(self) -> str:
        return f"project {self.project}, {self.region}"

    def resources(self) -> tuple[Resource, ...]:
        return (*map(self._api, APIS), self._repository(), self._bucket())

    def set_up(self) -> Iterator[Provisioned]:
        yield from self._switch_on()
        yield from self._make_repository()
        yield from self._make_bucket()

    # APIs ------------------------------------------------------------------------------------------------------------

    def _api(self, name: str) -> Resource:
        service = f"{name}.googleapis.com"
        return Resource("API", service, f"gcloud services enable {service} --project={self.project}")

    def _switch_on(self) -> Iterator[Provisioned]:
        parent = f"projects/{self.project}"
        with self._asking("the APIs cannot be looked at"):
            query = {"names": [f"{parent}/services/{name}.googleapis.com" for name in APIS]}
            answer = self._session.call("serviceusage", "GET", f"v1/{parent}/services:batchGet", query=query)
        on = {found["name"].rpartition("/")[2] for found in answer.get("services", ()) if found["state"] == "ENABLED"}
        resources = [self._api(name) for name in APIS]
        missing = [resource for resource in resources if resource.name not in on]
        yield from (Provisioned(resource, "there") for resource in resources if resource not in missing)
        if not missing:
            return
        yield from (Provisioned(resource, "creating") for resource in missing)
        with self._asking("the APIs cannot be switched on"):
            body = {"serviceIds": [resource.name for resource in missing]}
            operation = self._session.call("serviceusage", "POST", f"v1/{parent}/services:batchEnable", body)
        self._finish("serviceusage", operation, "the APIs cannot be switched on")
        self._switched_on = True
        yield from (Provisioned(resource, "created") for resource in missing)

    # The repository --------------------------------------------------------------------------------------------------

    def _repository(self) -> Resource:
        name = self.placement.repository
        return Resource(
            "repository",
            f"{name} in {self.region}",
            f"gcloud artifacts repositories create {name} --repository-format=docker --location={self.region} "
            f"--project={self.project}",
        )

    def _make_repository(self) -> Iterator[Provisioned]:
        resource, name = self._repository(), self.placement.repository
        parent = f"v1/projects/{self.project}/locations/{self.region}/repositories"
        with self._asking("the repository cannot be looked at"):
            found = self._settled(lambda: self._present(f"{parent}/{name}"))
        if found:
            if found.get("format") != "DOCKER":
                raise ProjectError(
                    f"the repository {name} in {self.region} is for {found.get('format', 'something else')}, wanted "
                    "DOCKER; name another one: --repository"
                )
            yield Provisioned(resource, "there")
            return
        yield Provisioned(resource, "creating")
        body = {"format": "DOCKER", "description": "Images that sdtune's jobs run in", "labels": {"sdtune": ""}}
        what = "the repository cannot be made"
        with self._asking(what):
            try:
                operation = self._session.call("artifactregistry", "POST", parent, body, query={"repositoryId": name})
            except api.Conflict:
                # By a first request, whose answer was lost: it is made when it can be looked at.
                operation = {"done": self._present(f"{parent}/{name}") is not None}
                if not operation["done"]:
                    raise
        self._finish("artifactregistry", operation, what)
        yield Provisioned(resource, "created")

    def _present(self, path: str) -> dict[str, Any] | None:
        try:
            return self._session.call("artifactregistry", "GET", path)
        except api.NotFound:
            return None

    # The bucket ------------------------------------------------------------------------------------------------------

    def _bucket(self) -> Resource:
        address = f"gs://{bucket_and_path(bucket_of(self.placement))[0]}"
        return Resource(
            "bucket",
            f"{address} in {self.region}",
            f"gcloud storage buckets create {address} --location={self.region} --uniform-bucket-level-access "
            f"--public-access-prevention --project={self.project}",
        )

    def _make_bucket(self) -> Iterator[Provisioned]:
        from sdtune.backends.storage import RETRY, explained, location, open_client

        resource, address = self._bucket(), bucket_of(self.placement)
        name = bucket_and_path(address)[0]
        client = open_client(self.project)
        with explained(address, "roles/storage.admin"):
            there = self._settled(lambda: client.bucket(name).exists(retry=RETRY))
        if there:
            at = location(client, address) or self.region
            apart = at.lower() != self.region
            note = f"it lies in {at}: what jobs in {self.region} read of it is slower, and may be charged for"
            yield Provisioned(resource, "there", note if apart else "")
            return
        yield Provisioned(resource, "creating")
        bucket = client.bucket(name)
        bucket.iam_configuration.uniform_bucket_level_access_enabled = True
        bucket.iam_configuration.public_access_prevention = "enforced"
        try:
            with explained(address, "roles/storage.admin", let_through=(api.Conflict,)):
                client.create_bucket(bucket, location=self.region, retry=RETRY)
        except api.Conflict:
            # By a first request, whose answer was lost? A moment ago there was none that can be seen.
            with explained(address, let_through=(api.Forbidden,)), suppress(api.Forbidden):
                if client.bucket(name).exists(retry=RETRY):
                    yield Provisioned(resource, "created")
                    return
            raise ProjectError(
                f"the name {name} is taken by somebody's bucket: names are one for all of Google Cloud. Name another "
                "one: --bucket"
            ) from None
        yield Provisioned(resource, "created")

    # Waiting ---------------------------------------------------------------------------------------------------------

    def _finish(self, service: str, operation: Mapping[str, Any], what: str) -> None:
        """Wait for an operation's end."""
        waited, pause = 0.0, 0.5
        while not operation.get("done"):
            if waited >= LONGEST_OPERATION:
                raise JobError(f"{what}: it takes longer than {LONGEST_OPERATION:.0f} s; run the same command again.")
            self._pause(pause)
            waited, pause = waited + pause, min(2 * pause, 5.0)
            with self._asking(what):
                operation = self._session.call(service, "GET", f"v1/{operation['name']}")
        if error := operation.get("error"):
            with self._asking(what):
                raise api.from_grpc_status(error.get("code", 13), error.get("message", ""))

    def _settled(self, call: Callable[[], Any]) -> Any:
        """What ``call`` returns, asked again while an API that was just switched on does not know it yet."""
        waited = 0.0
        while True:
            try:
                return call()
            except api.Forbidden as error:
                is_off = "SERVICE_DISABLED" in str(error.reason) or "has not been used" in str(error)
                if not (self._switched_on and is_off and waited < SETTLES_WITHIN):
                    raise
                self._pause(5.0)
                waited += 5.0

    def _asking(self, what: str) -> AbstractContextManager[None]:
        return asking(what, Facts(self.placement))
