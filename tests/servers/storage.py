"""Cloud Storage on 127.0.0.1: enough of its JSON API for Google's own clients, with faults to order.

STORAGE_EMULATOR_HOST=http://127.0.0.1:PORT sends the Python client here, CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE (the
same and /storage/v1/) gcloud. Objects live in memory, in their newest generation only, as in a bucket without
versioning. Not there: access control but for what is asked of it, composing, the XML API, batches.

    with StorageServer() as server:
        server.put("bucket", "folder/name", b"content")
        server.fail("GET", "folder/name", 403)
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import count
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c

from tests.servers.loopback import Loopback, Quiet

PAGE = 1000
NONE: Mapping[str, str] = {}
HASHES = {"crc32c": "crc32c", "md5Hash": "md5"}
_OBJECT = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/(.+)")
_OBJECTS = re.compile(r"(?:/resumable)?(?:/upload)?/storage/v1/b/([^/]+)/o")
_BUCKET = re.compile(r"/storage/v1/b/([^/]+)(/iam/testPermissions)?")
_REWRITE = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)")


@dataclass
class Stored:
    """One object."""

    bucket: str
    name: str
    data: bytes
    generation: int
    more: dict[str, Any] = field(default_factory=dict)
    """contentType, contentEncoding, metadata ... as its uploader gave them."""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat().replace("+00:00", "Z"))

    @cached_property
    def hashes(self) -> dict[str, str]:
        digests = {"crc32c": google_crc32c.Checksum(self.data).digest(), "md5": hashlib.md5(self.data).digest()}
        return {name: base64.b64encode(digest).decode() for name, digest in digests.items()}

    def resource(self, host: str) -> dict[str, Any]:
        """As the API describes it: 64-bit integers are strings."""
        path = f"storage/v1/b/{self.bucket}/o/{quote(self.name, safe='')}"
        return {
            "kind": "storage#object", "id": f"{self.bucket}/{self.name}/{self.generation}", "bucket": self.bucket,
            "name": self.name, "size": str(len(self.data)), "generation": str(self.generation), "metageneration": "1",
            "crc32c": self.hashes["crc32c"], "md5Hash": self.hashes["md5"], "storageClass": "STANDARD",
            "timeCreated": self.created, "updated": self.created, "contentType": "application/octet-stream",
            "etag": str(self.generation), "selfLink": f"http://{host}/{path}",
            "mediaLink": f"http://{host}/download/{path}?generation={self.generation}&alt=media",
            **self.more,
        }  # fmt: skip


@dataclass
class Fault:
    """What befalls ``times`` requests: a status in place of an answer, or the line is cut after so many bytes of the
    answer or, where ``received``, of the request."""

    method: str
    pattern: str
    times: int
    status: int | None = None
    after: int | None = None
    received: bool = False


class StorageServer(Loopback):
    """buckets: name -> name of an object -> object. requests: "GET /path?query" of all that came.
    put_lengths: the bytes of each PUT.
    authorizations: the header of that name of those that had one.

    delay: seconds before each answer, as of a network. denied: permissions that nobody has. locations: of buckets.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.denied: set[str] = set()
        self.locations: dict[str, str] = {}
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.requests: list[str] = []
        self.authorizations: list[str] = []
        self.put_lengths: list[int] = []
        self.uploads: dict[str, tuple[str, dict[str, Any], bytearray]] = {}
        self._faults: list[Fault] = []
        self._generations = count(1_700_000_000_000_000)
        self.lock = threading.RLock()
        self.listen(_Handler)

    def put(self, bucket: str, name: str, data: bytes, **more: Any) -> Stored:
        """Store an object, in a new generation; the bucket is made if it is not there."""
        with self.lock:
            stored = Stored(bucket, name, data, next(self._generations), more)
            self.buckets.setdefault(bucket, {})[name] = stored
            return stored

    def fail(self, method: str, pattern: str, status: int, times: int = 1_000_000) -> None:
        """Answer with ``status`` where the method is this and the decoded address matches ``pattern``."""
        self._faults.append(Fault(method, pattern, times, status=status))

    def cut(self, pattern: str, after: int, times: int = 1_000_000) -> None:
        """Break off downloads after so many bytes of the body."""
        self._faults.append(Fault("GET", f"alt=media.*{pattern}|{pattern}.*alt=media", times, after=after))

    def drop(self, method: str, pattern: str, after: int = 0, times: int = 1) -> None:
        """Break off uploads of which so many bytes have come, without an answer."""
        self._faults.append(Fault(method, pattern, times, after=after, received=True))

    def take_fault(self, method: str, address: str) -> Fault | None:
        """The first that applies; it is used up by one."""
        with self.lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method == method and re.search(fault.pattern, unquote(address)):
                    fault.times -= 1
                    return fault
        return None


class _Handler(Quiet):
    server_of: StorageServer

    def _dispatch(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server_of.requests.append(f"{self.command} {unquote(self.path)}")
        if self.command == "PUT":
            self.server_of.put_lengths.append(len(self.body))
        self.server_of.authorizations += self.headers.get_all("Authorization", [])
        address = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        self.fault = self.server_of.take_fault(self.command, self.path)
        time.sleep(self.server_of.delay)
        if self.fault and self.fault.received:
            return self._drop(self.fault.after or 0)
        if self.fault and self.fault.status:
            return self._error(self.fault.status, f"The server was told to answer {self.fault.status}.")
        if found := _REWRITE.fullmatch(address.path):
            return self._rewrite(*map(unquote, found.groups()))
        if found := _OBJECT.fullmatch(address.path):
            return self._object(found[1], unquote(found[2]))
        if found := _OBJECTS.fullmatch(address.path):
            if found[1] not in self.server_of.buckets:
                return self._error(404, "The specified bucket does not exist.")
            return self._list(found[1]) if self.command == "GET" else self._upload(found[1])
        if found := _BUCKET.fullmatch(address.path):
            if found[1] not in self.server_of.buckets:
                return self._error(404, "The specified bucket does not exist.")
            if found[2]:
                asked = parse_qs(address.query).get("permissions", [])
                held = [permission for permission in asked if permission not in self.server_of.denied]
                return self._json({"kind": "storage#testIamPermissionsResponse", "permissions": held})
            location = self.server_of.locations.get(found[1], "US")
            return self._json({"kind": "storage#bucket", "id": found[1], "name": found[1], "location": location})
        return self._error(404, f"This server has nothing at {self.command} {address.path}.")

    do_GET = do_POST = do_PUT = do_DELETE = _dispatch  # noqa: N815

    def _object(self, bucket: str, name: str) -> None:
        stored = self.server_of.buckets.get(bucket, {}).get(name)
        if stored is None or self.query.get("generation", str(stored.generation)) != str(stored.generation):
            return self._error(404, f"No such object: {bucket}/{name}")
        if self.command == "DELETE":
            if self.query.get("ifGenerationMatch", str(stored.generation)) != str(stored.generation):
                return self._error(412, "At least one of the pre-conditions you specified did not hold.")
            del self.server_of.buckets[bucket][name]
            return self._answer(204)
        if self.query.get("alt") != "media":
            return self._json(stored.resource(self.headers["Host"]))
        data, status = stored.data, 200
        hashes = ",".join(f"{kind}={value}" for kind, value in stored.hashes.items())
        headers = {"X-Goog-Generation": str(stored.generation), "X-Goog-Hash": hashes}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if start >= len(data):
                return self._answer(416, headers={"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        return self._answer(status, data, headers, self.fault.after if self.fault else None)

    def _drop(self, after: int) -> None:
        """Of a resumable upload, what has come is kept."""
        if upload := self.server_of.uploads.get(self.query.get("upload_id", "")):
            upload[2].extend(self.body[:after])
        self.close_connection = True

    def _rewrite(self, bucket: str, name: str, to_bucket: str, to_name: str) -> None:
        stored = self.server_of.buckets.get(bucket, {}).get(name)
        if stored is None or to_bucket not in self.server_of.buckets:
            return self._error(404, f"No such object: {bucket}/{name}")
        present = self.server_of.buckets[to_bucket].get(to_name)
        generation = str(present.generation if present else 0)
        source = str(stored.generation)
        if (
            self.query.get("ifGenerationMatch", generation) != generation
            or self.query.get("sourceGeneration", source) != source
        ):
            return self._error(412, "At least one of the pre-conditions you specified did not hold.")
        copy = self.server_of.put(to_bucket, to_name, stored.data, **stored.more)
        size = str(len(stored.data))
        done = {"kind": "storage#rewriteResponse", "totalBytesRewritten": size, "objectSize": size, "done": True}
        return self._json({**done, "resource": copy.resource(self.headers["Host"])})

    def _list(self, bucket: str) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        entries: dict[str, Stored | None] = {}
        for name, stored in sorted(self.server_of.buckets[bucket].copy().items()):
            if name.startswith(prefix) and name >= self.query.get("startOffset", ""):
                folder, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                entries.setdefault(prefix + folder + found if found else name, None if found else stored)
        after = base64.b64decode(self.query.get("pageToken", "")).decode()
        names = [name for name in sorted(entries) if name > after]
        page = names[: min(PAGE, int(self.query.get("maxResults", PAGE)))]
        listed = [stored.resource(self.headers["Host"]) for name in page if (stored := entries[name])]
        answer: dict[str, Any] = {"kind": "storage#objects", "items": listed}
        if folders := [name for name in page if entries[name] is None]:
            answer["prefixes"] = folders
        if len(page) < len(names):
            answer["nextPageToken"] = base64.b64encode(page[-1].encode()).decode()
        self._json(answer)

    def _upload(self, bucket: str) -> None:
        kind = self.query.get("uploadType")
        described = {"name": self.query.get("name")}
        if kind == "media":
            return self._store(bucket, described | {"contentType": self.headers["Content-Type"]}, self.body)
        if kind == "multipart":
            more, data = _parts(self.headers["Content-Type"], self.body)
            return self._store(bucket, described | more, data)
        if self.command == "POST":
            described |= {"contentType": self.headers["X-Upload-Content-Type"], **json.loads(self.body or b"{}")}
            key = f"upload-{len(self.server_of.uploads)}"
            self.server_of.uploads[key] = (bucket, described, bytearray())
            query = "".join(f"&{name}={value}" for name, value in self.query.items() if name.startswith("if"))
            path = f"/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}{query}"
            return self._answer(200, headers={"Location": f"http://{self.headers['Host']}{path}"})
        bucket, described, received = self.server_of.uploads[self.query["upload_id"]]
        sent = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        if sent and sent[1]:
            del received[int(sent[1]) :]
        received += self.body
        if not sent or (sent[2] != "*" and len(received) == int(sent[2])):
            return self._store(bucket, described, bytes(received))
        return self._answer(308, headers={"Range": f"bytes=0-{len(received) - 1}"} if received else {})

    def _store(self, bucket: str, described: Mapping[str, Any], data: bytes) -> None:
        with self.server_of.lock:
            present = self.server_of.buckets[bucket].get(described["name"])
            generation = str(present.generation if present else 0)
            if self.query.get("ifGenerationMatch", generation) != generation:
                return self._error(412, "At least one of the pre-conditions you specified did not hold.")
            hashes = Stored(bucket, "", data, 0).hashes
            if any(described.get(promised, hashes[kind]) != hashes[kind] for promised, kind in HASHES.items()):
                return self._error(400, "The content does not have the hash that was given for it.")
            names = ("contentType", "contentEncoding", "metadata")
            given = {key: described[key] for key in names if described.get(key)}
            stored = self.server_of.put(bucket, described["name"], data, **given)
        return self._json(stored.resource(self.headers["Host"]))

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=UTF-8"})

    def _error(self, status: int, message: str) -> None:
        self._json({"error": {"code": status, "message": message, "errors": [{"message": message}]}}, status)

    def _answer(
        self, status: int, data: bytes = b"", headers: Mapping[str, str] = NONE, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:cut])
        self.close_connection = self.close_connection or cut is not None


def _parts(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """The description and the content in a multipart/related body."""
    boundary = re.search(r"boundary=[\"']?([^\"';]+)", content_type)
    assert boundary, content_type
    _, first, second, _ = body.split(b"--" + boundary[1].encode())
    line = b"\r\n" if first.startswith(b"\r\n") else b"\n"
    (_, _, described), (head, _, data) = (part.removesuffix(line).partition(line * 2) for part in (first, second))
    kind = re.search(rb"(?i)content-type: *([^\r\n]+)", head)
    return {**({"contentType": kind[1].decode()} if kind else {}), **json.loads(described)}, data
