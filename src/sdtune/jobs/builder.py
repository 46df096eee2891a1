"""Builder: a place that builds images, what it tells while it does, and what it has of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from sdtune import events
from sdtune.jobs.backend import StateChange, Submitted, Upload
from sdtune.jobs.images import BuildSettings, ImageSpec


@dataclass(frozen=True, slots=True)
class StepChange:
    """A step began or ended. state: ``working``, ``done``, ``failed``, ``cancelled``; seconds: that it has taken."""

    step: str
    state: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StepLine:
    """One line of the build's log. step: empty for Cloud Build's own words."""

    step: str
    text: str


@dataclass(frozen=True, slots=True)
class BuildEnd:
    """How a build ended.

    image: its name, such as ``sdtune-diffusers``; digest: of the image, empty if there is none; uris: under which it
    is there; bases: what it was built on, each with its digest. reason: why there is none, in the user's terms;
    last_lines: of the step that failed.
    """

    build_id: str
    image: str
    state: str
    seconds: float
    digest: str = ""
    uris: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    reason: str = ""
    last_lines: tuple[str, ...] = ()

    @property
    def succeeded(self) -> bool:
        return self.state == "success"


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image that is there. version: of the sdtune in it, empty where no tag tells it; size: in bytes."""

    name: str
    uri: str
    digest: str
    tags: tuple[str, ...] = ()
    version: str = ""
    size: int = 0
    uploaded: datetime | None = None


BuildNews = StateChange | StepChange | StepLine | BuildEnd | events.Note
ENDED = ("success", "failure", "internal_error", "timeout", "cancelled", "expired")
"""States that a build does not leave."""


class Builder(Protocol):
    """A place that builds images."""

    @property
    def place(self) -> str:
        """In words, for the user."""

    def render(self, spec: ImageSpec, settings: BuildSettings, *, cache: bool = True) -> dict[str, Any]:
        """The request, as plain data: what is sent, and no call."""
        ...

    def as_text(self, rendered: dict[str, Any]) -> str:
        """The same as a file that ``gcloud builds submit`` takes, with the command in its head."""
        ...

    def find(self, spec: ImageSpec) -> ImageRecord | None:
        """The image of just this source, if it is there. ProjectError: there is no repository."""
        ...

    def digest_of(self, uri: str) -> str | None:
        """The digest of the image with this address and tag; None if there is none."""
        ...

    def point_tags(self, spec: ImageSpec, digest: str) -> tuple[str, ...]:
        """Let the moving tags of ``spec`` name the image with ``digest``; those that were moved."""
        ...

    def stage(self, spec: ImageSpec) -> Upload | None:
        """What must be uploaded before ``start``; None if just this source is there already."""
        ...

    def start(self, rendered: dict[str, Any]) -> Submitted:
        """Begin a build; ``rendered`` is what ``render`` made, and its source is there."""
        ...

    def follow(self, build_id: str) -> Iterator[BuildNews]:
        """What the build says, from its first line; its BuildEnd is the last."""
        ...

    def full_name(self, build: str) -> str:
        """The full name of a build that is given by its id."""
        ...

    def cancel(self, build_id: str) -> None:
        """End it. JobError: it has ended."""
        ...

    def images(self) -> Iterator[ImageRecord]:
        """sdtune's images in the repository, newest first."""
        ...
