"""Tokens out of Secret Manager, which alone may hold them: what stands in a job, all who may look at jobs can read."""

from __future__ import annotations

import base64
import binascii
import os
import re
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from sdtune.errors import ProjectError
from sdtune.methods.passwords import without_passwords

SECRETS = {"HF_TOKEN_SECRET": "HF_TOKEN", "WANDB_API_KEY_SECRET": "WANDB_API_KEY"}
"""In the environment: the name of a secret's version, and the variable that its content becomes."""
ENDPOINT = "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER"
"""As gcloud calls it: another address of the service."""
SERVICE = "https://secretmanager.googleapis.com/"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
SECONDS_PER_CALL, SECONDS_TO_RETRY = 20.0, 60.0

_NAME = re.compile(r"projects/[\w:.-]+/(?:locations/[\w-]+/)?secrets/[\w-]+/versions/[\w-]+", re.ASCII)


def read_secrets() -> None:
    """Put the tokens that the environment names into it, for this process and those that it starts.

    ProjectError: one cannot be read. No message has anything of its content.
    """
    for variable, token in SECRETS.items():
        if name := os.environ.get(variable):
            os.environ[token] = _read(variable, name)


def _read(variable: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ProjectError(f"{variable}: found {name!r}, wanted projects/PROJECT/secrets/NAME/versions/latest.")
    try:
        return _token(_access(variable, name))
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise ProjectError(f"{variable}: {name} holds no token; wanted one line of text.") from None


def _token(answer: Any) -> str:
    text = base64.b64decode(answer["payload"]["data"], validate=True).decode("ascii").strip()
    if not text or not text.isprintable() or " " in text:
        raise ValueError
    return text


def _access(variable: str, name: str) -> Any:
    """The service's answer."""
    from google.api_core import exceptions as api
    from google.api_core.retry import Retry, if_exception_type
    from google.auth import exceptions as auth
    from requests import RequestException

    def ask() -> Any:
        response = session.get(f"{address}v1/{name}:access", timeout=SECONDS_PER_CALL)
        if response.status_code >= 400:
            raise api.from_http_response(response)
        return response.json()

    passes = if_exception_type(api.TooManyRequests, api.ServerError, RequestException, auth.TransportError)
    try:
        address, session = _session()
        return Retry(predicate=passes, initial=0.5, maximum=8.0, timeout=SECONDS_TO_RETRY)(ask)()
    except auth.DefaultCredentialsError:
        raise ProjectError(
            f"{variable}: {name} needs Google Cloud credentials, and there are none here; get some with: "
            "gcloud auth application-default login"
        ) from None
    except (api.Forbidden, api.Unauthorized):
        raise ProjectError(
            f"{variable}: {name} may not be read; give the account of this run the role "
            f"roles/secretmanager.secretAccessor: gcloud secrets add-iam-policy-binding {name.split('/')[-3]} "
            "--member=serviceAccount:ACCOUNT --role=roles/secretmanager.secretAccessor"
        ) from None
    except api.NotFound:
        raise ProjectError(
            f"{variable}: there is no secret {name}; make it with: gcloud secrets create {name.split('/')[-3]} "
            "--data-file=FILE"
        ) from None
    except (api.GoogleAPIError, auth.GoogleAuthError, RequestException) as error:
        what = f"{type(error).__name__}, {getattr(error, 'code', None) or 'no answer'}"
        raise ProjectError(f"{variable}: {name} cannot be read ({what}); is Secret Manager in reach?") from None


def _session() -> tuple[str, Any]:
    """The address of the service, and what asks it: with a token of ours only where the address is Google's own."""
    if address := os.environ.get(ENDPOINT):
        import requests

        parts = urlsplit(address)
        if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
            raise ProjectError(f"{ENDPOINT}: found {address!r}; plain http is for this machine alone, wanted https.")
        session = requests.Session()
        # Neither a proxy nor a password of ~/.netrc for an address that is not Google's.
        session.trust_env = False
        return f"{address.rstrip('/')}/", session
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    credentials, _ = google.auth.default(scopes=[SCOPE])
    return SERVICE, without_passwords(AuthorizedSession(credentials))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
