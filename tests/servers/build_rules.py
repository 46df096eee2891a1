"""What Cloud Build finds wrong with a build that is well formed, in its words where they are known.

Source of the words about logs: cert-manager/cert-manager issue 8851.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from google.cloud.devtools.cloudbuild_v1 import types

from tests.servers.vertex_json import ApiError, bad_request

_TAG = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_VARIABLE = re.compile(r"(?<!\$)(?:\$\$)*\$(?:\{(\w+)\}|([A-Z_][A-Z0-9_]*))")
_KNOWN = {"PROJECT_ID", "PROJECT_NUMBER", "BUILD_ID", "LOCATION", "SERVICE_ACCOUNT", "SERVICE_ACCOUNT_EMAIL"}
NO_PLACE_FOR_LOGS = (
    "if 'build.service_account' is specified, the build must either (a) specify 'build.logs_bucket', (b) use the "
    "REGIONAL_USER_OWNED_BUCKET build.options.default_logs_bucket_behavior option, or (c) use either "
    "CLOUD_LOGGING_ONLY / NONE logging options"
)


def check(build: types.Build) -> None:
    """What the service finds wrong with a build that is well formed."""
    if not build.steps:
        raise bad_request("invalid build: build must have at least one step", [("build.steps", "wanted one.")])
    logging = types.BuildOptions.LoggingMode
    behaviour = types.BuildOptions.DefaultLogsBucketBehavior
    kept = (
        build.logs_bucket
        or build.options.default_logs_bucket_behavior == behaviour.REGIONAL_USER_OWNED_BUCKET
        or build.options.logging in (logging.CLOUD_LOGGING_ONLY, logging.NONE)
    )
    if build.service_account and not kept:
        raise ApiError(400, NO_PLACE_FOR_LOGS)
    if build.service_account and not re.fullmatch(r"projects/[^/]+/serviceAccounts/[^/]+", build.service_account):
        raise ApiError(400, "invalid value for 'build.service_account': wanted projects/P/serviceAccounts/ACCOUNT")
    seconds = build.timeout.total_seconds() if build.timeout else 3600
    if not 0 < seconds <= 86_400:
        raise ApiError(400, f"invalid build: build timeout {seconds:.0f}s exceeds the maximum of 24h")
    if not 0 <= build.options.disk_size_gb <= 4000:
        raise ApiError(400, "invalid build: disk size must be at most 4000 GB")
    ids = [step.id for step in build.steps if step.id]
    if len(set(ids)) < len(ids):
        raise ApiError(400, "invalid build: two steps have the same id")
    if any(not _TAG.fullmatch(tag) for tag in build.tags) or len(build.tags) > 64:
        raise ApiError(400, "invalid build: a tag is not valid")
    if any("/" not in uri for uri in build.images):
        raise ApiError(400, "invalid build: invalid image name")
    for number, step in enumerate(build.steps):
        if not step.name:
            raise ApiError(400, f"invalid build: invalid build step {number}: 'name' is missing")
        _check_variables([*step.args, *step.env, step.name, step.dir_], build)


def _check_variables(texts: Iterable[str], build: types.Build) -> None:
    for text in texts:
        for found in _VARIABLE.finditer(text):
            name = found[1] or found[2]
            if name not in _KNOWN and name not in build.substitutions:
                raise ApiError(
                    400, f'generic::invalid_argument: key in the template "{name}" is not a valid built-in substitution'
                )
