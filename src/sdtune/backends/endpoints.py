"""Where Google's services are spoken to: at their own address, or at one that the environment puts in its place.

The variables are gcloud's own (CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE and its like), so that one setting sends gcloud
and sdtune to the same server. An address that anyone on the way could read or answer in place of is refused.
"""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from sdtune.errors import ProjectError


def override(service: str) -> str | None:
    """The address that stands in for ``service`` ("storage", "aiplatform" ...), with one slash at its end; None where
    the service's own is meant. ProjectError: it is no address that may be spoken to.
    """
    name = f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service.upper()}"
    given = os.environ.get(name, "").strip()
    return checked(name, given) if given else None


def checked(name: str, address: str) -> str:
    """``address`` with one slash at its end. ProjectError, which says that it came from ``name``: see override()."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise ProjectError(f"{name} is {address!r}, which is no address; wanted something like http://127.0.0.1:8080/.")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ProjectError(
            f"{name} is {address!r}, which is plain http to another machine; use https, or a server on 127.0.0.1."
        )
    return address.rstrip("/") + "/"


def takes_credentials(address: str | None) -> bool:
    """Whether a service at ``address`` (None: its own) is shown the user's credentials: only Google's own hosts are."""
    if address is None:
        return True
    parts = urlsplit(address)
    return parts.scheme == "https" and (parts.hostname or "").endswith(".googleapis.com")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
