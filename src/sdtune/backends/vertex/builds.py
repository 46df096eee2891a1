"""Images built by Cloud Build, and what Artifact Registry has of them."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from google.api_core import exceptions as api
from google.auth.exceptions import GoogleAuthError
from requests import RequestException

from sdtune import events
from sdtune.backends.connections import SECONDS_PER_CALL
from sdtune.backends.vertex.build_log import BuildLog
from sdtune.backends.vertex.build_reasons import Facts, asking, why_failed
from sdtune.backends.vertex.build_records import (
    WORDS,
    Build,
    changes,
    failed_step,
    image_record,
    seconds_between,
    seconds_of,
    state_of,
    submitted,
)
from sdtune.backends.vertex.build_specs import as_file, build_request, source_address
from sdtune.backends.vertex.google import RETRY, Session, message_of, rest_client
from sdtune.backends.vertex.once import make_once
from sdtune.errors import JobError, ProjectError
from sdtune.jobs.backend import StateChange, Submitted, Upload
from sdtune.jobs.builder import ENDED, BuildEnd, BuildNews, ImageRecord, StepChange, StepLine
from sdtune.jobs.durations import show_duration
from sdtune.jobs.images import BuildSettings, ImageSpec
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import new_run_id
from sdtune.methods.places import bucket_and_path

SECONDS_BETWEEN_POLLS = 2.0
"""A build is asked for its state and its log; a project may ask 300 times a minute."""
PATIENCE = RETRY.with_timeout(900)
"""As in build_log.py, for its state."""
DRAIN = 3
"""Polls in which the end of a log is awaited, once its build has ended."""


class BuildsClient:
    """Builds of Cloud Build, as JSON in and out."""

    def create(self, parent: str, build: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a build, by one request: whether to ask again is for the caller to say."""
        made = message_of(self._module.Build, build)
        # The request's project_id would lead to the address without a region.
        request = self._module.CreateBuildRequest(parent=parent, build=made)
        operation = self._client.create_build(request=request, timeout=SECONDS_PER_CALL, retry=None)
        return self._dict(operation.metadata.build)

    def get(self, name: str) -> dict[str, Any]:
        """A build by its full name."""
        request = self._module.GetBuildRequest(name=name)
        return self._dict(self._client.get_build(request=request, timeout=SECONDS_PER_CALL, retry=PATIENCE))

    def cancel(self, name: str) -> None:
        """Ask for its end."""
        request = self._module.CancelBuildRequest(name=name)
        self._client.cancel_build(request=request, timeout=SECONDS_PER_CALL, retry=RETRY)

    def list(self, parent: str, text: str) -> Iterator[dict[str, Any]]:
        """The builds that a filter lets through, newest first."""
        request = self._module.ListBuildsRequest(parent=parent, filter=text)
        return map(self._dict, self._client.list_builds(request=request, timeout=SECONDS_PER_CALL, retry=RETRY))

    def default_account(self, parent: str) -> str:
        """The account that builds act as unless they name another one."""
        request = self._module.GetDefaultServiceAccountRequest(name=f"{parent}/defaultServiceAccount")
        found = self._client.get_default_service_account(request=request, timeout=SECONDS_PER_CALL, retry=RETRY)
        account: str = found.service_account_email
        return account.rpartition("/")[2]

    @cached_property
    def _module(self) -> Any:
        from google.cloud.devtools import cloudbuild_v1

        return cloudbuild_v1

    @cached_property
    def _client(self) -> Any:
        return rest_client(self._module.CloudBuildClient, "cloudbuild")

    def _dict(self, build: Any) -> dict[str, Any]:
        found: dict[str, Any] = type(build).to_dict(
            build,
            use_integers_for_enums=False,
            preserving_proto_field_name=False,
            always_print_fields_with_no_presence=False,
        )
        return found


@dataclass(frozen=True)
class StagedSource:
    """A packed source on its way into the bucket."""

    address: str
    files: int
    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    def run(self, progress: Callable[[int, int], None]) -> None:
        """See Upload. What another run has put there meanwhile is the same."""
        from sdtune.backends.storage import RETRY as STORAGE_RETRY
        from sdtune.backends.storage import WRITER, explained, open_client

        progress(0, self.size)
        bucket, name = bucket_and_path(self.address)
        try:
            with explained(self.address, WRITER, let_through=(api.PreconditionFailed,)):
                open_client().bucket(bucket).blob(name).upload_from_file(
                    io.BytesIO(self.content),
                    size=self.size,
                    content_type="application/gzip",
                    if_generation_match=0,
                    checksum="crc32c",
                    retry=STORAGE_RETRY,
                )
        except api.PreconditionFailed:
            pass
        progress(self.size, self.size)


class VertexBuilder:
    """Builds in the project and the first region of ``placement``. See Builder."""

    def __init__(self, placement: Placement, pause: Callable[[float], None] = time.sleep) -> None:
        self.placement = placement
        self.region = placement.region[0]
        self._pause = pause
        self._session = Session()
        self._client = BuildsClient()

    @property
    def place(self) -> str:
        return f"Cloud Build in {self.region}, project {self.placement.project}"

    def render(self, spec: ImageSpec, settings: BuildSettings, *, cache: bool = True) -> dict[str, Any]:
        return build_request(spec, settings, self.placement, cache=cache)

    def as_text(self, rendered: dict[str, Any]) -> str:
        return as_file(rendered, self.placement)

    # What is there ---------------------------------------------------------------------------------------------------

    def find(self, spec: ImageSpec) -> ImageRecord | None:
        if digest := self._tagged(spec.name, spec.tag):
            return ImageRecord(spec.name, f"{spec.address}@{digest}", digest, (spec.tag,), spec.version)
        self._in_repository("the repository cannot be looked at", "")
        return None

    def digest_of(self, uri: str) -> str | None:
        """See Builder. Only of the repository of the placement."""
        name, _, tag = uri.rpartition("/")[2].partition(":")
        return self._tagged(name, tag or "latest")

    def point_tags(self, spec: ImageSpec, digest: str) -> tuple[str, ...]:
        package = f"{self._repository}/packages/{spec.name}"
        version = f"{package.removeprefix('v1/')}/versions/{digest}"
        moved = []
        for tag in spec.tags[1:]:
            present = self._tagged(spec.name, tag)
            if present == digest:
                continue
            body = {"name": f"{package.removeprefix('v1/')}/tags/{tag}", "version": version}
            with self._asking(f"the tag {tag} cannot be set"):
                if present:
                    query = {"updateMask": "version"}
                    self._session.call("artifactregistry", "PATCH", f"{package}/tags/{tag}", body, query=query)
                else:
                    self._set_tag(package, body, tag)
            moved.append(tag)
        return tuple(moved)

    def _set_tag(self, package: str, body: Mapping[str, Any], tag: str) -> None:
        try:
            self._session.call("artifactregistry", "POST", f"{package}/tags", body, query={"tagId": tag})
        except api.Conflict:
            # By a first request, whose answer was lost, or by somebody else for another image.
            there = self._session.call("artifactregistry", "GET", f"{package}/tags/{tag}")
            if there.get("version") != body["version"]:
                raise

    def images(self) -> Iterator[ImageRecord]:
        found: list[ImageRecord] = []
        query: dict[str, Any] = {"pageSize": 500}
        while True:
            answer = self._in_repository("images cannot be listed", "/dockerImages", query)
            found += [image_record(image) for image in answer.get("dockerImages", ())]
            if not answer.get("nextPageToken"):
                break
            query["pageToken"] = answer["nextPageToken"]
        oldest = datetime.min.replace(tzinfo=UTC)
        ours = (image for image in found if image.name.startswith("sdtune-"))
        yield from sorted(ours, key=lambda image: image.uploaded or oldest, reverse=True)

    def _in_repository(self, what: str, path: str, query: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with self._asking(what):
            try:
                return self._session.call("artifactregistry", "GET", self._repository + path, query=query)
            except api.NotFound:
                raise ProjectError(
                    f"there is no repository {self.placement.repository} in {self.region} of project "
                    f"{self.placement.project}; make it, with all else that is needed: sdtune setup"
                ) from None

    def _tagged(self, name: str, tag: str) -> str | None:
        """The digest that a tag names."""
        with self._asking("the image cannot be looked at"):
            try:
                found = self._session.call("artifactregistry", "GET", f"{self._repository}/packages/{name}/tags/{tag}")
            except api.NotFound:
                return None
        digest: str = found["version"].rpartition("/")[2]
        return digest

    @property
    def _repository(self) -> str:
        where = f"v1/projects/{self.placement.project}/locations/{self.region}"
        return f"{where}/repositories/{self.placement.repository}"

    # Building --------------------------------------------------------------------------------------------------------

    def stage(self, spec: ImageSpec) -> Upload | None:
        from sdtune.backends.storage import RETRY as STORAGE_RETRY
        from sdtune.backends.storage import explained, list_names, open_client

        address = source_address(spec, self.placement)
        bucket, name = bucket_and_path(address)
        client = open_client()
        with explained(address):
            there = client.bucket(bucket).blob(name).exists(retry=STORAGE_RETRY)
        if there:
            return None
        try:
            # An object that is not there is told from a bucket that is not.
            list_names(client, address.rpartition("/")[0])
        except ProjectError as error:
            if "there is no bucket" in str(error):
                raise ProjectError(
                    f"there is no bucket {bucket}, in which the source and the log of a build lie; make it with: "
                    "sdtune setup, or name another one: --bucket"
                ) from None
            raise
        return StagedSource(address, len(spec.source.files), spec.source.pack())

    def start(self, rendered: dict[str, Any]) -> Submitted:
        parent = f"projects/{self.placement.project}/locations/{self.region}"
        run = f"run-{new_run_id()}"
        request = {**rendered, "tags": [*rendered["tags"], run]}
        facts = self._facts(rendered)

        def listed() -> Iterator[Submitted]:
            with asking("the build cannot be looked for", facts):
                yield from (submitted(build, self.region) for build in self._client.list(parent, f'tags="{run}"'))

        return make_once(
            lambda: submitted(self._client.create(parent, request), self.region),
            listed,
            lambda made: self.cancel(made.job_id),
            f"gcloud builds list --region={self.region} --filter=tags={run} --project={self.placement.project} tells, "
            "and sdtune build --cancel ID ends it.",
            lambda: asking("the build cannot be started", facts),
            self._pause,
        )

    def full_name(self, build: str) -> str:
        if build.startswith("projects/"):
            return build
        return f"projects/{self.placement.project}/locations/{self.region}/builds/{build}"

    def cancel(self, build_id: str) -> None:
        build = self._get(build_id)
        if state_of(build) in ENDED:
            raise JobError(f"build {build['id']} has ended already ({state_of(build)}); there is nothing to cancel.")
        with self._asking("the build cannot be cancelled"):
            try:
                self._client.cancel(build_id)
            except api.BadRequest:
                # So says the service, too, where the answer to a first request was lost.
                if state_of(self._get(build_id)) != "cancelled":
                    raise

    def follow(self, build_id: str) -> Iterator[BuildNews]:
        build = self._get(build_id)
        log, state, seen = BuildLog(build), "", dict[str, str]()
        readable = True
        while True:
            if state_of(build) != state:
                state = state_of(build)
                if state not in ENDED:
                    yield StateChange(state, WORDS.get(state, state), seconds_between(build, "createTime", "startTime"))
            ended = state in ENDED
            if readable:
                try:
                    for item in self._read(log, ended):
                        # The log has the order of things, the build their times.
                        if isinstance(item, StepChange):
                            seen[item.step] = item.state
                            item = replace(item, seconds=seconds_of(build, item.step) if item.state == "done" else 0.0)
                        yield item
                except ProjectError as error:
                    readable = False
                    text = f"{error} The build goes on, but its log is shown only at {build.get('logUrl', '')}"
                    yield events.Note(text, "warning")
            if ended or not readable:
                yield from changes(build, seen)
            if ended:
                yield self._end(build, log)
                return
            self._pause(SECONDS_BETWEEN_POLLS)
            build = self._get(build_id)

    def _read(self, log: BuildLog, ended: bool) -> Iterator[StepLine | StepChange]:
        yield from log.read()
        for _ in range(DRAIN if ended else 0):
            if log.is_complete:
                break
            self._pause(SECONDS_BETWEEN_POLLS)
            yield from log.read()
        if ended:
            yield from log.rest()

    def _end(self, build: Build, log: BuildLog) -> BuildEnd:
        state = state_of(build)
        pushed = [image for image in build.get("results", {}).get("images", ()) if image.get("digest")]
        wanted = build.get("images", ["the image"])
        name = wanted[0].rpartition("/")[2].partition(":")[0]
        end = BuildEnd(build["id"], name, state, seconds_between(build, "startTime", "finishTime"))
        if end.succeeded:
            digest = pushed[0]["digest"] if pushed else ""
            uris = tuple(image["name"] for image in pushed)
            return replace(end, digest=digest, uris=uris, bases=tuple(log.bases))
        step, code = failed_step(build)
        lines = log.last_lines(step)
        return replace(end, reason=self._reason(build, step, code, lines, log), last_lines=lines)

    def _reason(self, build: Build, step: str, code: int, lines: tuple[str, ...], log: BuildLog) -> str:
        state = state_of(build)
        if state == "timeout":
            limit = show_duration(round(float(build.get("timeout", "0s").rstrip("s"))))
            return f"it did not end within {limit}; give it more: --timeout 4h"
        if state == "cancelled":
            return "it was cancelled."
        if state == "expired":
            return "it waited too long for a machine; try again, or in another --region."
        failure = build.get("failureInfo", {})
        detail = " ".join(filter(None, (failure.get("type"), failure.get("detail"), build.get("statusDetail"))))
        own = log.last_lines("")
        exit_code = f"exited with code {code}" if code else ""
        facts = self._facts(build)
        facts = facts if facts.account else replace(facts, account=self._default_account())
        hint = why_failed(step, lines, "\n".join([detail, exit_code, *own]), facts)
        said = (
            failure.get("detail") or build.get("statusDetail") or (own[-1] if own else "Cloud Build does not say why.")
        )
        where = f"step {step} failed" + (f" (exit code {code})" if code else "") if step else "it failed"
        return f"{where}: {hint or said}"

    def _default_account(self) -> str:
        """What a build acts as that names no account; empty if it cannot be known."""
        try:
            return self._client.default_account(f"projects/{self.placement.project}/locations/{self.region}")
        except (api.GoogleAPIError, GoogleAuthError, RequestException):
            return ""

    def _get(self, build_id: str) -> dict[str, Any]:
        with self._asking("the build cannot be looked at"):
            try:
                return self._client.get(build_id)
            except api.NotFound:
                raise JobError(
                    f"there is no build {build_id.rpartition('/')[2]} in {build_id.split('/')[3]} of project "
                    f"{build_id.split('/')[1]}; --region says where else to look."
                ) from None

    def _asking(self, what: str) -> AbstractContextManager[None]:
        return asking(what, self._facts({}))

    def _facts(self, build: Build) -> Facts:
        return Facts(self.placement, build, build.get("serviceAccount", "").rpartition("/")[2])
