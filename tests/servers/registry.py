"""Artifact Registry, as far as images go, and Service Usage: what they keep, and what they answer.

They are served by build.py, at one address.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from typing import Any

from tests.servers.vertex_json import TYPES, ApiError, bad_request


@dataclass
class Request:
    """One request as it came. path: decoded, without the query; body: of JSON, None where there was none."""

    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    queries: Mapping[str, list[str]] = field(default_factory=dict)
    """All values of those that are given more than once."""


class Operations:
    """What takes longer than a request. slow: how often an operation is asked for before it is done."""

    def __init__(self) -> None:
        self.slow = 1
        self.running: dict[str, tuple[int, dict[str, Any]]] = {}
        self._numbers = count(1)

    def start(self, parent: str, response: dict[str, Any], work: Callable[[], Any]) -> dict[str, Any]:
        name = f"{parent}/{next(self._numbers)}"
        work()
        self.running[name] = (self.slow, {"name": name, "done": True, "response": response})
        return {"name": name}

    def get(self, request: Request, name: str) -> dict[str, Any]:
        if name not in self.running:
            raise ApiError(404, "Requested entity was not found.")
        left, answer = self.running[name]
        self.running[name] = (left - 1, answer)
        return answer if left <= 0 else {"name": name}


class Services:
    """APIs of projects. enabled: by project."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.enabled: dict[str, set[str]] = {}

    def get_services(self, request: Request, project: str) -> dict[str, Any]:
        names = request.queries.get("names", [])
        if not names or any(not name.startswith(f"projects/{project}/services/") for name in names):
            raise bad_request("names must be of services of the parent", [("names", "wanted some.")])
        on = self.enabled.get(project, set())
        states = {name: "ENABLED" if name.rpartition("/")[2] in on else "DISABLED" for name in names}
        return {"services": [{"name": name, "state": state} for name, state in states.items()]}

    def enable_services(self, request: Request, project: str) -> dict[str, Any]:
        services = request.body["serviceIds"]
        if not 0 < len(services) <= 20:
            raise bad_request("1 to 20 services can be enabled at once", [("service_ids", "wanted 1 to 20.")])
        return self.operations.start(
            "operations", {"services": services}, lambda: self.enabled.setdefault(project, set()).update(services)
        )

    def need(self, parent: str, service: str) -> None:
        """403 where it is off; a project of which nothing was said has all."""
        project = parent.split("/")[1]
        if project in self.enabled and f"{service}.googleapis.com" not in self.enabled[project]:
            text = f"Artifact Registry API has not been used in project {project} before or it is disabled."
            info = {
                "@type": f"{TYPES}google.rpc.ErrorInfo", "reason": "SERVICE_DISABLED", "domain": "googleapis.com",
                "metadata": {"service": f"{service}.googleapis.com"},
            }  # fmt: skip
            raise ApiError(403, text, details=[info])


class Registry:
    """Repositories and images, by their full names, as the API describes them."""

    def __init__(self, services: Services) -> None:
        self.services, self.operations = services, services.operations
        self.repositories: dict[str, dict[str, Any]] = {}
        self.images: dict[str, dict[str, Any]] = {}

    def repository(self, project: str, region: str, name: str, kind: str = "DOCKER") -> None:
        """Make one."""
        full = f"projects/{project}/locations/{region}/repositories/{name}"
        self.repositories[full] = {"name": full, "format": kind, "mode": "STANDARD_REPOSITORY"}

    def image(self, uri: str, uploaded: datetime, size: int = 3_000_000_000, tags: Iterable[str] = ()) -> str:
        """Put one there, without a build; its digest."""
        digest = f"sha256:{hashlib.sha256(f'{uri}{uploaded}'.encode()).hexdigest()}"
        self.store(uri, digest, uploaded, size, tags)
        return digest

    def tags(self, address: str) -> dict[str, str]:
        """The tags of an image and the digests that they name."""
        found = [image for image in self.images.values() if image["uri"].startswith(f"{address}@")]
        return {tag: image["uri"].partition("@")[2] for image in found for tag in image["tags"]}

    def get_repository(self, request: Request, name: str) -> dict[str, Any]:
        if name not in self.repositories:
            raise ApiError(404, "Requested entity was not found.")
        return self.repositories[name]

    def create_repository(self, request: Request, parent: str) -> dict[str, Any]:
        name = f"{parent}/repositories/{request.query.get('repositoryId', '')}"
        self.services.need(parent, "artifactregistry")
        if not re.fullmatch(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?", name.rpartition("/")[2]):
            raise bad_request("repository_id is not valid", [("repository_id", "must be a name.")])
        if request.body.get("format") != "DOCKER":
            raise bad_request("the format is not one of this server's", [("repository.format", "wanted DOCKER")])
        if name in self.repositories:
            raise ApiError(409, "the repository already exists")
        made = {"name": name, **request.body}
        return self.operations.start(f"{parent}/operations", made, lambda: self.repositories.update({name: made}))

    def list_images(self, request: Request, name: str) -> dict[str, Any]:
        self.get_repository(request, name)
        found = [image for key, image in self.images.items() if key.startswith(f"{name}/")]
        size, start = int(request.query.get("pageSize") or 100), int(request.query.get("pageToken") or 0)
        more = {"nextPageToken": str(start + size)} if start + size < len(found) else {}
        return {"dockerImages": found[start : start + size], **more}

    def get_tag(self, request: Request, repository: str, package: str, tag: str) -> dict[str, Any]:
        for image in self.of(repository, package):
            if tag in image["tags"]:
                base = f"{repository}/packages/{package}"
                return {"name": f"{base}/tags/{tag}", "version": f"{base}/versions/{image['uri'].partition('@')[2]}"}
        raise ApiError(404, "Requested entity was not found.")

    def set_tag(self, request: Request, repository: str, package: str, tag: str = "") -> dict[str, Any]:
        """Both the making of a tag and its change."""
        new = request.method == "POST"
        tag = request.query["tagId"] if new else tag
        images = self.of(repository, package)
        if new == any(tag in image["tags"] for image in images):
            raise ApiError(409 if new else 404, f"the tag {tag} is {'there' if new else 'not there'}")
        if not new and request.query.get("updateMask") != "version":
            raise bad_request("update_mask must be set", [("update_mask", "wanted version.")])
        digest = request.body["version"].rpartition("/")[2]
        target = next((image for image in images if image["uri"].endswith(f"@{digest}")), None)
        if target is None:
            raise ApiError(404, "the version does not exist")
        for image in images:
            image["tags"] = [one for one in image["tags"] if one != tag]
        target["tags"].append(tag)
        return self.get_tag(request, repository, package, tag)

    def of(self, repository: str, package: str) -> list[dict[str, Any]]:
        return [image for key, image in self.images.items() if key.startswith(f"{repository}/dockerImages/{package}@")]

    def store(self, address: str, digest: str, uploaded: datetime, size: int, tags: Iterable[str]) -> None:
        host, project, repository, package = address.split("/")
        region = host.removesuffix("-docker.pkg.dev")
        where = f"projects/{project}/locations/{region}/repositories/{repository}"
        for image in self.of(where, package):
            image["tags"] = [tag for tag in image["tags"] if tag not in tags]
        key = f"{where}/dockerImages/{package}@{digest}"
        stored = self.images.setdefault(
            key,
            {
                "name": key, "uri": f"{address}@{digest}", "tags": [], "imageSizeBytes": str(size),
                "uploadTime": uploaded.isoformat().replace("+00:00", "Z"),
                "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            },
        )  # fmt: skip
        stored["tags"] += tags
