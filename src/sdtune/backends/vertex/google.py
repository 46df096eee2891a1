"""Google's clients for Vertex AI and its neighbours: credentials, addresses, retries, one place for all of them.

Vertex AI is spoken to through its own client library; APIs that are asked one or two questions, through one session.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any

from google.api_core import exceptions as api
from google.api_core.retry import Retry
from google.auth.credentials import AnonymousCredentials
from google.protobuf.json_format import ParseError

from sdtune.backends.connections import SECONDS_PER_CALL, make_timely
from sdtune.backends.connections import passes as passes
from sdtune.backends.endpoints import override, takes_credentials
from sdtune.errors import ProjectError, RecipeError

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
RETRY = Retry(predicate=passes, initial=1.0, maximum=15.0, multiplier=2.0, timeout=90.0)
"""For calls that may be made twice: longer than the minute by which quotas are counted, and no longer, since someone is
sitting in front of it."""


@lru_cache(maxsize=1)
def default_credentials() -> Any:
    """Application Default Credentials. ProjectError if there are none."""
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    try:
        credentials, _ = google.auth.default(scopes=[SCOPE])
    except DefaultCredentialsError:
        raise ProjectError(
            "there are no Google Cloud credentials here; get some with: gcloud auth application-default login"
        ) from None
    return credentials


def credentials_for(service: str) -> Any:
    """Those to use with ``service``: none where its address was changed, so that no token goes astray."""
    if takes_credentials(override(service)):
        return default_credentials()
    return AnonymousCredentials()


def address_of(service: str, region: str = "") -> str:
    """Where ``service`` is asked: https://logging.googleapis.com/, or as gcloud's variables say."""
    prefix = f"{region}-" if region else ""
    return override(service) or f"https://{prefix}{service}.googleapis.com/"


def rest_client(kind: Any, service: str, region: str = "") -> Any:
    """One of Google's clients, which asks where and as whom the environment says."""
    client = kind(
        transport="rest",
        credentials=credentials_for(service),
        client_options={"api_endpoint": address_of(service, region).rstrip("/").removeprefix("https://")},
    )
    make_timely(client.transport._session)
    return client


def message_of(kind: Any, content: Mapping[str, Any]) -> Any:
    """``content`` as one of the library's messages. RecipeError: it has a value that the library does not know."""
    try:
        return kind.from_json(json.dumps(content))
    except ParseError as error:
        raise RecipeError(f"Google's client library does not know what is asked for: {error}") from None


class JobsClient:
    """Custom jobs of Vertex AI, as JSON in and out."""

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}

    def create(self, parent: str, job: Mapping[str, Any]) -> dict[str, Any]:
        """Make a job, by one request: whether to ask again is for the caller to say."""
        made = message_of(self._module.types.CustomJob, job)
        return self._dict(self._client(parent).create_custom_job(parent=parent, custom_job=made, **_once()))

    def get(self, name: str) -> dict[str, Any]:
        """A job by its full name."""
        return self._dict(self._client(name).get_custom_job(name=name, **_patient()))

    def cancel(self, name: str) -> None:
        """Ask for its end; returns at once."""
        self._client(name).cancel_custom_job(name=name, **_patient())

    def list(self, parent: str, text: str, page_size: int = 100) -> Iterator[dict[str, Any]]:
        """The jobs that a filter lets through, newest first; pages are asked for as they are taken."""
        request = {"parent": parent, "filter": text, "page_size": page_size}
        return map(self._dict, self._client(parent).list_custom_jobs(request=request, **_patient()))

    @cached_property
    def _module(self) -> Any:
        # One second; VertexBackend begins it while the dataset is checked.
        from google.cloud import aiplatform_v1

        return aiplatform_v1

    def _client(self, name: str) -> Any:
        region = name.split("/")[3]
        if region not in self._clients:
            self._clients[region] = rest_client(self._module.JobServiceClient, "aiplatform", region)
        return self._clients[region]

    def _dict(self, job: Any) -> dict[str, Any]:
        found: dict[str, Any] = type(job).to_dict(
            job,
            use_integers_for_enums=False,
            preserving_proto_field_name=False,
            always_print_fields_with_no_presence=False,
        )
        return found


class StudiesClient(JobsClient):
    """The same for hyperparameter tuning jobs."""

    def create(self, parent: str, job: Mapping[str, Any]) -> dict[str, Any]:
        """Make a study, by one request: whether to ask again is for the caller to say."""
        made = message_of(self._module.types.HyperparameterTuningJob, job)
        create = self._client(parent).create_hyperparameter_tuning_job
        return self._dict(create(parent=parent, hyperparameter_tuning_job=made, **_once()))

    def get(self, name: str) -> dict[str, Any]:
        """A study by its full name, with its trials."""
        return self._dict(self._client(name).get_hyperparameter_tuning_job(name=name, **_patient()))

    def cancel(self, name: str) -> None:
        """Ask for its end; returns at once."""
        self._client(name).cancel_hyperparameter_tuning_job(name=name, **_patient())

    def list(self, parent: str, text: str, page_size: int = 100) -> Iterator[dict[str, Any]]:
        """The studies that a filter lets through, newest first; pages are asked for as they are taken."""
        request = {"parent": parent, "filter": text, "page_size": page_size}
        return map(self._dict, self._client(parent).list_hyperparameter_tuning_jobs(request=request, **_patient()))


class Session:
    """Any of Google's JSON APIs."""

    def __init__(self) -> None:
        self._sessions: dict[bool, Any] = {}

    def call(
        self,
        service: str,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, Any] | None = None,
        region: str = "",
        retry: Retry | None = RETRY,
    ) -> dict[str, Any]:
        """One answer. GoogleAPICallError: it was a refusal; retry: for errors that pass, None to see them at once."""
        url = address_of(service, region) + path

        def send() -> dict[str, Any]:
            return self._send(service, method, url, body, query)

        return (retry(send) if retry else send)()

    def _send(self, service: str, method: str, url: str, body: Any, query: Any) -> dict[str, Any]:
        response = self._session(service).request(method, url, json=body, params=query, timeout=SECONDS_PER_CALL)
        if response.status_code >= 400:
            raise api.from_http_response(response)
        answer: dict[str, Any] = response.json() if response.content else {}
        return answer

    def _session(self, service: str) -> Any:
        from google.auth.transport.requests import AuthorizedSession

        known = takes_credentials(override(service))
        if known not in self._sessions:
            self._sessions[known] = make_timely(AuthorizedSession(credentials_for(service)))
        return self._sessions[known]


def _once() -> dict[str, Any]:
    return {"timeout": SECONDS_PER_CALL, "retry": None}


def _patient() -> dict[str, Any]:
    return {"timeout": SECONDS_PER_CALL, "retry": RETRY}
