"""A Google Cloud on 127.0.0.1: Vertex AI that runs jobs, Cloud Logging, Cloud Storage, Artifact Registry.

with loopback_cloud() as cloud:
    cloud.storage.put("bucket", "dog/1.png", picture)
    subprocess.run([...], env={**os.environ, **cloud.environment})
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Generic, TypeVar

from sdtune import __version__
from tests.servers.build import BuildServer
from tests.servers.emulator import Emulator
from tests.servers.logging_server import LoggingServer
from tests.servers.storage import StorageServer
from tests.servers.vertex import DELAYS, VertexServer

Storage = TypeVar("Storage", StorageServer, Emulator)
TRAINER = MappingProxyType({"sdtune": ("python", "-m", "sdtune.training")})
"""Pattern of images -> what they run: the entry point of sdtune's own."""


@dataclass(frozen=True)
class Cloud(Generic[Storage]):
    """The servers, and the variables by which sdtune, gcloud and Google's clients find them and nothing else."""

    vertex: VertexServer
    logging: LoggingServer
    storage: Storage
    build: BuildServer
    environment: Mapping[str, str]


def with_images(server: BuildServer, project: str) -> None:
    """The images of this version of sdtune are there."""
    server.services.enabled.setdefault(project, set()).add("artifactregistry.googleapis.com")
    server.registry.repository(project, "us-central1", "sdtune")
    for container in ("diffusers", "kohya"):
        address = f"us-central1-docker.pkg.dev/{project}/sdtune/sdtune-{container}"
        server.registry.image(address, datetime.now(UTC), tags=[__version__])


@contextmanager
def loopback_cloud(
    storage: Callable[[], Storage] = StorageServer,  # type: ignore[assignment]
    *,
    logging: LoggingServer | None = None,
    project: str = "my-project",
    delays: Mapping[str, float] = DELAYS,
    entry_points: Mapping[str, Sequence[str]] = TRAINER,
    gcs: Path | None = None,
) -> Iterator[Cloud[Storage]]:
    """Start the servers. storage: StorageServer or Emulator; logging: one that is not like the others, not started yet.

    The others: see VertexServer.
    """
    with (
        tempfile.TemporaryDirectory(prefix="gcloud-", ignore_cleanup_errors=True) as config,
        storage() as bucket_server,
        logging or LoggingServer(project=project) as log_server,
        BuildServer() as build_server,
    ):
        with_images(build_server, project)
        found = {
            "STORAGE_EMULATOR_HOST": bucket_server.address,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING": f"{log_server.address}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{bucket_server.address}/storage/v1/",
            **build_server.environment,
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CORE_PROJECT": project,
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            # Without it Google's clients look for the metadata server of a virtual machine, for seconds.
            "NO_GCE_CHECK": "true",
        }
        # What every machine here has in common with this one: how many cores a process may take.
        of_jobs = {**found, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with VertexServer(log_server, environment=of_jobs, delays=delays, entry_points=entry_points, gcs=gcs) as vertex:
            address = {"CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"{vertex.address}/"}
            yield Cloud(
                vertex, log_server, bucket_server, build_server, {**found, **address, "CLOUDSDK_CONFIG": config}
            )
