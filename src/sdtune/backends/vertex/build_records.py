"""A build as Cloud Build describes it, and an image as Artifact Registry does, in sdtune's terms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from sdtune.jobs.backend import Submitted
from sdtune.jobs.builder import ENDED, ImageRecord, StepChange

WORDS = {
    "pending": "pending: the build waits for its machine",
    "queued": "queued: the build waits for its machine",
    "working": "building",
}
STEP_STATES = {
    "WORKING": "working",
    "SUCCESS": "done",
    "FAILURE": "failed",
    "TIMEOUT": "failed",
    "INTERNAL_ERROR": "failed",
    "CANCELLED": "cancelled",
}
FAILED_OUTSIDE_OF_STEPS = {
    "FETCH_SOURCE_FAILED": "source",
    "PUSH_FAILED": "push",
    "PUSH_IMAGE_NOT_FOUND": "push",
    "PUSH_NOT_AUTHORIZED": "push",
}
VERSION_TAG = re.compile(r"(.+)-[0-9a-f]{12}")
Build = Mapping[str, Any]


def state_of(build: Build) -> str:
    """``queued``, ``working``, ``success`` ..."""
    state: str = build.get("status", "STATUS_UNKNOWN").lower()
    return state


def image_record(image: Mapping[str, Any]) -> ImageRecord:
    """An image as Artifact Registry lists it."""
    address, _, digest = image["uri"].partition("@")
    tags = tuple(image.get("tags", ()))
    versions = (found[1] for tag in tags if (found := VERSION_TAG.fullmatch(tag)))
    uploaded = image.get("uploadTime")
    return ImageRecord(
        address.rpartition("/")[2],
        image["uri"],
        digest,
        tags,
        next(versions, ""),
        int(image.get("imageSizeBytes", 0)),
        datetime.fromisoformat(uploaded) if uploaded else None,
    )


def submitted(build: Build, region: str) -> Submitted:
    return Submitted(build["name"], build["id"], region, build.get("logUrl", ""))


def changes(build: Build, seen: dict[str, str]) -> Iterator[StepChange]:
    """How the steps have changed since they were ``seen``; one that is over by now has begun, too."""
    steps = {_name(step, number): STEP_STATES.get(step.get("status", ""), "") for number, step in _steps(build)}
    if seen.get("push") == "working" and state_of(build) in ENDED:
        steps["push"] = "done" if state_of(build) == "success" else "failed"
    for name, state in steps.items():
        if not state or seen.get(name) == state:
            continue
        if state != "working" and name not in seen:
            yield StepChange(name, "working")
        seen[name] = state
        yield StepChange(name, state, seconds_of(build, name))


def _steps(build: Build) -> Iterator[tuple[int, Build]]:
    return enumerate(build.get("steps", ()))


def _name(step: Build, number: int) -> str:
    return step.get("id") or f"step {number}"


def seconds_of(build: Build, name: str) -> float:
    """What a step has taken, so far."""
    timings = {_name(step, number): step.get("timing", {}) for number, step in _steps(build)}
    timing = timings.get(name, build.get("timing", {}).get(name.upper(), {}))
    return seconds_between(timing, "startTime", "endTime")


def failed_step(build: Build) -> tuple[str, int]:
    """The step that failed, and its exit code."""
    for number, step in _steps(build):
        if STEP_STATES.get(step.get("status", "")) == "failed":
            return _name(step, number), int(step.get("exitCode", 0))
    return FAILED_OUTSIDE_OF_STEPS.get(build.get("failureInfo", {}).get("type", ""), ""), 0


def seconds_between(times: Mapping[str, Any], start: str, end: str) -> float:
    """Between two times; to now, if the second has not come; 0 if the first has not."""
    if start not in times:
        return 0.0
    began = datetime.fromisoformat(times[start])
    ended = datetime.fromisoformat(times[end]) if end in times else datetime.now(UTC)
    return max(0.0, (ended - began).total_seconds())
