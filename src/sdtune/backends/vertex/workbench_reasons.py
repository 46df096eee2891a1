"""Why a Workbench instance was refused or could not be started, in the user's terms.

Its machine is one of Compute Engine, whose words come through. Wordings, as users met them: hashicorp/
terraform-provider-google issues 17333 (key), 18952 (quota) and 21371 (tenant project), GoogleCloudPlatform/ai-on-gke
issue 849 (no machine free), bsteuber/lizzie-gcloud-setup issue 6 (no such GPU in the zone).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from google.api_core import exceptions as api

from sdtune.backends.vertex.names import quota_url
from sdtune.backends.vertex.reasons import Place, explained, translate
from sdtune.errors import CapacityError, JobError, ProjectError, SdtuneError
from sdtune.jobs.workbench import NoQuotaError, region_of

QUEUED = "unable to queue the operation"
"""Part of what the API says while it is at another operation on the same instance, with the status 409."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a hint may name. instance: its name, empty where there is none."""

    project: str
    zone: str
    instance: str = ""

    @property
    def place(self) -> Place:
        return Place(self.project, region_of(self.zone) or self.zone)

    def grant(self, member: str, role: str) -> str:
        """The command that gives ``role`` in the project."""
        return f"gcloud projects add-iam-policy-binding {self.project} --member={member} --role={role}"


Reason = Callable[[re.Match[str], Facts], SdtuneError]


@contextmanager
def asking(what: str, facts: Facts) -> Iterator[None]:
    """Errors of the Notebooks API as sdtune's. what: was being done.

    CapacityError: the zone has no such machine; NoQuotaError: the region gives the project none.
    """
    with explained(what, facts.place):
        try:
            yield
        except api.GoogleAPICallError as error:
            if known := reason_of(error, facts):
                raise type(known)(f"{what}: {known}") from None
            raise


def reason_of(error: api.GoogleAPICallError, facts: Facts) -> SdtuneError | None:
    """What is known of a refusal; None: nothing, but what it says itself."""
    message = str(getattr(error, "message", "") or error)
    for pattern, reason in _REASONS:
        if found := re.search(pattern, message, re.IGNORECASE | re.DOTALL):
            return reason(found, facts)
    return None


def _quota_everywhere(found: re.Match[str], facts: Facts) -> SdtuneError:
    return ProjectError(
        f"the quota {found[1]} of project {facts.project} does not suffice; it counts in all regions together, and a "
        f"new project has 0 of it. Ask for more at {quota_url(facts.project, 'compute')}"
    )


def _quota(found: re.Match[str], facts: Facts) -> SdtuneError:
    return NoQuotaError(
        f"the quota {found[1]} of project {facts.project} in {region_of(facts.zone)} does not suffice; a new project "
        f"has 0 of most GPUs. Ask for more at {quota_url(facts.project, 'compute')} or try another --gpu, or zones of "
        "another region (--zone A,B)."
    )


def _stock_out(found: re.Match[str], facts: Facts) -> SdtuneError:
    return CapacityError(
        f"{facts.zone} has no such machine free at present; try later, or in other zones "
        "(sdtune workbench create --zone A,B)."
    )


def _no_such(found: re.Match[str], facts: Facts) -> SdtuneError:
    kind = {"machinetype": "machine type"}.get(found[1].lower().removesuffix("s"), "GPU")
    return CapacityError(
        f"{facts.zone} has no {kind} {found[2]} at all; try others (--zone A,B). What there is where: gcloud compute "
        f"{'machine-types' if kind == 'machine type' else 'accelerator-types'} list --filter=name={found[2]}"
    )


def _act_as(found: re.Match[str], facts: Facts) -> SdtuneError:
    return ProjectError(
        translate(f"permission to act as service_account: {found[1].strip(chr(39))}", facts.place).text.replace(
            "let jobs act", "let an instance act"
        )
    )


def _permission(found: re.Match[str], facts: Facts) -> SdtuneError:
    # The runner makes instances and looks at them; the rest is the admin's.
    role = "runner" if found[1].rpartition(".")[2] in ("create", "get", "list") else "admin"
    return ProjectError(
        f"you lack the permission {found[1]} in project {facts.project}; its owner gives it with: "
        f"{facts.grant('user:YOU', f'roles/notebooks.{role}')}"
    )


def _no_public_ip(found: re.Match[str], facts: Facts) -> SdtuneError:
    return JobError(
        "the organization allows no public addresses; add --no-public-ip, and a --subnet with Private Google Access"
    )


def _key(found: re.Match[str], facts: Facts) -> SdtuneError:
    return JobError(
        "Workbench may not use the key of --kms-key; allow it to the service agents of Notebooks (service-NUMBER"
        "@gcp-sa-notebooks.iam.gserviceaccount.com) and of Compute Engine (service-NUMBER"
        "@compute-system.iam.gserviceaccount.com), with roles/cloudkms.cryptoKeyEncrypterDecrypter"
    )


def _passing(found: re.Match[str], facts: Facts) -> SdtuneError:
    return JobError(f"{found[0]}, which passes, as far as others met it; run the same command again in a few minutes")


def _busy(found: re.Match[str], facts: Facts) -> SdtuneError:
    return JobError(
        f"{facts.instance or 'the instance'} is at something else; run the same command once that is done (sdtune "
        "workbench list)"
    )


_REASONS: tuple[tuple[str, Reason], ...] = (
    (r"quota '?(\w+_ALL_REGIONS\w*)'? exceeded", _quota_everywhere),
    (r"quota '?(\w+)'? exceeded", _quota),
    (
        r"ZONE_RESOURCE_POOL_EXHAUSTED|does not have enough resources|is currently unavailable in the|stock-?out",
        _stock_out,
    ),
    (r"(acceleratorTypes|machineTypes)/([\w-]+)'? (?:was )?not found", _no_such),
    (r"(?:act as|access to) service[ _]account:?\s*('[^']+'|\S+@\S+\w)", _act_as),
    (r"permission '?(notebooks\.[\w.]+)'? denied", _permission),
    (r"constraints/compute\.vmExternalIpAccess", _no_public_ip),
    (r"delegate the access of CMEK", _key),
    (QUEUED, _busy),
    (r"failed to perform tenant project creation", _passing),
)
