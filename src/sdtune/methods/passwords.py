"""What looks like a token and may stand nowhere; sessions of requests that show nobody a password of ~/.netrc."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

TOKENS = re.compile(
    r"\b(?:(?:hf|ghp|gho|ghs|ghu|github_pat|glpat|wandb)[_-]\w{10,}|ya29\.\S{10,}|sk-[\w-]{10,}|AIza[\w-]{30,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/@\s]+:[^/@\s]+@"
)
"""Of Hugging Face, GitHub, GitLab, Weights & Biases, Google; a key in PEM; a password in an address."""


def without_passwords(session: Any) -> Any:
    """``session``, which would otherwise put what ~/.netrc has for a host, or for all by its entry ``default``, in the
    place of the token: of Google's own hosts, and of a server that the environment puts in their place.

    A proxy that the environment names is still used. A token is got by a session of its own, beside the first.
    """
    for one in (session, getattr(session, "_auth_request_session", None)):
        if one is not None:
            one.auth = _as_it_is
            one.rebuild_auth = partial(_without_token, one)
    return session


def _as_it_is(request: Any) -> Any:
    return request


def _without_token(session: Any, request: Any, answer: Any) -> None:
    """What requests does where it is sent on, less its look into ~/.netrc: another host gets no token."""
    if session.should_strip_auth(answer.request.url, request.url):
        request.headers.pop("Authorization", None)
