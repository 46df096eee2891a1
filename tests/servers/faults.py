"""What befalls requests on their way to a server and back: the same for every server that is told of a fault.

server.befall("reset", "POST", "customJobs$")           # the line breaks before the request is taken
server.befall("cut", "POST", "customJobs$", times=2)    # ... and after it was done
server.chance = Chance(seed=1, rate=0.5)                # whatever comes, at random
"""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from tests.servers.vertex_json import ApiError

KINDS = ("status", "reset", "cut", "torn", "garbled", "slow", "late", "expired")
"""status: an error in place of the work. reset: the line breaks before the work; cut: after it, without an answer;
torn: in the middle of the answer. garbled: something else than the service answers, after the work. slow: the answer
comes by drops. late: reset, and the work is done all the same, a moment later. expired: no token of now is taken."""


@dataclass
class Fault:
    """One of KINDS for ``times`` requests. error: of "status". seconds: that an answer takes, or work is late."""

    method: str
    pattern: str
    times: int
    error: ApiError | None
    kind: str = ""
    seconds: float = 0.3
    retry_after: int | None = None

    def __post_init__(self) -> None:
        self.kind = self.kind or ("status" if self.error else "cut")


@dataclass
class Chance:
    """Faults at random: a share ``rate`` of all requests, each kind as likely as its weight. befell: what there was."""

    seed: int
    rate: float
    kinds: tuple[str, ...] = KINDS
    statuses: tuple[int, ...] = (429, 500, 503)
    seconds: float = 0.05
    most: int | None = None
    befell: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self) -> Fault | None:
        if self._random.random() >= self.rate or (self.most is not None and self.befell.total() >= self.most):
            return None
        kind = self._random.choice(self.kinds)
        error = None
        if kind == "status":
            status = self._random.choice(self.statuses)
            error = ApiError(status, f"By chance it is {status}.")
        self.befell[f"status {error.status}" if error else kind] += 1
        return Fault("", "", 1, error, kind, self.seconds)


class Befallen:
    """The part of a server that knows what is to happen to requests. on_expired: makes the tokens of now invalid."""

    def __init__(self) -> None:
        self.chance: Chance | None = None
        self.valid: Callable[[str], bool] = lambda authorization: True
        self.on_expired: Callable[[], object] = lambda: None
        self._faults: list[Fault] = []
        self._lock = threading.RLock()

    def fail(
        self, method: str, pattern: str, status: int, times: int = 1_000_000, message: str = "",
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        """Answer with ``status`` where the method is this and the decoded path matches ``pattern``."""
        error = ApiError(status, message or f"The server was told to answer {status}.")
        self._faults.append(Fault(method, pattern, times, error, retry_after=retry_after))

    def cut(self, method: str, pattern: str, times: int = 1) -> None:
        """Do what is asked for, then cut the connection in place of an answer: the client cannot know what happened."""
        self.befall("cut", method, pattern, times)

    def befall(self, kind: str, method: str, pattern: str, times: int = 1, seconds: float = 0.3) -> None:
        """One of KINDS but "status"."""
        assert kind in KINDS
        self._faults.append(Fault(method, pattern, times, None, kind, seconds))

    def no_more_faults(self) -> None:
        """What was told and has not come to pass does not."""
        self._faults.clear()
        self.chance = None

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The first that applies, used up by one; else what chance has."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method == method and re.search(fault.pattern, unquote(path)):
                    fault.times -= 1
                    return fault
            return self.chance.draw() if self.chance else None


def respond(
    handler: BaseHTTPRequestHandler, server: Befallen, path: str, answer: Callable[[], Mapping[str, Any]]
) -> None:
    """Answer a request, or let it fare as it is told. path: decoded, without the query. answer: does the work."""
    fault = server.take_fault(handler.command, path)
    kind = fault.kind if fault else ""
    if kind == "expired":
        server.on_expired()
    headers: dict[str, str] = {}
    try:
        if not server.valid(handler.headers.get("Authorization", "")):
            raise ApiError(401, "Request had invalid authentication credentials.", "UNAUTHENTICATED")
        if fault and kind == "status":
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            assert fault.error
            raise fault.error
        if kind == "reset":
            return hang_up(handler)
        if fault and kind == "late":
            threading.Timer(fault.seconds, _quietly, (answer,)).start()
            return hang_up(handler)
        status, content = 200, answer()
    except ApiError as error:
        status, content = error.status, error.body()
    if kind == "cut":
        return hang_up(handler)
    data = json.dumps(content, indent=2).encode()
    if kind == "garbled":
        status, data = 200, b"<html>A box in a hotel says hello.</html>"
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json; charset=UTF-8", **headers}.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    if kind == "torn":
        handler.wfile.write(data[: len(data) // 2])
        return hang_up(handler)
    if fault and kind == "slow":
        size = max(1, len(data) // 10)
        for start in range(0, len(data), size):
            handler.wfile.write(data[start : start + size])
            handler.wfile.flush()
            time.sleep(fault.seconds / 10)
        return None
    handler.wfile.write(data)
    return None


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Break the line."""
    handler.close_connection = True
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def _quietly(answer: Callable[[], object]) -> None:
    with suppress(ApiError):
        answer()
