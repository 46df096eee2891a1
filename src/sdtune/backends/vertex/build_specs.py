"""The request to Cloud Build that makes an image, as plain data: what --dry-run prints, and gcloud takes."""

from __future__ import annotations

from typing import Any, TypeVar

import yaml

from sdtune.jobs.images import MODEL, BuildSettings, ImageSpec, bucket_of
from sdtune.jobs.placement import Placement
from sdtune.methods.places import bucket_and_path

DOCKER = "gcr.io/cloud-builders/docker"
"""Cloud Build's own: kept on its machines, and logged in to Artifact Registry."""
BUILD, SMOKE_TEST = "build", "smoke-test"
FOLDER = "sdtune/builds"
"""In the bucket: sources by their digest, and logs."""
Data = TypeVar("Data")


def build_request(
    spec: ImageSpec, settings: BuildSettings, placement: Placement, *, cache: bool = True
) -> dict[str, Any]:
    """A Build of Cloud Build's v1 API. cache: take what has not changed from the image that was built last."""
    bucket, name = bucket_and_path(source_address(spec, placement))
    account = settings.service_account
    return {
        "source": {"storageSource": {"bucket": bucket, "object": name}},
        "steps": escaped([_build(spec, cache), _smoke_test(spec)]),
        # Pushed when every step has succeeded, and only then; their digests are in the answer.
        "images": list(spec.uris),
        "tags": ["sdtune", spec.name, spec.tag],
        "timeout": f"{settings.timeout}s",
        # Cloud Build refuses a service account without one of: a bucket for the logs, a bucket that it makes itself,
        # Cloud Logging. A bucket that is there anyway can be read by whoever owns it, in order and at once; Cloud
        # Logging gives the same lines late, unordered and at 60 questions a minute, and gcloud would show none of them.
        "logsBucket": f"{bucket_of(placement)}/{FOLDER}/logs",
        **({"serviceAccount": f"projects/{placement.project}/serviceAccounts/{account}"} if account else {}),
        "options": {
            "machineType": settings.machine_type,
            "diskSizeGb": str(settings.disk_gb),  # a 64-bit integer, which JSON carries as text
            "logging": "GCS_ONLY",
            # A signed statement of what was built from which source, kept beside the image.
            "requestedVerifyOption": "VERIFIED",
        },
    }


def source_address(spec: ImageSpec, placement: Placement) -> str:
    """Where the packed source lies: the same source at the same place."""
    return f"{bucket_of(placement)}/{FOLDER}/{spec.source.digest}.tgz"


def _build(spec: ImageSpec, cache: bool) -> dict[str, Any]:
    # BuildKit writes its cache into the image itself (BUILDKIT_INLINE_CACHE) and reads it from the last one. Its other
    # kind, type=registry,mode=max, wants a builder of its own, out of which gigabytes would be copied for the smoke
    # test; a missing image is no error, but a build from the start.
    cached = [f"--cache-from={spec.address}:latest"] if cache else ["--no-cache"]
    labels = {
        "org.opencontainers.image.title": spec.name,
        "org.opencontainers.image.version": spec.version,
        "sdtune.source": spec.source.digest,
    }
    return {
        "id": BUILD,
        "name": DOCKER,
        "env": ["DOCKER_BUILDKIT=1", "BUILDKIT_PROGRESS=plain"],
        "args": [
            "build",
            f"--file=containers/{spec.container}/Dockerfile",
            f"--target={spec.target}",
            "--build-arg=BUILDKIT_INLINE_CACHE=1",
            *(f"--build-arg={name}={base}" for name, base in spec.bases.items()),
            *cached,
            *(f"--label={name}={value}" for name, value in labels.items()),
            *(f"--tag={uri}" for uri in spec.uris),
            ".",
        ],
    }


def _smoke_test(spec: ImageSpec) -> dict[str, Any]:
    # The user of the image may not write into the home that Cloud Build mounts.
    python, env = "python", ["HOME=/tmp", "HF_HUB_OFFLINE=1"]
    if spec.target == "workbench":
        # What the kernel of a notebook there is told.
        python = f"/opt/micromamba/envs/sdtune-{spec.container}/bin/python"
        env.append("PYTHONPATH=/opt/sdtune")
        if spec.container == "kohya":
            env += ["SDTUNE_SD_SCRIPTS=/opt/sd-scripts", "SDTUNE_SD_SCRIPTS_PYTHON=/opt/sd-scripts-python/bin/python"]
    return {
        "id": SMOKE_TEST,
        # The image that the step before has left on this machine; nothing has been pushed yet.
        "name": spec.uri,
        "entrypoint": python,
        "args": ["-m", "sdtune.training.smoke", f"--container={spec.container}", f"--base-model=/workspace/{MODEL}"],
        "env": env,
    }


def escaped(data: Data) -> Data:
    """``data`` with every $ doubled: Cloud Build would put the value of a variable in its place."""
    if isinstance(data, str):
        return data.replace("$", "$$")  # type: ignore[return-value]
    if isinstance(data, list):
        return [escaped(part) for part in data]  # type: ignore[return-value]
    if isinstance(data, dict):
        return {name: escaped(part) for name, part in data.items()}  # type: ignore[return-value]
    return data


def as_file(request: dict[str, Any], placement: Placement) -> str:
    """A build config. gcloud wants the source on its command line and not in the file, so that stands in a comment."""
    where = request["source"]["storageSource"]
    rest = {name: part for name, part in request.items() if name != "source"}
    # Without aliases and folded lines: gcloud's own reader of YAML is an older one.
    text = yaml.safe_dump(rest, sort_keys=False, allow_unicode=True, width=1_000_000)
    return (
        "# By hand, once the source is in its bucket:\n"
        f"#   gcloud builds submit gs://{where['bucket']}/{where['object']} --config=FILE "
        f"--region={placement.region[0]} --project={placement.project}\n{text}"
    ).rstrip()
