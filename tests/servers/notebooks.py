"""The Notebooks API, version 2, on 127.0.0.1: instances of Workbench that are made, started, stopped and deleted.

Requests are read by the published messages and checked as the service checks them: unknown fields, parameters and zones
are refused, a request id that comes again makes nothing twice, and of an instance that is at something no more is
taken. Time passes when somebody looks: each look at an instance or at its operation takes it further.

    with NotebooksServer() as server:
        server.script("create", code=8, message="Quota 'NVIDIA_T4_GPUS' exceeded.  Limit: 0.0 in region us-central1.")

Not there: changes of an instance, upgrades, snapshots, IAM.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from google.cloud.notebooks_v2 import types

from tests.servers.faults import Befallen, respond
from tests.servers.loopback import Loopback, Quiet
from tests.servers.notebooks_rules import check
from tests.servers.registry import Request
from tests.servers.vertex_json import TYPES, ApiError, bad_request, parse

ZONES = {f"{region}-{zone}" for region in ("us-central1", "europe-west4", "asia-southeast1") for zone in "abc"}
ZONES |= {f"us-east1-{zone}" for zone in "bcd"}
OUTPUTS = ("name", "proxyUri", "creator", "state", "upgradeHistory", "id", "healthState", "healthInfo", "createTime",
           "updateTime")  # fmt: skip
"""What only the service says. gcloud sends a name all the same."""
EVERYWHERE = {"alt", "$alt", "fields", "key", "prettyPrint", "quotaUser", "userProject"}
WAYS = {
    "create": ("INITIALIZING", "PROVISIONING", "ACTIVE"),
    "start": ("STARTING", "PROVISIONING", "ACTIVE"),
    "stop": ("STOPPING", "STOPPED"),
    "suspend": ("SUSPENDING", "SUSPENDED"),
    "delete": ("STOPPING", "DELETED"),
}
"""Verb to the states that an instance passes through."""


@dataclass
class Script:
    """How ``times`` operations end. leaves: an instance that could not be made is there all the same."""

    code: int
    message: str
    times: int = 1
    zone: str = ""
    leaves: bool = False


@dataclass
class Operation:
    """Something that an instance is at. looks: that have been taken at its present state."""

    name: str
    verb: str
    instance: str
    way: tuple[str, ...]
    script: Script | None
    looks: int = 0
    step: int = 0
    begun: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def has_ended(self) -> bool:
        return self.step == len(self.way) - 1


class NotebooksServer(Befallen, Loopback):
    """instances: by their full names; requests: all that came.

    slow: looks that a state lasts; url_is_late: looks after which an active instance has its address; unreachable:
    zones that do not answer when all are asked.
    """

    def __init__(self, slow: int = 1, url_is_late: int = 0) -> None:
        super().__init__()
        self.slow, self.url_is_late = slow, url_is_late
        self.instances: dict[str, dict[str, Any]] = {}
        self.operations: dict[str, Operation] = {}
        self.unreachable: list[str] = []
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._by_request: dict[str, str] = {}
        self._scripts: dict[str, list[Script]] = {}
        self.listen(_Handler)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which sdtune and gcloud find this server, and need no credentials."""
        return {
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_NOTEBOOKS": f"{self.address}/",
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "NO_GCE_CHECK": "true",
        }

    # What tests order ------------------------------------------------------------------------------------------------

    def script(self, verb: str, **how: Any) -> None:
        """Let operations of this verb end with an error: see Script."""
        self._scripts.setdefault(verb, []).append(Script(**how))

    def put(self, name: str, zone: str = "us-central1-a", state: str = "ACTIVE", **more: Any) -> str:
        """An instance that is there, made by somebody; its full name."""
        full = f"projects/my-project/locations/{zone}/instances/{name}"
        self.instances[full] = {
            "name": full, "state": state, "createTime": _now(), "gceSetup": {"machineType": "e2-standard-4"}, **more,
        }  # fmt: skip
        if state == "ACTIVE":
            self.instances[full]["proxyUri"] = _uri(full)
        return full

    def suspend(self, name: str) -> None:
        """Let somebody suspend it: the API has no method for that, but its states know it."""
        self._begin("suspend", name)

    def answer(self, request: Request) -> dict[str, Any]:
        """The answer as JSON. ApiError otherwise."""
        for method, pattern, allowed, action in _ROUTES:
            if method == request.method and (found := re.fullmatch(pattern, request.path)):
                if unknown := sorted(set(request.query) - EVERYWHERE - allowed):
                    text = f'Invalid JSON payload received. Unknown name "{unknown[0]}": Cannot bind query parameter.'
                    raise bad_request(text, [("", text)])
                with self.lock:
                    return action(self, request, *found.groups())
        raise ApiError(404, f"Method not found: {request.method} {request.path}")

    # The methods -----------------------------------------------------------------------------------------------------

    def create(self, request: Request, parent: str) -> dict[str, Any]:
        name, request_id = request.query.get("instanceId", ""), request.query.get("requestId", "")
        zone = parent.rpartition("/")[2]
        if zone not in ZONES:
            raise ApiError(403, f"Location {zone} is not found or access is unauthorized.")
        if not re.fullmatch(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?", name):
            raise bad_request("Invalid instance ID", [("instance_id", "must be 1-63 characters: a-z, 0-9, -.")])
        if request_id:
            try:
                uuid.UUID(request_id)
            except ValueError:
                raise bad_request("Invalid request ID", [("request_id", "must be a UUID.")]) from None
            if request_id in self._by_request:
                return self._describe(self.operations[self._by_request[request_id]])
        body = {name: value for name, value in (request.body or {}).items() if name not in OUTPUTS}
        check(body)
        full = f"{parent}/instances/{name}"
        if full in self.instances:
            raise ApiError(409, f"Resource '{full}' already exists")
        setup = body.setdefault("gceSetup", {})
        setup.setdefault("machineType", "e2-standard-4")
        setup["metadata"] = {
            **setup.get("metadata", {}), "notebooks-api": "PROD", "proxy-mode": "service_account",
        }  # fmt: skip
        body["labels"] = {**body.get("labels", {}), "notebooks-product": "workbench-instances"}
        self.instances[full] = {"name": full, "id": str(uuid.uuid4()), "creator": "ann@example.com", **body}
        self.instances[full] |= {"createTime": _now(), "updateTime": _now()}
        operation = self._begin("create", full)
        if request_id:
            self._by_request[request_id] = operation.name
        return self._describe(operation)

    def list_instances(self, request: Request, parent: str) -> dict[str, Any]:
        _, project, _, zone = parent.split("/")
        wanted = re.compile(rf"projects/{re.escape(project)}/locations/{'[^/]+' if zone == '-' else zone}/")
        found = [one for name, one in self.instances.items() if wanted.match(name)]
        size, start = int(request.query.get("pageSize") or 500), int(request.query.get("pageToken") or 0)
        answer: dict[str, Any] = {"instances": found[start : start + size]}
        if start + size < len(found):
            answer["nextPageToken"] = str(start + size)
        if zone == "-" and self.unreachable:
            answer["unreachable"] = self.unreachable
        return answer

    def get(self, request: Request, name: str) -> dict[str, Any]:
        instance = self._instance(name)
        for operation in self.operations.values():
            if operation.instance == name and not operation.has_ended:
                self._look(operation)
        if name not in self.instances:
            raise ApiError(404, f"Resource '{name}' was not found")
        if instance["state"] == "ACTIVE" and "proxyUri" not in instance:
            instance["looks"] = instance.get("looks", 0) + 1
            if instance["looks"] > self.url_is_late:
                instance["proxyUri"] = _uri(name)
        return {key: value for key, value in instance.items() if key != "looks"}

    def change(self, request: Request, name: str, verb: str) -> dict[str, Any]:
        instance = self._instance(name)
        if request.body != {}:
            parse(request.body, getattr(types, f"{verb.title()}InstanceRequest").pb()(), "")
        self._need_rest(name)
        wanted = ("STOPPED", "SUSPENDED") if verb == "start" else ("ACTIVE", "PROVISIONING", "STARTING")
        if instance["state"] not in wanted:
            text = f"Instance {name} is in state {instance['state']}, it cannot be {verb}ed."
            raise ApiError(400, text, "FAILED_PRECONDITION")
        return self._describe(self._begin(verb, name))

    def delete(self, request: Request, name: str) -> dict[str, Any]:
        self._instance(name)
        self._need_rest(name)
        return self._describe(self._begin("delete", name))

    def get_operation(self, request: Request, name: str) -> dict[str, Any]:
        if name not in self.operations:
            raise ApiError(404, f"Operation '{name}' was not found")
        operation = self.operations[name]
        if not operation.has_ended:
            self._look(operation)
        return self._describe(operation)

    # What happens ----------------------------------------------------------------------------------------------------

    def _instance(self, name: str) -> dict[str, Any]:
        if name not in self.instances:
            raise ApiError(404, f"Resource '{name}' was not found")
        return self.instances[name]

    def _need_rest(self, name: str) -> None:
        if any(operation.instance == name and not operation.has_ended for operation in self.operations.values()):
            raise ApiError(409, "unable to queue the operation", "ABORTED")

    def _begin(self, verb: str, instance: str) -> Operation:
        zone = instance.split("/")[3]
        scripts = [one for one in self._scripts.get(verb, []) if one.times > 0 and one.zone in ("", zone)]
        script = scripts[0] if scripts else None
        way = WAYS[verb]
        if script:
            script.times -= 1
            way = (
                *way[:-1],
                "STOPPED" if verb == "start" or script.leaves else "DELETED" if verb == "create" else "ACTIVE",
            )
        name = f"{instance.rpartition('/instances/')[0]}/operations/operation-{uuid.uuid4()}"
        self.operations[name] = operation = Operation(name, verb, instance, way, script)
        self._enter(operation)
        return operation

    def _look(self, operation: Operation) -> None:
        operation.looks += 1
        if operation.looks > self.slow:
            operation.looks, operation.step = 0, operation.step + 1
            self._enter(operation)

    def _enter(self, operation: Operation) -> None:
        instance = self.instances[operation.instance]
        instance["state"], instance["updateTime"] = operation.way[operation.step], _now()
        if instance["state"] == "DELETED":
            del self.instances[operation.instance]
        if instance["state"] == "ACTIVE":
            instance["healthState"] = "HEALTHY"
            if not self.url_is_late:
                instance["proxyUri"] = _uri(operation.instance)

    def _describe(self, operation: Operation) -> dict[str, Any]:
        metadata = {
            "@type": f"{TYPES}google.cloud.notebooks.v2.OperationMetadata", "verb": operation.verb, "apiVersion": "v2",
            "target": operation.instance, "createTime": operation.begun.isoformat().replace("+00:00", "Z"),
        }  # fmt: skip
        found: dict[str, Any] = {"name": operation.name, "metadata": metadata, "done": operation.has_ended}
        if operation.has_ended and operation.script:
            found["error"] = {"code": operation.script.code, "message": operation.script.message}
        elif operation.has_ended:
            kind = "google.protobuf.Empty" if operation.verb == "delete" else "google.cloud.notebooks.v2.Instance"
            found["response"] = {"@type": f"{TYPES}{kind}", **self.instances.get(operation.instance, {})}
        return found


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _uri(name: str) -> str:
    """Without its scheme, as the service gives it."""
    region = name.split("/")[3][:-2]
    return f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-dot-{region}.notebooks.googleusercontent.com"


_PARENT = r"/v2/(projects/[^/]+/locations/[^/]+)/instances"
_INSTANCE = r"/v2/(projects/[^/]+/locations/[^/]+/instances/[^/:]+)"
_ROUTES: tuple[tuple[str, str, set[str], Callable[..., dict[str, Any]]], ...] = (
    ("POST", _PARENT, {"instanceId", "requestId"}, NotebooksServer.create),
    ("GET", _PARENT, {"pageSize", "pageToken", "orderBy", "filter"}, NotebooksServer.list_instances),
    ("GET", _INSTANCE, set(), NotebooksServer.get),
    ("DELETE", _INSTANCE, {"requestId"}, NotebooksServer.delete),
    ("POST", rf"{_INSTANCE}:(start|stop)", set(), NotebooksServer.change),
    ("GET", r"/v2/(projects/[^/]+/locations/[^/]+/operations/[^/]+)", set(), NotebooksServer.get_operation),
)


class _Handler(Quiet):
    server_of: NotebooksServer

    def _dispatch(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urlsplit(self.path)
        query: Mapping[str, str] = {
            name: values[-1] for name, values in parse_qs(address.query, keep_blank_values=True).items()
        }
        request = Request(self.command, unquote(address.path), query, json.loads(raw) if raw else None)
        self.server_of.requests.append(request)
        respond(self, self.server_of, request.path, lambda: self.server_of.answer(request))

    do_GET = do_POST = do_DELETE = _dispatch  # noqa: N815
