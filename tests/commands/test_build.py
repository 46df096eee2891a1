"""What is said of the image that a job would run in."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from sdtune import __version__
from sdtune.backends.registry import open_builder
from sdtune.commands.build import image_note
from sdtune.jobs.placement import Placement
from tests.servers.build import BuildServer

PLACEMENT = Placement(project="my-project")
ADDRESS = "us-central1-docker.pkg.dev/my-project/sdtune/sdtune-kohya"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BuildServer]:
    with BuildServer() as found:
        found.registry.repository("my-project", "us-central1", "sdtune")
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def note(placement: Placement = PLACEMENT) -> str | None:
    return image_note(open_builder(placement), placement, "kohya")


def test_an_image_that_is_missing_older_or_there(server: BuildServer) -> None:
    offer = "build it, or the job cannot start: sdtune build kohya"
    assert note() == f"the image {ADDRESS}:{__version__} is not there; {offer}"
    server.registry.image(ADDRESS, datetime(2026, 1, 1, tzinfo=UTC), tags=["0.0.9-0123456789ab", "latest"])
    assert note() == f"the newest image sdtune-kohya is of sdtune 0.0.9, and this is {__version__}; {offer}"
    server.registry.image(ADDRESS, datetime(2026, 1, 2, tzinfo=UTC), tags=[__version__])
    assert note() is None


def test_an_image_of_ones_own_is_not_asked_about(server: BuildServer) -> None:
    assert note(PLACEMENT.model_copy(update={"image": "docker.io/me/mine:1"})) is None
    assert not server.requests
