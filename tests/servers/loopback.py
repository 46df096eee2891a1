"""What all HTTP servers of the tests share: a port of 127.0.0.1, a thread, and handlers that say nothing.

class QuoteServer(Loopback):
    def __init__(self) -> None:
        self.quotes = ["..."]
        self.listen(_Handler)

class _Handler(Quiet):
    server_of: QuoteServer
    def do_GET(self) -> None: ...
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Loopback:
    """address: of the server, without a slash at its end. It answers inside its ``with`` block."""

    address: str
    _http: ThreadingHTTPServer

    def listen(self, handler: type[Quiet]) -> None:
        """Take a port. What comes before the ``with`` block waits."""
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"server_of": self}))
        self._http.handle_error = lambda *request: None  # type: ignore[method-assign]  # a client that went away
        self.address = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class Quiet(BaseHTTPRequestHandler):
    """server_of: the server whose requests it answers."""

    server_of: Any
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer of headers and a body waits 40 ms for the client's delayed ACK

    def log_message(self, format: str, *args: object) -> None: ...
