"""Google's token endpoint on 127.0.0.1, and credentials that get their tokens there.

with TokenServer() as tokens:
    tokens.guard(vertex)                # takes no others from now on
    monkeypatch.setattr("sdtune.backends.vertex.google.credentials_for", lambda service: tokens.credentials())
    tokens.expire()
"""

from __future__ import annotations

import json
import threading
from itertools import count
from typing import Any

from google.oauth2.credentials import Credentials

from tests.servers.faults import Befallen
from tests.servers.loopback import Loopback, Quiet


class TokenServer(Loopback):
    """given: all tokens, in their order. faults: statuses that the next requests are answered with.

    revoked: the login is no longer taken.
    """

    def __init__(self) -> None:
        self.given: list[str] = []
        self.faults: list[int] = []
        self.revoked = False
        self._valid: set[str] = set()
        self._numbers = count(1)
        self._lock = threading.Lock()
        self.listen(_Handler)

    def credentials(self) -> Credentials:
        """Those of a user who has logged in."""
        return Credentials(  # type: ignore[no-untyped-call]
            None, refresh_token="refresh", token_uri=f"{self.address}/token", client_id="me", client_secret="secret"
        )

    def guard(self, server: Befallen) -> None:
        """Let ``server`` take these tokens alone."""
        server.valid, server.on_expired = self.takes, self.expire

    def takes(self, authorization: str) -> bool:
        """Whether a header of that name has a token that is good."""
        return authorization.removeprefix("Bearer ") in self._valid

    def expire(self) -> None:
        """No token that was given so far is taken any more, whatever was said of its time."""
        with self._lock:
            self._valid.clear()

    def give(self) -> str:
        with self._lock:
            token = f"token-{next(self._numbers)}"
            self.given.append(token)
            self._valid.add(token)
            return token


class _Handler(Quiet):
    server_of: TokenServer
    wbufsize = -1

    def do_POST(self) -> None:  # noqa: N802
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server_of.faults:
            return self._send(self.server_of.faults.pop(0), {"error": "internal_failure"})
        if self.server_of.revoked:
            return self._send(400, {"error": "invalid_grant", "error_description": "Token has been revoked."})
        return self._send(
            200, {"access_token": self.server_of.give(), "expires_in": 3599, "token_type": "Bearer"}
        )  # fmt: skip

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
