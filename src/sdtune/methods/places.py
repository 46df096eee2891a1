"""Places of files: folders of this machine, and Cloud Storage as ``gs://bucket/path`` or, as Vertex AI mounts it,
``/gcs/bucket/path``. The one place that converts between the two."""

from __future__ import annotations

import re

from sdtune.errors import RecipeError

BUCKETS = "gs://"
MOUNT = "/gcs"
"""Where Vertex AI mounts buckets: /gcs/bucket/path is gs://bucket/path."""

_BUCKET = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?)*", re.ASCII)
_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")


def is_bucket(name: str) -> bool:
    """Whether a bucket may be called so. Source: cloud.google.com/storage/docs/buckets, naming."""
    fits = 3 <= len(name) <= 222 and bool(_BUCKET.fullmatch(name)) and not _ADDRESS.fullmatch(name)
    return fits and not name.startswith("goog") and "google" not in name


def in_bucket(place: str) -> str | None:
    """``place`` as gs://bucket/path without a slash at its end; None if it is not in Cloud Storage.

    RecipeError: it claims to be there, but no object could ever be.
    """
    if place.startswith(f"{MOUNT}/"):
        address = place.removeprefix(f"{MOUNT}/")
    elif place.startswith(BUCKETS):
        # Guides of old show gs:///gcs/bucket; the mount is never doubled.
        address = place.removeprefix(BUCKETS).removeprefix(f"{MOUNT}/")
    else:
        return None
    bucket, _, path = address.partition("/")
    path = path.rstrip("/")
    parts = path.split("/") if path else []
    if not is_bucket(bucket) or not all(part and part not in (".", "..") for part in parts):
        raise RecipeError(f"{place!r} is no place in Cloud Storage; wanted gs://bucket/path.")
    if any(not letter.isprintable() for letter in path) or len(path.encode()) > 1000:
        raise RecipeError(f"{place!r} is no place in Cloud Storage: its path has control characters or is too long.")
    if "$(" in path or "$$" in path:
        raise RecipeError(f"{place!r}: Vertex AI would put something else in place of the $; choose another name.")
    return f"{BUCKETS}{bucket}/{path}".rstrip("/")


def bucket_and_path(address: str) -> tuple[str, str]:
    """The two parts of gs://bucket/path; the path is empty for a whole bucket."""
    bucket, _, path = address.removeprefix(BUCKETS).partition("/")
    return bucket, path
