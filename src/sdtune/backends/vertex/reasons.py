"""Google's errors in the user's terms: what is lacking, and the command or option that mends it.

Wordings, as users met them: GoogleCloudPlatform/stable-diffusion-on-gcp issue 12, GoogleCloudPlatform/
vertex-ai-samples issues 213, 700, 2176, 2611 and 3479, googleapis/python-aiplatform issues 885, 1073 and 1922.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.connections import cause_of, said_by
from sdtune.backends.vertex.names import quota_url
from sdtune.errors import JobError, ProjectError, SdtuneError


@dataclass(frozen=True, slots=True)
class Place:
    """What an advice may name."""

    project: str
    region: str
    strategy: str = "on-demand"


@dataclass(frozen=True, slots=True)
class Reason:
    """A translated error. no_capacity: another region may have what this one lacks; exit_code: of the process."""

    text: str
    no_capacity: bool = False
    exit_code: int | None = None


def translate(message: str, place: Place) -> Reason:
    """What ``message`` of Vertex AI means; as it is where nothing is known of it."""
    plain = re.sub(r"^(?:\d{3} )?(?:[A-Z]+ https?://\S+: )?", "", message).strip()
    for pattern, reason in _REASONS:
        if found := re.search(pattern, plain, re.IGNORECASE | re.DOTALL):
            return reason(found, place)
    return Reason(_found_errors(plain))


def _quota(found: re.Match[str], place: Place) -> Reason:
    metric = found[0].removeprefix("aiplatform.googleapis.com/")
    others = ["another --gpu", "more regions (--region A,B)"]
    if "preemptible" not in metric:
        others.append("--spot, which has a quota of its own")
    return Reason(
        f"the quota {metric} of project {place.project} in {place.region} does not suffice; a new project has 0 of "
        f"every GPU. Ask for more at {quota_url(place.project)} or try {', or '.join(others)}.",
        no_capacity=True,
    )


def _stock_out(found: re.Match[str], place: Place) -> Reason:
    others = ["more regions (--region A,B)", "another --gpu"]
    if place.strategy != "flex-start":
        others.append("--strategy flex-start, which waits for a machine")
    return Reason(
        f"{place.region} has no such machine free at present; try {', or '.join(others)}.",
        no_capacity=True,
    )


def _permission(found: re.Match[str], place: Place) -> Reason:
    return Reason(
        f"you lack the permission {found[1]} in project {place.project}; its owner gives it with: gcloud projects "
        f"add-iam-policy-binding {place.project} --member=user:YOU --role=roles/aiplatform.user"
    )


def _act_as(found: re.Match[str], place: Place) -> Reason:
    account = found[1].rstrip(".")
    return Reason(
        f"you may not let jobs act as {account}; its owner allows it with: gcloud iam service-accounts "
        f"add-iam-policy-binding {account} --member=user:YOU --role=roles/iam.serviceAccountUser"
    )


def _disabled(found: re.Match[str], place: Place) -> Reason:
    service = re.search(r"[a-z]+\.googleapis\.com", found.string)
    return Reason(
        f"an API is switched off in project {place.project}; switch it on with: gcloud services enable "
        f"{service[0] if service else 'aiplatform.googleapis.com'} --project={place.project}"
    )


def _image(found: re.Match[str], place: Place) -> Reason:
    said = found.string.splitlines()[0].rstrip(".")
    agent = re.search(r"service-[\w-]+@[\w.-]+\w", said)
    reader = agent[0] if agent else f"Vertex AI's service agent in project {place.project}"
    return Reason(
        f"the container image cannot be had: {said}. Build it (sdtune build), or check --image; and let {reader} read "
        "its repository (roles/artifactregistry.reader): it fetches images, whatever --service-account says."
    )


def _memory(found: re.Match[str], place: Place) -> Reason:
    return Reason("the machine ran out of memory (not the GPU's); give a --machine-type with more.")


def _peering(found: re.Match[str], place: Place) -> Reason:
    return Reason(
        "the network of --network is not peered with Google's services; peer it with: gcloud services vpc-peerings "
        "connect --service=servicenetworking.googleapis.com --network=NAME --ranges=RANGE"
    )


def _exit_code(found: re.Match[str], place: Place) -> Reason:
    code = int(found[1])
    # 128 + 9, and what containers are told that took too much memory.
    if code == 137:
        return Reason(
            "the training process was killed, most often because the machine ran out of memory (not the GPU's); "
            "give a --machine-type with more.",
            exit_code=code,
        )
    tail = found.string[found.end() :].partition("\n")[2].strip()
    shown = "".join(f"\n  | {line}" for line in tail.splitlines()[-30:])
    return Reason(f"the training process ended with exit code {code}.{shown}", exit_code=code)


_REASONS: tuple[tuple[str, Callable[[re.Match[str], Place], Reason]], ...] = (
    (r"(?:aiplatform\.googleapis\.com/)?custom_model_training_\w+|serverless_training_\w+gpus", _quota),
    (r"resources are insufficient|stockout|stock-out|insufficient capacity|ZONE_RESOURCE_POOL_EXHAUSTED", _stock_out),
    (r"permission to act as service[_ ]account:?\s*(\S+)", _act_as),
    (r"permission '?([\w.]+)'? denied", _permission),
    (r"has not been used in project|SERVICE_DISABLED|API is disabled|is disabled\. Enable it", _disabled),
    (
        r"artifact registry repository|image.*(?:not found|does not exist|unable to pull|failed to pull|"
        r"permission to access)|ImagePull|(?:not found|pull).*image|manifest unknown|"
        r"artifactregistry\.repositories\.downloadArtifacts",
        _image,
    ),
    (r"low on memory", _memory),
    (r"NETWORK_NOT_PEERED|not peered", _peering),
    (r"non-?zero (?:status|exit code)(?: of|:)? (-?\d+)", _exit_code),
)


def _found_errors(text: str) -> str:
    """``List of found errors:\\t1.Field: ...; Message: ...\\t2...`` as one line for each."""
    head, listed, rest = text.partition("List of found errors:")
    if not listed:
        return text
    errors = [re.sub(r"^\d+\.Field: ", "", part).strip() for part in rest.split("\t") if part.strip()]
    lines = [error.replace("; Message: ", ": ").rstrip() for error in errors]
    return f"{head.strip()} Vertex AI refuses the job:".strip() + "".join(f"\n  {line}" for line in lines)


@contextmanager
def explained(what: str, place: Place) -> Iterator[None]:
    """Google's exceptions as sdtune's. what: was being done, for the message."""
    from google.auth.exceptions import GoogleAuthError
    from google.protobuf.json_format import ParseError
    from requests import RequestException

    try:
        yield
    except (api.GoogleAPIError, GoogleAuthError, RequestException, ParseError) as error:
        raise error_of(error, what, place) from None


def error_of(error: Any, what: str, place: Place) -> SdtuneError:
    """The error to raise for one of Google's."""
    from google.auth.exceptions import RefreshError

    error = cause_of(error)
    if isinstance(error, RefreshError) and not error.retryable:
        return ProjectError(
            f"the Google Cloud credentials are no longer taken ({error}); renew them with: "
            "gcloud auth application-default login"
        )
    text = f"{what}: {translate(said_by(error), place).text}"
    if isinstance(error, api.Unauthorized):
        return ProjectError(f"{text} Log in with: gcloud auth application-default login")
    # What the project lacks; all else is the job's.
    return (ProjectError if isinstance(error, api.Forbidden) else JobError)(text)
