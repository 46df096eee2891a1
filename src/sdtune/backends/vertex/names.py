"""What Google calls things, and where its console shows them: names and addresses that it changes now and then."""

from __future__ import annotations

CONSOLE = "https://console.cloud.google.com"


def job_url(job_id: str) -> str:
    """The page of a custom job. job_id: projects/P/locations/R/customJobs/N."""
    _, project, _, region, _, number = job_id.split("/")
    # As google-cloud-aiplatform 2.7 prints it; /vertex-ai/locations/... was its address before.
    return f"{CONSOLE}/agent-platform/locations/{region}/training/{number}?project={project}"


def quota_url(project: str, service: str = "aiplatform") -> str:
    """The page where more of a quota is asked for."""
    return f"{CONSOLE}/iam-admin/quotas?project={project}&service={service}.googleapis.com"
