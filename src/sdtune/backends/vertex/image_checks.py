"""Checks of the container image: the registry's repository, and the image in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote

from google.api_core import exceptions as api

from sdtune.backends.vertex.asking import Project
from sdtune.jobs.findings import Finding

CONTAINER = "diffusers"
"""The container of most methods."""
_IMAGE = re.compile(
    r"(?P<location>[a-z0-9-]+)-docker\.pkg\.dev/(?P<project>(?:[a-z0-9-]+\.[a-z0-9.-]+/)?[a-z0-9-]+)/"
    r"(?P<repository>[^/]+)/(?P<package>[^:@]+)(?::(?P<tag>[^@]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True, slots=True)
class Image:
    """An image in Artifact Registry. digest: empty for one that is named by its tag."""

    location: str
    project: str
    repository: str
    package: str
    tag: str
    digest: str

    @property
    def parent(self) -> str:
        """The repository's full name."""
        return f"projects/{self.project}/locations/{self.location}/repositories/{self.repository}"


def parse_image(name: str) -> Image | None:
    """``us-central1-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG`` by its parts; None if it lies elsewhere."""
    found = _IMAGE.fullmatch(name)
    if not found:
        return None
    # Projects of a domain: example.com:name, but example.com/name in an image's name.
    return Image(
        found["location"], found["project"].replace("/", ":"), found["repository"], found["package"],
        found["tag"] or "latest", found["digest"] or "",
    )  # fmt: skip


def registry(project: Project) -> Finding:
    """The repository that the image lies in."""
    image = parse_image(project.placement.image_of(CONTAINER))
    if image is None:
        return Finding("unasked", f"{project.placement.image} is not in Artifact Registry")
    try:
        found = project.get("artifactregistry", f"v1/{image.parent}")
    except api.NotFound:
        return Finding(
            "bad",
            f"there is no repository {image.repository} in {image.location}",
            (
                f"gcloud artifacts repositories create {image.repository} --repository-format=docker "
                f"--location={image.location} --project={image.project}",
            ),
        )
    if found.get("format") != "DOCKER":
        return Finding(
            "bad",
            f"{image.repository} in {image.location} is for {found.get('format', 'nothing')}, wanted DOCKER",
            (
                f"gcloud artifacts repositories create {image.repository}-docker --repository-format=docker "
                f"--location={image.location} --project={image.project}",
            ),
            note=f"Then give --repository {image.repository}-docker.",
        )
    return Finding("good", f"{image.repository} in {image.location}")


def image(project: Project) -> Finding:
    """The image that ``sdtune train`` would run."""
    name = project.placement.image_of(CONTAINER)
    image = parse_image(name)
    assert image  # or its registry would not have been found
    package = f"v1/{image.parent}/packages/{quote(image.package, safe='')}"
    try:
        digest = image.digest
        if not digest:
            tagged = project.get("artifactregistry", f"{package}/tags/{image.tag}")
            digest = tagged["version"].rpartition("/")[2]
        version = project.get("artifactregistry", f"{package}/versions/{digest}")
    except api.NotFound:
        if project.placement.image:
            return Finding(
                "bad",
                f"there is no image {name}",
                (
                    f"gcloud artifacts docker images list {image.location}-docker.pkg.dev/"
                    f"{image.project.replace(':', '/')}/{image.repository} --include-tags",
                ),
                note="This shows what there is; then give --image.",
            )
        return Finding("bad", f"{image.package}:{image.tag} is not built yet", (f"sdtune build {CONTAINER}",))
    tag = "" if image.digest else f":{image.tag}"
    shown = f"{image.package.rpartition('/')[2]}{tag}, {digest[:19]}, {_age(version.get('createTime', ''))}"
    if image.project not in (project.id, project.number) and project.number:
        agent = f"serviceAccount:service-{project.number}@gcp-sa-aiplatform.iam.gserviceaccount.com"
        return Finding(
            "warning",
            f"{shown}; it is project {image.project}'s, and Vertex AI's service agent of this one must read it",
            (
                f"gcloud artifacts repositories add-iam-policy-binding {image.repository} --location={image.location} "
                f"--member={agent} --role=roles/artifactregistry.reader --project={image.project}",
            ),
        )
    return Finding("good", shown)


def _age(created: str) -> str:
    """``built 3 days ago``."""
    try:
        days = (datetime.now(UTC) - datetime.fromisoformat(created)).days
    except ValueError:
        return "of unknown age"
    return "built today" if days < 1 else f"built {days} day{'s' if days > 1 else ''} ago"
