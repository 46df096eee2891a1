"""A Hugging Face Hub on the loopback: as much of its HTTP interface as uploading a model takes.

Source: the client's own requests, huggingface_hub 2.4 (hf_api.py, _commit_api.py, lfs.py), without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_token_of_alice"
READ_ONLY = "hf_token_that_reads"


@dataclass
class Repository:
    """files: the bytes by path, as the commits left them."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What it knows. fail: the status to answer requests with whose path holds the key."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    fail: dict[str, int] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What points a process at this Hub, with a token that may write."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


class RefusedError(Exception):
    """An answer that is none of success."""

    def __init__(self, status: int, text: str, **more: str) -> None:
        super().__init__(text)
        self.status, self.more = status, more


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers while the block runs."""
    hub = Hub()

    class Handler(_Handler):
        knows = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    knows: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None: ...

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        try:
            for part, status in self.knows.fail.items():
                if part in path:
                    raise RefusedError(status, "as the test wants it")
            status, answer = 200, self._route(path, body)
        except RefusedError as refused:
            status, answer = refused.status, {"error": str(refused), **refused.more}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _route(self, path: str, body: bytes) -> Any:
        if path.startswith("/lfs/"):
            return self._store(path.removeprefix("/lfs/"), body)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if token not in (TOKEN, READ_ONLY):
            raise RefusedError(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return {"name": "alice", "type": "user"}
        if token == READ_ONLY and self.command == "POST":
            raise RefusedError(403, "You don't have the rights to create a model under this namespace")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.+))?", path):
            return self._model(found[1], found[2] or "", body, token)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        raise RefusedError(404, f"no such address: {path}")

    def _create(self, wanted: dict[str, Any]) -> Any:
        name = f"{wanted.get('organization') or 'alice'}/{wanted['name']}"
        if name.partition("/")[0] != "alice":
            raise RefusedError(403, "You don't have the rights to create a model under this namespace")
        if name in self.knows.repositories:
            raise RefusedError(409, "You already created this model repo", url=f"{self.knows.address}/{name}")
        self.knows.repositories[name] = Repository(wanted.get("visibility") == "private")
        return {"url": f"{self.knows.address}/{name}"}

    def _model(self, name: str, what: str, body: bytes, token: str) -> Any:
        if (repository := self.knows.repositories.get(name)) is None:
            raise RefusedError(404, "Repository not found")
        if what == "":
            siblings = [{"rfilename": path} for path in repository.files]
            card = repository.files.get("README.md", b"").decode().partition("---\n")[2].partition("\n---\n")[0]
            return {"id": name, "private": repository.private, "siblings": siblings, "cardData": yaml.safe_load(card)}
        if what == "auth-check/write":
            if token == READ_ONLY or not name.startswith("alice/"):
                raise RefusedError(403, "Write access is denied")
            return {}
        if what == "preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            large = (".safetensors", ".png")
            return {
                "files": [
                    {"path": path, "uploadMode": "lfs" if path.endswith(large) else "regular", "shouldIgnore": False}
                    for path in files
                ]
            }
        if what == "commit/main":
            return self._commit(name, repository, body)
        raise RefusedError(404, f"no such address: {what}")

    def _commit(self, name: str, repository: Repository, body: bytes) -> Any:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.knows.lfs[value["oid"]]
        oid = f"{len(repository.commits):040x}"
        return {"commitUrl": f"{self.knows.address}/{name}/commit/{oid}", "commitOid": oid}

    def _batch(self, wanted: dict[str, Any]) -> Any:
        actions = lambda oid: {"upload": {"href": f"{self.knows.address}/lfs/{oid}"}}  # noqa: E731
        return {"transfer": "basic", "objects": [{**one, "actions": actions(one["oid"])} for one in wanted["objects"]]}

    def _store(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "these bytes have another hash")
        self.knows.lfs[oid] = body
        return {}

    def _validate(self, content: str) -> Any:
        """The Hub takes a base model that is an id, and no path."""
        metadata = yaml.safe_load(content.partition("---\n")[2].partition("\n---\n")[0])
        if "/" not in metadata.get("base_model", "a/b"):
            raise RefusedError(400, '"base_model" is not valid')
        return {"errors": [], "warnings": []}
