"""Check of the quota of the GPU that is asked for.

Source: Service Usage API, v1beta1, consumerQuotaMetrics: a limit has a bucket for all regions, and one for each region
that differs; limits are 64-bit numbers and so texts, -1 for none.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from google.api_core import exceptions as api

from sdtune.backends.vertex.asking import Project
from sdtune.backends.vertex.names import quota_url
from sdtune.jobs.findings import Finding
from sdtune.jobs.machines import Machine

SERVICE = "aiplatform.googleapis.com"
UNLIMITED = -1


def gpu_quota(project: Project, machine: Machine) -> Finding:
    """How many of the GPUs of ``machine`` the project may rent in each region, and how many the job would."""
    placement = project.placement
    if machine.gpu is None:
        return Finding("unasked", f"{machine.machine_type} has no GPU that is known")
    metric = f"{SERVICE}/{machine.gpu.quota_metric(placement.effective_strategy)}"
    wanted = machine.accelerator_count * placement.replicas
    limits = _limits(project, metric)
    if limits is None:
        return Finding("warning", f"nothing is told of {metric}", note=f"All quotas: {quota_url(project.id)}")
    allowed = {region: limits.get(region, limits.get("", 0)) for region in placement.region}
    shown = ", ".join(f"{_words(limit)} in {region}" for region, limit in allowed.items())
    text = f"{machine.gpu.name}: found {shown} for all jobs together, wanted {wanted}"
    enough = [region for region, limit in allowed.items() if limit == UNLIMITED or limit >= wanted]
    if not enough:
        spot = "" if "preemptible" in metric else "--spot, which has a quota of its own, "
        return Finding(
            "bad",
            f"{text} ({metric.rpartition('/')[2]})",
            note=f"Ask for more: {quota_url(project.id)} Or try {spot}another --gpu, or more regions.",
        )
    if len(enough) < len(allowed):
        return Finding("warning", f"{text}: only {', '.join(enough)} will do")
    return Finding("good", text)


def _limits(project: Project, metric: str) -> dict[str, int] | None:
    """By region, "" for all others. None: the project has no such metric."""
    parent = f"v1beta1/projects/{project.id}/services/{SERVICE}/consumerQuotaMetrics"
    try:
        found = project.get("serviceusage", f"{parent}/{quote(metric, safe='')}", view="FULL")
    except api.NotFound:
        # How the name of one metric is made is documented by an example only; the list is long, but certain.
        listed = project.pages("serviceusage", parent, "metrics", pageSize=500)
        found = next((one for one in listed if one["metric"] == metric), {})
    if not found:
        return None
    return {
        bucket.get("dimensions", {}).get("region", ""): int(bucket["effectiveLimit"])
        for limit in found.get("consumerQuotaLimits", ())
        for bucket in limit.get("quotaBuckets", ())
        if _is_by_region(bucket)
    }


def _is_by_region(bucket: dict[str, Any]) -> bool:
    """Without buckets for single zones or users; an answer leaves out a limit of 0 where it follows proto3's rules."""
    bucket.setdefault("effectiveLimit", 0)
    return set(bucket.get("dimensions", {})) <= {"region"}


def _words(limit: int) -> str:
    return "no limit" if limit == UNLIMITED else str(limit)
