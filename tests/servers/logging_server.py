"""Cloud Logging on 127.0.0.1: entries:list with its filters, pages and quota, and what goes wrong with it in practice.

CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING=http://127.0.0.1:PORT/ sends gcloud and sdtune here. Entries live in memory.
Filters: see logging_filters.py.

    with LoggingServer() as server:
        server.write("1234", "step 1", visible_after=8.0)
        server.fail(503, times=2)
"""

from __future__ import annotations

import base64
import heapq
import json
import random
import re
import socket
import threading
import time
import zlib
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count
from typing import Any

from tests.servers.logging_filters import SECOND, Query, Stored, parse
from tests.servers.loopback import Loopback, Quiet

PAGE = 1000
FIELDS = {"resourceNames", "projectIds", "filter", "orderBy", "pageSize", "pageToken"}
DAY = 86_400 * SECOND


@dataclass
class Fault:
    """What befalls ``times`` requests: a status in place of an answer, or the line is cut after so many bytes of it.

    kind: or "garbled", something else than the service answers; "slow", the answer takes so many seconds, by drops;
    "expired", no token of now is taken.
    """

    times: int
    status: int | None = None
    retry_after: int | None = None
    after: int = 0
    kind: str = ""
    seconds: float = 0.05


class RefusedError(Exception):
    """A request that is answered with an error. more: headers."""

    def __init__(self, status: int, reason: str, message: str, **more: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.more = status, reason, more


class LoggingServer(Loopback):
    """requests: the bodies of all that were answered or refused; quota: requests per minute, None for no limit.

    chance: asked for a fault wherever none is ordered. valid, on_expired: see faults.Befallen.

    What happens to lines by chance: ``late`` is the share that is seen 6 to 12 s after it was written, ``duplicates``
    the share that is in every answer twice, ``shuffle`` the seconds by which a timestamp may lie in the past, ``empty``
    the share of answers that have no entries but a token to go on with, as the service's when it needs more time.
    """

    def __init__(
        self,
        *,
        quota: int | None = 60,
        late: float = 0.0,
        duplicates: float = 0.0,
        shuffle: float = 0.0,
        empty: float = 0.0,
        seed: int = 0,
        project: str = "test-project",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.quota = quota
        self.late, self.duplicates, self.shuffle, self.empty = late, duplicates, shuffle, empty
        self.project = project
        self.clock = clock
        self.requests: list[dict[str, Any]] = []
        self._random = random.Random(seed)
        self._jobs: dict[str, list[Stored]] = defaultdict(list)
        self._hidden: list[tuple[float, int, Stored]] = []
        self._numbers = count()
        self._newest = 0
        self._asked: deque[float] = deque()
        self.chance: Callable[[], Fault | None] = lambda: None
        self.valid: Callable[[str], bool] = lambda authorization: True
        self.on_expired: Callable[[], object] = lambda: None
        self.lines: set[socket.socket] = set()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.listen(_Handler)

    def write(
        self,
        job_id: str,
        text: str,
        *,
        replica: str = "workerpool0-0",
        severity: str = "INFO",
        timestamp: datetime | float | None = None,
        visible_after: float = 0.0,
        duplicate: bool = False,
        json_payload: Mapping[str, Any] | None = None,
    ) -> str:
        """Add an entry, by default of now; replica ``service``: of Vertex AI itself. Returns its insertId.

        visible_after: seconds until an answer has it; duplicate: every answer has it twice.
        """
        now = self.clock()
        with self._lock:
            if self.late and self._random.random() < self.late:
                visible_after = self._random.uniform(6.0, 12.0)
            if self.duplicates and self._random.random() < self.duplicates:
                duplicate = True
            when = timestamp.timestamp() if isinstance(timestamp, datetime) else timestamp
            if when is None:
                when = now - (self._random.uniform(0.0, self.shuffle) if self.shuffle else 0.0)
            number = next(self._numbers)
            # The order of ids says nothing about the order of writing.
            insert_id = f"{zlib.crc32(b'%d' % number):08x}{number:x}"
            nanoseconds, received = int(when * 1e6) * 1000, int((now + visible_after) * 1e6) * 1000
            if timestamp is None and not self.shuffle:
                # The order of writing is that of the timestamps, however coarse the clock is.
                self._newest = nanoseconds = max(nanoseconds, self._newest + 1)
                received = max(received, nanoseconds)
            payload = json_payload if json_payload is not None else text
            data = _entry(self.project, job_id, payload, replica, severity, nanoseconds, received, insert_id)
            stored = Stored(nanoseconds, insert_id, data, job_id, replica, received)
            for _ in range(1 + duplicate):
                if visible_after > 0:
                    heapq.heappush(self._hidden, (now + visible_after, next(self._numbers), stored))
                else:
                    _insert(self._jobs[job_id], stored)
        return insert_id

    def fail(self, status: int, times: int = 1, retry_after: int | None = None) -> None:
        """Answer the next ``times`` requests with ``status``."""
        self._faults.append(Fault(times, status, retry_after))

    def cut(self, times: int = 1, after: int = 0) -> None:
        """Break off the next ``times`` answers after so many bytes of the body; 0: before the first of the answer."""
        self._faults.append(Fault(times, after=after))

    def take_fault(self) -> Fault | None:
        """The next one; it is used up by one."""
        with self._lock:
            fault = next((fault for fault in self._faults if fault.times > 0), None)
            if fault:
                fault.times -= 1
            return fault or self.chance()

    def hang_up(self) -> None:
        """Break every line that is open."""
        for line in self.lines.copy():
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def answer(self, body: dict[str, Any]) -> bytes:
        """What entries:list says to ``body``. RefusedError: it is answered with an error."""
        if unknown := next(iter(body.keys() - FIELDS), None):
            raise _invalid(f'Invalid JSON payload received. Unknown name "{unknown}": Cannot find field.')
        if not body.get("resourceNames") or not all(
            re.match(r"projects/[^/]+", name) for name in body["resourceNames"]
        ):
            raise _invalid("resource_names must name at least one resource, such as projects/[PROJECT_ID].")
        size = int(body.get("pageSize", 50))
        if not 0 < size <= PAGE:
            raise _invalid(f"page_size must be between 1 and {PAGE}.")
        order = body.get("orderBy", "timestamp asc")
        if order not in ("timestamp asc", "timestamp desc", "timestamp"):
            raise _invalid(f'order_by must be "timestamp asc" or "timestamp desc", not "{order}".')
        text, descending = body.get("filter", ""), order.endswith("desc")
        asked = f"{body['resourceNames']} {text} {descending}"
        with self._lock:
            self._count()
            self._reveal()
            after = _position(body.get("pageToken"), asked)
            if self.empty and self._random.random() < self.empty:
                return b'{"nextPageToken":"%s"}' % _token(after or (-1, ""), asked)
            try:
                query = parse(text)
            except ValueError as error:
                raise _invalid(f"Unparseable filter: {error}") from None
            found = self._select(query, descending, after, size + 1)
        page = b",".join([stored.data for stored in found[:size]])
        more = b',"nextPageToken":"%s"' % _token(found[size - 1][:2], asked) if len(found) > size else b""
        return b'{"entries":[%s]%s}' % (page, more) if page else b"{}"

    def _count(self) -> None:
        now = self.clock()
        while self._asked and self._asked[0] <= now - 60:
            self._asked.popleft()
        if self.quota is not None and len(self._asked) >= self.quota:
            wait = int(self._asked[0] + 60 - now) + 1
            raise RefusedError(
                429,
                "RESOURCE_EXHAUSTED",
                "Quota exceeded for quota metric 'Read requests' and limit 'Read requests per minute' of service "
                "'logging.googleapis.com' for consumer 'project_number:1234567890'.",
                **{"Retry-After": str(wait)},
            )
        self._asked.append(now)

    def _reveal(self) -> None:
        now = self.clock()
        while self._hidden and self._hidden[0][0] <= now:
            _, _, stored = heapq.heappop(self._hidden)
            _insert(self._jobs[stored.job], stored)

    def _select(self, query: Query, descending: bool, after: tuple[int, str] | None, wanted: int) -> list[Stored]:
        if not query.mentions_time:
            query.earliest = max(query.earliest, int(self.clock() * SECOND) - DAY)
        pools = [self._jobs.get(query.job, [])] if query.job is not None else list(self._jobs.values())
        parts = [_range(pool, query, descending, after, wanted if query.rest is None else None) for pool in pools]
        merged: Iterable[Stored] = parts[0] if len(parts) == 1 else heapq.merge(*parts, reverse=descending)
        chosen = (stored for stored in merged if query.rest is None or query.rest(stored))
        return [stored for stored, _ in zip(chosen, range(wanted), strict=False)]


def _insert(pool: list[Stored], stored: Stored) -> None:
    if pool and stored < pool[-1]:
        insort(pool, stored)
    else:
        pool.append(stored)


def _range(
    pool: list[Stored], query: Query, descending: bool, after: tuple[int, str] | None, wanted: int | None
) -> list[Stored]:
    """Those in the time of ``query`` that come after a position; only the first ``wanted``."""
    low, high = bisect_left(pool, (query.earliest,)), bisect_left(pool, (query.latest,))
    if after and descending:
        high = min(high, bisect_left(pool, after))
    elif after:
        low = max(low, bisect_right(pool, (*after, b"\xff")))
    if descending:
        start = low if wanted is None else max(low, high - wanted)
        return pool[start:high][::-1]
    return pool[low : high if wanted is None else min(high, low + wanted)]


def _entry(
    project: str, job_id: str, payload: Any, replica: str, severity: str, time: int, received: int, insert_id: str
) -> bytes:
    said = "textPayload" if replica == "service" else "jsonPayload"
    if isinstance(payload, str) and replica != "service":
        payload = {"attrs": {"tag": replica}, "levelname": severity, "message": payload}
    return (
        f'{{"insertId":"{insert_id}","{said}":{json.dumps(payload)},"timestamp":"{_stamp(time)}",'
        f'"receiveTimestamp":"{_stamp(received)}",{_described(project, job_id, replica, severity)}}}'
    ).encode()


@lru_cache(maxsize=256)
def _described(project: str, job_id: str, replica: str, severity: str) -> str:
    log = replica if replica != "service" else "ml.googleapis.com%2F" + job_id
    described = {
        "resource": {"type": "ml_job", "labels": {"job_id": job_id, "project_id": project, "task_name": replica}},
        "severity": severity,
        "labels": {"ml.googleapis.com/job_id": job_id, "ml.googleapis.com/task_name": replica},
        "logName": f"projects/{project}/logs/{log}",
    }
    return json.dumps(described)[1:-1]


def _stamp(nanoseconds: int) -> str:
    """As protobuf's JSON has it: no fraction, or one of 3, 6 or 9 digits."""
    seconds, rest = divmod(nanoseconds, SECOND)
    digits = f"{rest:09d}"
    while digits.endswith("000"):
        digits = digits[:-3]
    return f"{_whole(seconds)}.{digits}Z" if digits else f"{_whole(seconds)}Z"


@lru_cache(maxsize=1024)
def _whole(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _token(position: tuple[int, str], asked: str) -> bytes:
    return base64.urlsafe_b64encode(json.dumps([*position, zlib.crc32(asked.encode())]).encode())


def _position(token: str | None, asked: str) -> tuple[int, str] | None:
    """Where ``token`` goes on; it holds for the question that it was given for and for no other."""
    if not token:
        return None
    try:
        moment, insert_id, question = json.loads(base64.urlsafe_b64decode(token))
    except ValueError:
        raise _invalid("page_token is not valid.") from None
    if question != zlib.crc32(asked.encode()):
        raise _invalid("page_token does not match the other arguments of the request.")
    return (moment, insert_id) if moment >= 0 else None


def _invalid(message: str) -> RefusedError:
    return RefusedError(400, "INVALID_ARGUMENT", message)


class _Handler(Quiet):
    server_of: LoggingServer
    # Headers and body in one piece: in two, each answer would wait for the other side's delayed acknowledgement.
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        self.server_of.lines.add(self.connection)

    def finish(self) -> None:
        self.server_of.lines.discard(self.connection)
        super().finish()

    def do_POST(self) -> None:  # noqa: N802
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server_of.take_fault()
        try:
            if self.path.partition("?")[0] != "/v2/entries:list":
                raise RefusedError(404, "NOT_FOUND", f"This server has nothing at {self.path}.")
            body = json.loads(content)
            self.server_of.requests.append(body)
            if fault and fault.kind == "expired":
                self.server_of.on_expired()
            if not self.server_of.valid(self.headers.get("Authorization", "")):
                raise RefusedError(401, "UNAUTHENTICATED", "Request had invalid authentication credentials.")
            if fault and fault.kind:
                data = self.server_of.answer(body)
                return self._send(
                    200, b"<html>" if fault.kind == "garbled" else data, {},
                    seconds=fault.seconds if fault.kind == "slow" else 0.0,
                )  # fmt: skip
            if fault and fault.status:
                more = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                raise RefusedError(
                    fault.status, "UNAVAILABLE", f"The server was told to answer {fault.status}.", **more
                )
            if fault and not fault.after:
                self.close_connection = True
                return None
            self._send(200, self.server_of.answer(body), {}, fault.after if fault else None)
        except RefusedError as error:
            said = {"code": error.status, "message": str(error), "status": error.reason}
            self._send(error.status, json.dumps({"error": said}).encode(), error.more)

    def _send(
        self, status: int, data: bytes, more: Mapping[str, str], cut: int | None = None, seconds: float = 0.0
    ) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json; charset=UTF-8", "Content-Length": str(len(data)), **more}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        pieces = 8 if seconds else 1
        size = max(1, -(-len(data) // pieces))
        for start in range(0, len(data), size):
            self.wfile.write(data[:cut][start : start + size])
            if seconds:
                self.wfile.flush()
                time.sleep(seconds / pieces)
        self.close_connection = self.close_connection or cut is not None
