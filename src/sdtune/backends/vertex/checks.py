"""What ``sdtune doctor`` asks of a Google Cloud project, question by question."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from google.api_core import exceptions as api
from google.auth.exceptions import GoogleAuthError
from requests import RequestException

from sdtune.backends.vertex import (
    account_checks,
    bucket_checks,
    build_checks,
    image_checks,
    network_checks,
    project_checks,
    secret_checks,
)
from sdtune.backends.vertex.asking import Project, not_answered
from sdtune.backends.vertex.quota_checks import gpu_quota
from sdtune.errors import SdtuneError
from sdtune.jobs.findings import Check, Finding
from sdtune.jobs.machines import choose_machine
from sdtune.jobs.placement import Placement


def vertex_checks(placement: Placement, build_account: str = "") -> list[Check]:
    """The checks of ``placement``, in the order in which they are shown. RecipeError: there is no such machine.

    build_account: that builds act as; empty for Cloud Build's choice.
    """
    machine = choose_machine(
        placement.gpu,
        placement.gpus,
        placement.machine_type,
        strategy=placement.effective_strategy,
        force=placement.force_machine,
    )
    project = Project(placement, build_account)
    first = ("credentials", "project")
    table: tuple[tuple[str, Callable[[Project], Finding], tuple[str, ...]], ...] = (
        ("credentials", project_checks.credentials, ()),
        ("project", project_checks.project, ("credentials",)),
        ("billing", project_checks.billing, first),
        ("APIs", project_checks.apis, first),
        ("permissions", project_checks.permissions, first),
        ("bucket", bucket_checks.bucket, first),
        ("registry", image_checks.registry, first),
        ("image", image_checks.image, (*first, "registry")),
        ("service account", account_checks.service_account, first),
        ("build account", build_checks.build_account, first),
        ("secrets", secret_checks.secrets, first),
        ("network", network_checks.network, first),
        ("NFS shares", network_checks.shares, first),
        ("GPU quota", partial(gpu_quota, machine=machine), first),
    )
    return [Check(name, partial(_answered, ask, project), needs) for name, ask, needs in table]


def _answered(ask: Callable[[Project], Finding], project: Project) -> Finding:
    """What ``ask`` finds; a warning where it gets no answer."""
    try:
        return ask(project)
    except (SdtuneError, api.GoogleAPIError, GoogleAuthError, RequestException) as error:
        return not_answered(error, project)
