"""The small APIs around Vertex AI on 127.0.0.1: what a project is, has and allows.

Resource Manager, Cloud Billing, Service Usage with its quotas, IAM, Compute Engine's networks, Artifact Registry,
Filestore, of Cloud Build whom builds act as, of Cloud Storage the buckets without their objects (those are in
storage.py), with Google's token endpoint. The messages are those of the published APIs; paths, parameters and fields
that these do not have are refused.

    with ServicesServer() as server:
        server.services.discard("logging")
        server.denied.add("cloudbuild.builds.create")
        subprocess.run([...], env={**os.environ, **server.environment})
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.loopback import Loopback, Quiet
from tests.servers.services_methods import KNOWN_APIS, METHODS, Asked, Bucket, RefusedError

EVERYWHERE = {"alt", "$alt", "fields", "key", "prettyPrint", "quotaUser", "userProject"}
"""Parameters that every method takes."""
IN_BUCKETS = {"projection"}
"""And those of Cloud Storage."""
STATUS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
          409: "ALREADY_EXISTS", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE"}  # fmt: skip
HOSTS = {
    "cloudresourcemanager": "", "cloudbilling": "", "serviceusage": "", "iam": "", "compute": "compute/v1/",
    "artifactregistry": "", "file": "", "storage": "storage/v1/", "secretmanager": "", "cloudbuild": "",
}  # fmt: skip
"""The services that are here, and what gcloud expects at the end of the address that stands in for them."""


@dataclass
class Fault:
    """What befalls ``times`` requests."""

    pattern: str
    status: int
    message: str
    times: int


class ServicesServer(Loopback):
    """A project that has all that jobs need, until something is taken away.

    requests: "GET /path?query" of all that came; authorizations: the header of that name of those that had one.
    denied: permissions that the caller lacks. off: APIs whose own methods are refused, as they are where they were
    never switched on. policy: role -> members, of the project. images: (name, digest or tag) -> when it was made.
    networks: name -> peerings; hosts: other projects that have them too, as of a Shared VPC. quotas: metric -> limits
    by region, "" for all others. builder: whom builds act as that name no account. pushers: role -> members, of every
    repository; None where the policy may not be read. secrets: name -> role -> who has it, None
    where the policy may not be read. revoked: the login is no longer taken. delay: seconds before each answer.
    """

    def __init__(self, project: str = "my-project", number: str = "123456789012", delay: float = 0.0) -> None:
        self.project, self.number, self.delay = project, number, delay
        self.state = "ACTIVE"
        self.billing: str | None = "billingAccounts/012345-6789AB-CDEF01"
        self.services = set(KNOWN_APIS)
        self.off: set[str] = set()
        self.denied: set[str] = set()
        agent = f"serviceAccount:service-{number}@gcp-sa-aiplatform-cc.iam.gserviceaccount.com"
        self.builder = f"{number}-compute@developer.gserviceaccount.com"
        self.policy: dict[str, list[str]] | None = {
            "roles/aiplatform.customCodeServiceAgent": [agent],
            "roles/cloudbuild.builds.builder": [f"serviceAccount:{self.builder}"],
        }
        self.pushers: dict[str, list[str]] | None = {}
        self.repositories: dict[tuple[str, str], str] = {("us-central1", "sdtune"): "DOCKER"}
        self.images: dict[tuple[str, str], str] = {}
        self.accounts: dict[str, dict[str, Any]] = {self.builder: {"email": self.builder}}
        self.account_members: dict[str, dict[str, list[str]]] = {}
        self.hosts: set[str] = set()
        self.networks: dict[str, list[dict[str, Any]]] = {}
        self.instances: list[dict[str, Any]] = []
        self.quotas: dict[str, dict[str, int]] = {}
        self.buckets: dict[str, Bucket] = {}
        self.secrets: dict[str, dict[str, list[str]] | None] = {}
        self.email = "ann@example.com"
        self.revoked = False
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.authorizations: list[str] = []
        self.listen(_Handler)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which sdtune and gcloud find this server, and need no credentials."""
        found = {
            f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name.upper()}": f"{self.address}/{path}" for name, path in HOSTS.items()
        }
        return {
            **found,
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CORE_PROJECT": self.project,
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "NO_GCE_CHECK": "true",
        }

    def fail(self, pattern: str, status: int, message: str = "", times: int = 1_000_000) -> None:
        """Answer with ``status`` where "METHOD /path" matches ``pattern``."""
        self.faults.append(Fault(pattern, status, message or f"The server was told to answer {status}.", times))

    def add_image(self, package: str, tag: str, *, days: int = 3) -> str:
        """An image in every repository. Returns its digest."""
        made = datetime.now(UTC) - timedelta(days=days, minutes=1)
        digest = f"sha256:{hashlib.sha256(f'{package}:{tag}'.encode()).hexdigest()}"
        self.images[package, tag] = self.images[package, digest] = made.isoformat().replace("+00:00", "Z")
        self.images[package, f"{tag}@"] = digest
        return digest

    def add_account(self, name: str, disabled: bool = False) -> str:
        """A service account of the project. Returns its address."""
        email = f"{name}@{self.project}.iam.gserviceaccount.com"
        self.accounts[email] = {
            "name": f"projects/{self.project}/serviceAccounts/{email}", "projectId": self.project, "email": email,
            "uniqueId": f"{len(self.accounts) + 1:021d}", **({"disabled": True} if disabled else {}),
        }  # fmt: skip
        return email

    def add_network(self, name: str, state: str | None = "ACTIVE") -> str:
        """A network, peered with Google's services but for None. Returns its name as Vertex AI wants it."""
        peer = {
            "name": "servicenetworking-googleapis-com", "state": state,
            "network": "https://www.googleapis.com/compute/v1/projects/t-tp/global/networks/servicenetworking",
        }  # fmt: skip
        self.networks[name] = [peer] if state else []
        return f"projects/{self.number}/global/networks/{name}"

    def add_instance(
        self, address: str, share: str = "vol1", network: str = "vpc", mode: str = "PRIVATE_SERVICE_ACCESS",
        state: str = "READY",
    ) -> None:  # fmt: skip
        """A Filestore instance."""
        self.instances.append(
            {
                "name": f"projects/{self.project}/locations/us-central1-a/instances/models", "state": state,
                "tier": "BASIC_SSD", "fileShares": [{"name": share, "capacityGb": "2560"}],
                "networks": [{"network": network, "ipAddresses": [address], "connectMode": mode}],
            }
        )  # fmt: skip


class _Handler(Quiet):
    server_of: ClassVar[ServicesServer]
    wbufsize = -1  # or every answer of headers and a body waits 40 ms for the client's delayed ACK

    def _dispatch(self) -> None:
        server = self.server_of
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.requests.append(f"{self.command} {unquote(self.path)}")
        server.authorizations += self.headers.get_all("Authorization", [])
        time.sleep(server.delay)
        try:
            self._answer(200, self._token() if self.path == "/token" else self._method(body))
        except RefusedError as error:
            self._refuse(error)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _dispatch  # noqa: N815

    def _method(self, body: bytes) -> dict[str, Any]:
        server, address = self.server_of, urlsplit(self.path)
        asked_for = f"{self.command} {address.path.lstrip('/')}"
        for fault in server.faults:
            if fault.times and re.search(fault.pattern, f"{self.command} {unquote(address.path)}"):
                fault.times -= 1
                raise RefusedError(fault.status, fault.message)
        for service, path, where, allowed, method in METHODS:
            if not (found := re.fullmatch(path, asked_for)):
                continue
            if service in server.off:
                name = f"{service}.googleapis.com"
                raise RefusedError(
                    403, f"{name} has not been used in project {server.number} before or it is disabled.",
                    "SERVICE_DISABLED", service=name, consumer=f"projects/{server.number}",
                )  # fmt: skip
            query = parse_qs(address.query, keep_blank_values=True)
            sent = json.loads(body or b"{}")
            self._check_names(set(query) - EVERYWHERE - IN_BUCKETS, allowed if where == "query" else set())
            # Of what is made here the bodies are whole resources.
            if where != "query":
                self._check_names(set(sent), allowed if where == "body" else set())
            return method(Asked(server, tuple(map(unquote, found.groups())), query, sent))
        raise RefusedError(404, f"The requested URL {address.path} was not found on this server.")

    def _check_names(self, given: set[str], allowed: set[str]) -> None:
        if unknown := sorted(given - allowed):
            raise RefusedError(400, f'Invalid JSON payload received. Unknown name "{unknown[0]}": Cannot find field.')

    def _token(self) -> dict[str, Any]:
        """Google's token endpoint, which gives an identity with the access token."""
        if self.server_of.revoked:
            raise RefusedError(400, "Token has been expired or revoked.", "invalid_grant")
        payload = base64.urlsafe_b64encode(json.dumps({"email": self.server_of.email}).encode()).decode().rstrip("=")
        return {
            "access_token": "ya29.token", "expires_in": 3599, "token_type": "Bearer", "id_token": f"e30.{payload}.",
            "scope": "https://www.googleapis.com/auth/cloud-platform openid "
            "https://www.googleapis.com/auth/userinfo.email",
        }  # fmt: skip

    def _refuse(self, error: RefusedError) -> None:
        if self.path == "/token":
            self._answer(error.status, {"error": error.reason, "error_description": str(error)})
            return
        info = {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": error.reason, "domain": "googleapis.com",
            "metadata": error.told,
        }  # fmt: skip
        self._answer(
            error.status,
            {
                "error": {
                    "code": error.status, "message": str(error), "status": STATUS[error.status],
                    **({"details": [info]} if error.reason else {}),
                }
            },
        )  # fmt: skip

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
