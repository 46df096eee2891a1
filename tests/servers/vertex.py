"""Vertex AI on 127.0.0.1: the REST protocol of its custom jobs, which are checked as the service checks them and RUN.

Google's own clients come here: ``JobServiceClient(transport="rest", ...)`` with ``api_endpoint`` set to the address,
gcloud with CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM. One server has all regions. A job's containers are processes of
this machine (processes.py); what they print goes to a logging server.

    with VertexServer(logging=logging_server, environment={"STORAGE_EMULATOR_HOST": storage.address}) as server:
        server.quota("us-central1", "custom_model_training_nvidia_l4_gpus", 0)
        server.stock_out("europe-west4")

Its hyperparameter tuning jobs are in vertex_studies.py. Not there: Python packages, images, the rights of service
accounts.
"""

from __future__ import annotations

import base64
import json
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.faults import Befallen, respond
from tests.servers.loopback import Loopback, Quiet
from tests.servers.processes import GRACE
from tests.servers.vertex_jobs import (
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    Doom,
    Job,
    LogSink,
    State,
    Surroundings,
    images_match,
    no_machines,
    uses_accelerator,
)
from tests.servers.vertex_json import TYPES, ApiError, matches, parse, to_json
from tests.servers.vertex_rules import REGIONS, check, new_job, outputs_cleared, quota_use
from tests.servers.vertex_studies import Studies

PAGE = 100
DELAYS = {"JOB_STATE_PENDING": 0.05}
_COLLECTION = re.compile(
    r"/v1/projects/([^/]+)/locations/([^/]+)/(?:customJobs|(hyperparameterTuningJobs))(?:/([^/:]+))?(:cancel)?"
)


@dataclass(frozen=True)
class Request:
    """One request as it came. path: decoded, without the query; body: of JSON, None where there was none."""

    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    headers: Mapping[str, str]


class VertexServer(Befallen, Loopback):
    """jobs: by id, in the order of their making. requests: all that came. projects: number by id."""

    def __init__(
        self,
        logging: LogSink | None = None,
        storage_host: str | None = None,
        environment: Mapping[str, str] | None = None,
        delays: Mapping[str, float] = DELAYS,
        entry_points: Mapping[str, Sequence[str]] | None = None,
        gcs: Path | None = None,
        grace: float = GRACE,
    ) -> None:
        super().__init__()
        self._folder = TemporaryDirectory(prefix="vertex-shares-", ignore_cleanup_errors=True)
        emulated = {"STORAGE_EMULATOR_HOST": storage_host} if storage_host else {}
        self.around = Surroundings(
            logging, {**emulated, **(environment or {})}, delays, entry_points or {}, gcs=gcs, grace=grace
        )
        self.jobs: dict[str, Job] = {}
        self.studies = Studies(self)
        self.requests: list[Request] = []
        self.projects: dict[str, str] = {}
        self._denied: list[tuple[str, str]] = []
        self._no_act_as: set[str] = set()
        self._no_repository: list[str] = []
        self._quotas: dict[tuple[str, str], int] = {}
        self._resources: dict[tuple[str, str], str] = {}
        self.listen(_Handler)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.studies.close()
        for job in self.jobs.values():
            job.close()
        for job in self.jobs.values():
            job.join()
        self._folder.cleanup()

    def job(self, name: str) -> Job:
        """The job of this full name, or id."""
        return self.jobs[name.rsplit("/", 1)[-1]]

    # What tests order ------------------------------------------------------------------------------------------------

    def quota(self, region: str, metric: str, limit: int) -> None:
        """Refuse (429) jobs by which more than ``limit`` of the metric would be in use in the region."""
        self._quotas[region, metric.removeprefix("aiplatform.googleapis.com/")] = limit

    def stock_out(self, region: str, accelerator: str | None = None) -> None:
        """No machines: jobs there fail while they are PENDING; with FLEX_START they wait as long as they said."""
        self.around.dooms.append(
            Doom(
                lambda job: job.region == region and uses_accelerator(job, accelerator),
                RESOURCE_EXHAUSTED,
                lambda job: no_machines(job.region),
                lasting=True,
            )
        )

    def low_memory(self, pattern: str) -> None:
        """Jobs whose display name matches run out of the memory of their machine."""
        text = "Replicas low on memory: workerpool0. Specify a machine with larger memory and try again."
        self.doom(pattern, RESOURCE_EXHAUSTED, text, State.JOB_STATE_RUNNING)

    def no_image(self, pattern: str) -> None:
        """Images that match are not there: jobs with them fail while PENDING. The service's wording is not known."""

        def message(job: Job) -> str:
            image = job.message.job_spec.worker_pool_specs[0].container_spec.image_uri
            return f"Failed to pull image {image}: not found. Please make sure that the image exists."

        self.around.dooms.append(Doom(lambda job: images_match(job, pattern), INVALID_ARGUMENT, message))

    def no_repository(self, pattern: str) -> None:
        """Repositories whose images match may not be read by Vertex AI, or are not there: 400 when the job is made."""
        self._no_repository.append(pattern)

    def doom(self, pattern: str, code: int, message: str, after: State = State.JOB_STATE_RUNNING) -> None:
        """End jobs whose display name matches with this google.rpc.Code and message, once they are in ``after``."""
        self.around.dooms.append(
            Doom(lambda job: bool(re.search(pattern, job.message.display_name)), code, lambda job: message, after)
        )

    def deny(self, permission: str = "aiplatform.customJobs.create", project: str = "") -> None:
        """403 for what needs the permission, in one project or in all."""
        self._denied.append((permission, project))

    def no_act_as(self, account: str) -> None:
        """The caller has no iam.serviceAccounts.actAs on the account."""
        self._no_act_as.add(account)

    def nfs(self, server: str, path: str) -> Path:
        """The folder that stands for a share; jobs can mount no others."""
        path = path.rstrip("/") or "/"
        folder = self.around.shares.setdefault((server, path), Path(self._folder.name) / f"{server}{path}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def persistent_resource(self, region: str, name: str, network: str = "") -> None:
        """Make one; jobs can run on no others, and must have its network."""
        self._resources[region, name] = network

    def number_of(self, project: str) -> str:
        """Every project is there; its number is made of its id unless ``projects`` has one."""
        if project.isdigit():
            return project
        return self.projects.setdefault(project, str(100_000_000_000 + zlib.crc32(project.encode())))

    # What clients ask for --------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> dict[str, Any]:
        """The answer as JSON. ApiError otherwise."""
        found = _COLLECTION.fullmatch(request.path)
        action = found and _ACTIONS.get((request.method, bool(found[4]), found[5] or ""))
        if not found or not action:
            raise ApiError(404, f"Method not found: {request.method} {request.path}")
        permission, method = action
        project, region = found[1], found[2]
        if region not in REGIONS:
            raise ApiError(404, f"There is no service for the region {region}.")
        path = request.path.removeprefix("/v1/").split(":")[0]
        if found[3]:
            study_id, verb = found[4] or "", found[5] or ""
            self._allow(self.studies.permission(request, study_id, verb), project, path)
            return self.studies.answer(request, project, region, study_id, verb)
        self._allow(f"aiplatform.customJobs.{permission}", project, path)
        job = self._find(project, region, found[4]) if found[4] else None
        made: dict[str, Any] = method(self, request, project, region, job)
        return made

    def _allow(self, permission: str, project: str, path: str) -> None:
        if not any(denied in (permission, "*") and of in ("", project) for denied, of in self._denied):
            return
        resource = "//aiplatform.googleapis.com/" + re.sub("/(customJobs|hyperparameterTuningJobs)$", "", path)
        info = {
            "@type": f"{TYPES}google.rpc.ErrorInfo",
            "reason": "IAM_PERMISSION_DENIED",
            "domain": "aiplatform.googleapis.com",
            "metadata": {"permission": permission, "resource": resource},
        }
        text = f"Permission '{permission}' denied on resource '{resource}' (or it may not exist)."
        raise ApiError(403, text, details=[info])

    def _find(self, project: str, region: str, job_id: str) -> Job:
        job = self.jobs.get(job_id)
        if job is None or (job.number, job.region) != (self.number_of(project), region):
            name = f"projects/{project}/locations/{region}/customJobs/{job_id}"
            raise ApiError(404, f"The CustomJob {name} does not exist.")
        return job

    def create_job(self, request: Request, project: str, region: str, _: None) -> dict[str, Any]:
        message = new_job()
        parse(request.body, message, "custom_job")
        outputs_cleared(message)
        number = self.number_of(project)
        check(message, region, number)
        with self._lock:
            self.check_job_spec(message.job_spec, number, region)
            job_id = str(random.randrange(10**18, 9 * 10**18))
            job = self.jobs[job_id] = Job(message, project, number, region, job_id, self.around)
            answer = to_json(message, request.query)
        job.start()
        return answer

    def check_job_spec(self, spec: Any, number: str, region: str) -> None:
        """ApiError if what the job needs is not there, or not for this caller."""
        if spec.service_account in self._no_act_as:
            text = (
                f"You do not have permission to act as service_account: {spec.service_account}. (or it may not exist)."
            )
            raise ApiError(400, text)
        self._check_images(spec, number)
        self._check_resource(spec, region)
        self._check_quota(spec, number, region)

    def _check_images(self, spec: Any, number: str) -> None:
        for pool in spec.worker_pool_specs:
            image = pool.container_spec.image_uri
            if any(re.search(pattern, image) for pattern in self._no_repository):
                host, project, repository = [*image.split("/"), "", ""][:3]
                place = f"projects/{project}/locations/{host.removesuffix('-docker.pkg.dev')}/repositories/{repository}"
                agent = f"service-{number}@gcp-sa-aiplatform-cc.iam.gserviceaccount.com"
                text = (
                    f"Vertex AI Service Agent {agent} does not have permission to access Artifact Registry repository "
                    f"{place}."
                )
                raise ApiError(400, text, "FAILED_PRECONDITION")

    def _check_resource(self, spec: Any, region: str) -> None:
        name = spec.persistent_resource_id
        if not name:
            return
        if (region, name) not in self._resources:
            raise ApiError(404, f"The PersistentResource {name} does not exist in {region}.")
        if spec.network != self._resources[region, name]:
            raise ApiError(400, f"The network of the job must be that of the PersistentResource {name}.")

    def _check_quota(self, spec: Any, number: str, region: str) -> None:
        exceeded = []
        active = [job.message.job_spec for job in self.jobs.copy().values()
                  if not job.ended and (job.number, job.region) == (number, region)]  # fmt: skip
        for metric, wanted in quota_use(spec).items():
            limit = self._quotas.get((region, metric))
            if limit is not None and wanted + sum(quota_use(one).get(metric, 0) for one in active) > limit:
                exceeded.append(f"aiplatform.googleapis.com/{metric}")
        if exceeded:
            raise ApiError(429, f"The following quota metrics exceed quota limits: {','.join(exceeded)}")

    def get_job(self, request: Request, project: str, region: str, job: Job) -> dict[str, Any]:
        with job.lock:
            return to_json(job.message, request.query)

    def cancel_job(self, request: Request, project: str, region: str, job: Job) -> dict[str, Any]:
        if job.ended:
            raise ApiError(400, f"The CustomJob {job.message.name} is in state {job.state}.", "FAILED_PRECONDITION")
        job.cancel()
        return {}

    def delete_job(self, request: Request, project: str, region: str, job: Job) -> dict[str, Any]:
        if not job.ended:
            raise ApiError(400, f"The CustomJob {job.message.name} is in state {job.state}.", "FAILED_PRECONDITION")
        with self._lock:
            self.jobs.pop(job.id, None)
        operation = f"projects/{job.number}/locations/{region}/operations/{random.randrange(10**18)}"
        return {"name": operation, "done": True, "response": {"@type": f"{TYPES}google.protobuf.Empty"}}

    def list_jobs(self, request: Request, project: str, region: str, _: None) -> dict[str, Any]:
        query, number = request.query, self.number_of(project)
        wanted = matches(query["filter"]) if query.get("filter") else lambda job: True
        newest = [job for job in reversed(self.jobs.copy().values()) if (job.number, job.region) == (number, region)]
        with suppress(ValueError):
            size = int(query.get("pageSize") or PAGE)
            start = int(base64.b64decode(query.get("pageToken", "")) or 0)
            if size > 0 and start <= len(newest):
                found = [job for job in newest if wanted(job.message)][start:]
                page = [self.get_job(request, project, region, job) for job in found[:size]]
                more = {"nextPageToken": base64.b64encode(str(start + size).encode()).decode()}
                return {**({"customJobs": page} if page else {}), **(more if len(found) > size else {})}
        raise ApiError(400, "Request contains an invalid argument.")


# HTTP method, whether a job is named, verb -> permission, function.
_ACTIONS: dict[tuple[str, bool, str], tuple[str, Any]] = {
    ("POST", False, ""): ("create", VertexServer.create_job),
    ("GET", False, ""): ("list", VertexServer.list_jobs),
    ("GET", True, ""): ("get", VertexServer.get_job),
    ("DELETE", True, ""): ("delete", VertexServer.delete_job),
    ("POST", True, ":cancel"): ("cancel", VertexServer.cancel_job),
}


class _Handler(Quiet):
    server_of: VertexServer

    def _dispatch(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = raw.decode(errors="replace")
        request = Request(self.command, unquote(address.path), query, body, dict(self.headers))
        self.server_of.requests.append(request)
        respond(self, self.server_of, request.path, lambda: self.server_of.answer(request))

    do_GET = do_POST = do_DELETE = do_PATCH = _dispatch  # noqa: N815
