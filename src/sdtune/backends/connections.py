"""What passes on the way to Google's services, and what may not be asked twice; answers that must come in good time.

What may be asked again is what the services document as such, and a line that broke:

- Vertex AI, Cloud Build, Cloud Logging and their like: 429, 500, 503, 504 (google.aip.dev/194,
  cloud.google.com/vertex-ai/docs/error-codes), and 502, which comes from what stands in front of them;
- Cloud Storage: these and 408 (cloud.google.com/storage/docs/retry-strategy), as its client has it;
- tokens: where the endpoint itself says that it may be asked again.

Never 400, 403, 404, 409, 412: the same question has the same answer. A 401 makes Google's session get a new token, and
ask once more with it.
"""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.protobuf.json_format import ParseError
from requests import PreparedRequest, Response
from requests import exceptions as http
from requests.adapters import HTTPAdapter
from urllib3 import exceptions as line

from sdtune.methods.passwords import without_passwords

SECONDS_PER_CALL = 60.0
"""Seconds for which each piece of an answer is awaited, and all of it after the first."""
PIECE = 1 << 16

_PASSING = (
    api.TooManyRequests,
    api.InternalServerError,
    api.BadGateway,
    api.ServiceUnavailable,
    api.GatewayTimeout,
    http.ConnectionError,
    http.Timeout,
    http.ChunkedEncodingError,
    http.ContentDecodingError,
    # What is no JSON was cut short, or is not from the service.
    http.JSONDecodeError,
    ParseError,
    auth.TransportError,
)
_NOT_TAKEN = (api.TooManyRequests, auth.GoogleAuthError, http.ConnectTimeout)
"""A request that ended in one of these has changed nothing."""


def passes(error: BaseException) -> bool:
    """Whether the same may be asked again, if it may be asked twice at all."""
    # A token endpoint that is down says so; one that refuses does so for good.
    retryable = isinstance(error, auth.RefreshError) and error.retryable
    return isinstance(error, _PASSING) or retryable


def may_be_done(error: BaseException) -> bool:
    """Whether what was asked for may have been done although there is no answer that says so."""
    return passes(error) and not isinstance(error, _NOT_TAKEN) and not _never_left(error)


def _never_left(error: BaseException) -> bool:
    """Nobody took the connection."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    return isinstance(reason, line.NewConnectionError)


def retry_after(error: BaseException, longest: float = 600.0) -> float:
    """Seconds that the service wants to be left alone; 0 where it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    said = headers.get("Retry-After", "")
    return min(float(said), longest) if said.isdecimal() else 0.0


def cause_of(error: Any) -> Any:
    """What was behind an error: a retry that gave up says only that it did."""
    return getattr(error, "cause", None) or error


def said_by(error: Any) -> str:
    """What an error says; of a line that broke, where to, since the layers below say much that helps nobody."""
    request = getattr(error, "request", None)
    if isinstance(error, http.RequestException) and request is not None:
        host = urlsplit(request.url).hostname
        took = isinstance(error, http.Timeout) and not isinstance(error, http.ConnectTimeout)
        return f"{host} took too long to answer." if took else f"the connection to {host} broke, or there is none."
    if isinstance(error, ParseError):
        return "an answer came that is not the service's, or not whole."
    return str(getattr(error, "message", "") or error)


class Timely(HTTPAdapter):  # type: ignore[misc]  # requests tells no types
    """Answers of which the rest comes in good time after the first of it, or count as lost.

    requests looks only at the pause between two pieces: an answer that drips holds a call for ever.
    """

    def send(self, request: PreparedRequest, stream: bool = False, *more: Any, **named: Any) -> Response:
        response = super().send(request, stream, *more, **named)
        if not stream:
            self._read(request, response)
        return response

    def _read(self, request: PreparedRequest, response: Response) -> None:
        last_moment, pieces = time.monotonic() + SECONDS_PER_CALL, []
        try:
            while piece := response.raw.read1(PIECE, decode_content=True):
                pieces.append(piece)
                if time.monotonic() > last_moment:
                    response.close()
                    raise http.ReadTimeout(f"the answer was not whole after {SECONDS_PER_CALL:.0f} s", request=request)
        except line.ProtocolError as error:
            raise http.ChunkedEncodingError(error, request=request) from None
        except line.DecodeError as error:
            raise http.ContentDecodingError(error, request=request) from None
        except line.HTTPError as error:
            raise http.ConnectionError(error, request=request) from None
        response._content, response._content_consumed = b"".join(pieces), True


def make_timely(session: Any, connections: int = 10) -> Any:
    """``session``, of requests, with such answers; connections: that it keeps open. One with its own certificate is
    left as it is."""
    if not getattr(session, "is_mtls", False):
        for scheme in ("http://", "https://"):
            session.mount(scheme, Timely(pool_maxsize=connections))
    return without_passwords(session)
