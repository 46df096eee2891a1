"""A project for ``sdtune doctor`` to look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdtune import __version__
from sdtune.backends.vertex.google import default_credentials
from tests.backends.vertex.doctor import L4, SPOT_L4, TRAINER
from tests.servers.services import ServicesServer
from tests.servers.services_methods import Bucket


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No credentials of this machine, and none of another test."""
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    default_credentials.cache_clear()
    yield
    default_credentials.cache_clear()


@pytest.fixture
def google(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServicesServer]:
    """A project in which nothing is missing for ALL."""
    with ServicesServer() as server:
        server.buckets["my-bucket"] = Bucket(members={"roles/storage.objectUser": [f"serviceAccount:{TRAINER}"]})
        server.add_image("sdtune-diffusers", __version__)
        server.add_account("trainer")
        server.secrets["token"] = {"roles/secretmanager.secretAccessor": [f"serviceAccount:{TRAINER}"]}
        server.add_network("vpc")
        server.add_instance("10.0.0.2")
        server.quotas = {L4: {"": 0, "us-central1": 8}, SPOT_L4: {"": 4}}
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
