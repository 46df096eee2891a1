"""Cloud Build on 127.0.0.1, with Artifact Registry, Service Usage and the making of buckets: their REST protocols.

A build is checked as the service checks it, and played: its steps succeed one after the other, with the lines that they
were told to write, or fail as they were told. Nothing is run but what a test gives them to do. The log goes where the
build says, into a storage server, by pieces that end anywhere; what succeeds is in the registry then.

    with BuildServer(storage) as server:
        server.registry.repository("my-project", "us-central1", "sdtune")
        server.script("smoke-test", Script(["Traceback ..."], exit_code=1))

Not there: triggers, worker pools, approvals, Docker, the rights of accounts.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from google.cloud.devtools.cloudbuild_v1 import types

from tests.servers.build_rules import check
from tests.servers.faults import Befallen, respond
from tests.servers.loopback import Loopback, Quiet
from tests.servers.registry import Operations, Registry, Request, Services
from tests.servers.storage import StorageServer
from tests.servers.vertex_json import TYPES, ApiError, bad_request, parse, to_json

STATUS = types.Build.Status
ENDED = {STATUS.SUCCESS, STATUS.FAILURE, STATUS.TIMEOUT, STATUS.CANCELLED, STATUS.INTERNAL_ERROR, STATUS.EXPIRED}
REGIONS = {"global", "us-central1", "europe-west4", "asia-southeast1"}
OUTPUTS = (
    "id", "name", "project_id", "status", "status_detail", "results", "create_time", "start_time", "finish_time",
    "source_provenance", "log_url", "timing", "warnings", "failure_info",
)  # fmt: skip
"""What only the service says."""
DEFAULT_ACCOUNT = "123456789012-compute@developer.gserviceaccount.com"
PIECE = 41
"""Bytes of log that are written at once: lines, and letters of several bytes, are torn."""


@dataclass
class Script:
    """What a step does. hold: an event that it waits for before it ends; seconds: that it takes.

    work: does it for real, in the folder of the unpacked source, and returns the lines; AssertionError: it failed.
    """

    lines: Iterable[str] = ()
    exit_code: int = 0
    hold: threading.Event | None = None
    seconds: float = 0.0
    work: Callable[[Path], Iterable[str]] | None = None


@dataclass
class Push:
    """How the push of a build's images goes. failure: a FailureType's name, or empty."""

    failure: str = ""
    lines: Iterable[str] = ()


class BuildServer(Befallen, Loopback):
    """builds: by id. requests: all that came. delay: seconds between two steps of a build."""

    def __init__(self, storage: StorageServer | None = None, delay: float = 0.0) -> None:
        super().__init__()
        self.storage = storage
        self.delay = delay
        self.requests: list[Request] = []
        self.builds: dict[str, types.Build] = {}
        self.operations = Operations()
        self.services = Services(self.operations)
        self.registry = Registry(self.services)
        self.push = Push()
        self.lock = threading.RLock()
        self._scripts: dict[tuple[str, str], Script] = {}
        self._players: list[threading.Thread] = []
        self._closed = threading.Event()
        self.listen(_Handler)

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        for script in self._scripts.values():
            if script.hold:
                script.hold.set()
        super().__exit__(*error)
        for player in self._players:
            player.join(timeout=5)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which sdtune, gcloud and Google's clients find this server and the storage."""
        at = f"{self.address}/"
        names = ("CLOUDBUILD", "ARTIFACTREGISTRY", "SERVICEUSAGE")
        found = {f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name}": at for name in names}
        if self.storage:
            found["STORAGE_EMULATOR_HOST"] = self.storage.address
            found["CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE"] = f"{self.storage.address}/storage/v1/"
        return found

    # What tests order ------------------------------------------------------------------------------------------------

    def script(self, step: str, script: Script, image: str = "") -> None:
        """What the step of this id does, in every build, or in those whose images' addresses contain ``image``."""
        self._scripts[step, image] = script

    def answer(self, request: Request) -> dict[str, Any]:
        """The answer as JSON. ApiError otherwise."""
        for pattern, actions in _ROUTES:
            if found := re.fullmatch(pattern, request.path):
                action = actions.get(request.method)
                if action:
                    with self.lock:
                        answer: dict[str, Any] = action(self)(request, *found.groups())
                    return answer
        raise ApiError(404, f"Method not found: {request.method} {request.path}")

    # Cloud Build -----------------------------------------------------------------------------------------------------

    def create_build(self, request: Request, project: str, region: str) -> dict[str, Any]:
        if region not in REGIONS:
            raise ApiError(404, f"There is no service for the region {region}.")
        build = types.Build()
        message = types.Build.pb(build)
        parse(request.body, message, "build")
        for name in OUTPUTS:
            message.ClearField(name)
        check(build)
        build.id = str(uuid.uuid4())
        build.name = f"projects/{project}/locations/{region}/builds/{build.id}"
        build.project_id = project
        build.status = STATUS.QUEUED
        build.create_time = datetime.now(UTC)
        build.log_url = (
            f"https://console.cloud.google.com/cloud-build/builds;region={region}/{build.id}?project={project}"
        )
        build.logs_bucket = build.logs_bucket or f"gs://{project}_cloudbuild"
        self.builds[build.id] = build
        player = threading.Thread(target=self._play, args=(build, region), daemon=True)
        self._players.append(player)
        described = {"@type": f"{TYPES}google.devtools.cloudbuild.v1.BuildOperationMetadata"}
        answer = {"metadata": {**described, "build": to_json(message, request.query)}}
        player.start()
        encoded = base64.urlsafe_b64encode(build.id.encode()).decode()
        return {"name": f"operations/build/{project}/{encoded}", **answer}

    def get_build(self, request: Request, project: str, region: str, build_id: str) -> dict[str, Any]:
        return to_json(types.Build.pb(self._build(project, region, build_id)), request.query)

    def cancel_build(self, request: Request, project: str, region: str, build_id: str) -> dict[str, Any]:
        build = self._build(project, region, build_id)
        if build.status in ENDED:
            raise ApiError(400, "Cannot cancel a build that is completed.", "FAILED_PRECONDITION")
        build.status = STATUS.CANCELLED
        build.finish_time = datetime.now(UTC)
        return to_json(types.Build.pb(build), request.query)

    def list_builds(self, request: Request, project: str, region: str) -> dict[str, Any]:
        wanted = request.query.get("filter", "")
        tag = re.fullmatch(r'tags\s*=\s*"([^"]*)"', wanted)
        if wanted and not tag:
            raise bad_request(f"Invalid filter: {wanted}", [("filter", "only tags can be asked for here.")])
        start = f"projects/{project}/locations/{region}/"
        found = [
            to_json(types.Build.pb(build), request.query)
            for build in reversed(self.builds.values())
            if build.name.startswith(start) and (not tag or tag[1] in build.tags)
        ]
        return {"builds": found} if found else {}

    def get_account(self, request: Request, project: str, region: str) -> dict[str, Any]:
        name = f"projects/{project}/locations/{region}/defaultServiceAccount"
        return {"name": name, "serviceAccountEmail": DEFAULT_ACCOUNT}

    def _build(self, project: str, region: str, build_id: str) -> types.Build:
        build = self.builds.get(build_id)
        if build is None or build.name != f"projects/{project}/locations/{region}/builds/{build_id}":
            raise ApiError(404, f"Requested entity was not found: {build_id}")
        return build

    def _play(self, build: types.Build, region: str) -> None:
        """The build from its start to its end, or until it is cancelled."""
        log = _Log(self.storage, build)
        with self.lock:
            build.status, build.start_time = STATUS.WORKING, datetime.now(UTC)
        log.write(f'starting build "{build.id}"', "")
        if source := build.source.storage_source:
            log.write("FETCHSOURCE", f"Fetching storage object: gs://{source.bucket}/{source.object_}#1")
            if self.storage and source.object_ not in self.storage.buckets.get(source.bucket, {}):
                log.write("ERROR", "ERROR: failed to fetch source: storage: object doesn't exist")
                return self._end(build, STATUS.FAILURE, "FETCH_SOURCE_FAILED", "could not fetch the source")
        log.write("BUILD")
        for number, step in enumerate(build.steps):
            name = step.id or f"step {number}"
            script = self._script_of(name, build)
            with self.lock:
                if build.status in ENDED:
                    break
                step.status, step.timing = STATUS.WORKING, {"start_time": datetime.now(UTC)}
            prefix = f'Step #{number} - "{name}"'
            lines, exit_code = self._done(script, build)
            log.write(f"Starting {prefix}", *(f"{prefix}: {line}" for line in lines))
            if script.hold:
                script.hold.wait()
            self._closed.wait(self.delay or script.seconds)
            with self.lock:
                if build.status in ENDED:
                    step.status = STATUS.CANCELLED
                    break
                step.timing.end_time = datetime.now(UTC)
                step.exit_code = exit_code
                step.status = STATUS.FAILURE if exit_code else STATUS.SUCCESS
            if exit_code:
                text = f"step exited with non-zero status: {exit_code}"
                log.write("ERROR", f'ERROR: build step {number} "{step.name}" failed: {text}')
                detail = f'Build step failure: build step {number} "{step.name}" failed: {text}'
                return self._end(build, STATUS.FAILURE, "USER_BUILD_STEP", detail)
            log.write(f"Finished {prefix}")
        if build.status == STATUS.CANCELLED:
            log.write("CANCELLED", "ERROR: context canceled")
            return None
        return self._push(build, log)

    def _done(self, script: Script, build: types.Build) -> tuple[Iterable[str], int]:
        """The lines of a step, and its exit code."""
        if script.work is None:
            return script.lines, script.exit_code
        assert self.storage
        source = build.source.storage_source
        packed = self.storage.buckets[source.bucket][source.object_].data
        with TemporaryDirectory(prefix="build-") as folder:
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(folder, filter="data")
            try:
                return [*script.lines, *script.work(Path(folder))], 0
            except AssertionError as error:
                return str(error).splitlines(), 1

    def _script_of(self, step: str, build: types.Build) -> Script:
        uri = build.images[0] if build.images else ""
        found = [script for (name, image), script in self._scripts.items() if name == step and image in uri]
        return found[-1] if found else Script([f"{step} says ü"])

    def _push(self, build: types.Build, log: _Log) -> None:
        started = datetime.now(UTC)
        log.write("PUSH", *(f"Pushing {uri}" for uri in build.images), *self.push.lines)
        build.timing["PUSH"] = types.TimeSpan(start_time=started, end_time=datetime.now(UTC))
        if self.push.failure:
            log.write("ERROR", f"ERROR: failed to push because we ran out of retries: {self.push.failure}")
            return self._end(build, STATUS.FAILURE, self.push.failure, "Build failed during push")
        digest = f"sha256:{hashlib.sha256(build.id.encode()).hexdigest()}"
        for uri in build.images:
            address, _, tag = uri.rpartition(":")
            with self.lock:
                self.registry.store(address, digest, datetime.now(UTC), 3_100_000_000, [tag])
                build.results.images.append(types.BuiltImage(name=uri, digest=digest))
        log.write("DONE")
        return self._end(build, STATUS.SUCCESS)

    def _end(self, build: types.Build, status: Any, failure: str = "", detail: str = "") -> None:
        with self.lock:
            if failure:
                build.failure_info = types.Build.FailureInfo(
                    type_=types.Build.FailureInfo.FailureType[failure], detail=detail
                )
            build.status, build.finish_time = status, datetime.now(UTC)


class _Log:
    """The log of a build, in the bucket that it names."""

    def __init__(self, storage: StorageServer | None, build: types.Build) -> None:
        self.storage, self.text = storage, b""
        bucket, _, folder = build.logs_bucket.removeprefix("gs://").partition("/")
        self.bucket, self.name = bucket, f"{folder}/log-{build.id}.txt".lstrip("/")

    def write(self, *lines: str) -> None:
        if not self.storage:
            return
        text = "".join(f"{line}\n" for line in lines).encode()
        for start in range(0, len(text), PIECE):
            self.text += text[start : start + PIECE]
            self.storage.put(self.bucket, self.name, self.text, contentType="text/plain")


_BUILDS = r"/v1/projects/([^/]+)/locations/([^/]+)/builds"
_REPOSITORY = r"/v1/(projects/[^/]+/locations/[^/]+/repositories/[^/]+)"
_ROUTES: tuple[tuple[str, Mapping[str, Callable[[BuildServer], Any]]], ...] = (
    (_BUILDS, {"POST": lambda server: server.create_build, "GET": lambda server: server.list_builds}),
    (rf"{_BUILDS}/([^/:]+)", {"GET": lambda server: server.get_build}),
    (rf"{_BUILDS}/([^/:]+):cancel", {"POST": lambda server: server.cancel_build}),
    (
        r"/v1/projects/([^/]+)/locations/([^/]+)/defaultServiceAccount",
        {"GET": lambda server: server.get_account},
    ),
    (_REPOSITORY, {"GET": lambda server: server.registry.get_repository}),
    (r"/v1/(projects/[^/]+/locations/[^/]+)/repositories", {"POST": lambda server: server.registry.create_repository}),
    (rf"{_REPOSITORY}/dockerImages", {"GET": lambda server: server.registry.list_images}),
    (rf"{_REPOSITORY}/packages/([^/]+)/tags", {"POST": lambda server: server.registry.set_tag}),
    (
        rf"{_REPOSITORY}/packages/([^/]+)/tags/([^/]+)",
        {"GET": lambda server: server.registry.get_tag, "PATCH": lambda server: server.registry.set_tag},
    ),
    (r"/v1/projects/([^/]+)/services:batchGet", {"GET": lambda server: server.services.get_services}),
    (r"/v1/projects/([^/]+)/services:batchEnable", {"POST": lambda server: server.services.enable_services}),
    (r"/v1/((?:projects/[^/]+/locations/[^/]+/)?operations/[^/]+)", {"GET": lambda server: server.operations.get}),
)
"""The first that matches, and has the method."""


class _Handler(Quiet):
    server_of: BuildServer

    def _dispatch(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urlsplit(self.path)
        queries = parse_qs(address.query, keep_blank_values=True)
        query = {name: values[-1] for name, values in queries.items()}
        body = json.loads(raw) if raw else None
        request = Request(self.command, unquote(address.path), query, body, queries)
        self.server_of.requests.append(request)
        respond(self, self.server_of, request.path, lambda: self.server_of.answer(request))

    do_GET = do_POST = do_PATCH = do_DELETE = _dispatch  # noqa: N815


class BucketServer(StorageServer):
    """Cloud Storage in which buckets can be made. made: what each was made with. taken: names of other people's."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, dict[str, Any]] = {}
        self.taken: set[str] = set()
        served = self._http.RequestHandlerClass
        self._http.RequestHandlerClass = type("Handler", (_MakesBuckets, served), {"buckets_of": self})


class _MakesBuckets:
    buckets_of: BucketServer

    def do_POST(self: Any) -> None:  # noqa: N802
        if urlsplit(self.path).path != "/storage/v1/b":
            return self._dispatch()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, name = self.buckets_of, body["name"]
        server.requests.append(f"POST {unquote(self.path)}")
        if name in server.taken or name in server.buckets:
            return self._error(409, "The requested bucket name is not available.")
        server.buckets[name], server.made[name] = {}, body
        server.locations[name] = body.get("location", "US").upper()
        if server.take_fault("POST", self.path):  # the line breaks after the work
            self.close_connection = True
            return None
        return self._json({"kind": "storage#bucket", "id": name, **body})

    def do_GET(self: Any) -> None:  # noqa: N802
        address = urlsplit(self.path)
        if address.path != "/storage/v1/b":
            return self._dispatch()
        start = parse_qs(address.query).get("prefix", [""])[0]
        names = [name for name in self.buckets_of.buckets if name.startswith(start)]
        return self._json({"kind": "storage#buckets", "items": [{"id": name, "name": name} for name in names]})
