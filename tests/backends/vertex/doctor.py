"""What ``sdtune doctor`` finds in a project, asked of the servers of this machine."""

from __future__ import annotations

from typing import Any

from sdtune.backends.registry import open_checks
from sdtune.commands.doctor import examine
from sdtune.jobs.findings import Finding
from sdtune.jobs.placement import Placement

L4 = "aiplatform.googleapis.com/custom_model_training_nvidia_l4_gpus"
SPOT_L4 = "aiplatform.googleapis.com/custom_model_training_preemptible_nvidia_l4_gpus"
NETWORK = "projects/123456789012/global/networks/vpc"
SHARE = "10.0.0.2:/vol1=/mnt/nfs/models"
TRAINER = "trainer@my-project.iam.gserviceaccount.com"
ALL = {"bucket": "gs://my-bucket/some/folder", "service_account": TRAINER, "network": NETWORK, "nfs": [SHARE]}


def ask(build_account: str = "", **settings: Any) -> dict[str, Finding]:
    """The finding of each check."""
    placement = Placement.from_settings({"project": "my-project", **settings})
    return dict(examine(open_checks("vertex", placement, build_account)))


def grades(found: dict[str, Finding], *wanted: str) -> list[str]:
    """The checks that are graded so."""
    return [name for name, finding in found.items() if finding.grade in wanted]
