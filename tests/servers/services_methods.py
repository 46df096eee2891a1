"""What services.py answers with: a function for each method of an API, and the table of all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.servers.services import ServicesServer

KNOWN_APIS = {
    "aiplatform", "artifactregistry", "cloudbuild", "compute", "file", "iam", "logging", "notebooks", "secretmanager",
    "servicenetworking", "storage",
}  # fmt: skip


@dataclass
class Bucket:
    """members: role -> who has it by the bucket's own policy; None: the policy may not be read."""

    location: str = "US-CENTRAL1"
    kind: str = "region"
    uniform: bool = True
    members: dict[str, list[str]] | None = field(default_factory=dict)


ROLES = {
    "roles/aiplatform.user": {f"aiplatform.customJobs.{verb}" for verb in ("create", "get", "list", "cancel")},
    "roles/logging.viewer": {"logging.logEntries.list"},
    "roles/serviceusage.serviceUsageConsumer": {"serviceusage.services.use", "serviceusage.quotas.get"},
    "roles/artifactregistry.writer": {
        f"artifactregistry.repositories.{verb}Artifacts" for verb in ("upload", "download")
    },
    "roles/cloudbuild.builds.editor": {"cloudbuild.builds.create"},
    "roles/storage.objectUser": {f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list", "update")},
    "roles/iam.serviceAccountUser": {"iam.serviceAccounts.actAs"},
}
"""What the caller is allowed once a policy gives it to anybody, as far as it is asked for here."""


class RefusedError(Exception):
    """An answer that is an error. reason: of its ErrorInfo, with what it says beside."""

    def __init__(self, status: int, message: str, reason: str = "", **told: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.told = status, reason, told


@dataclass(frozen=True)
class Asked:
    """A request, taken apart. names: what the path's pattern has caught."""

    server: ServicesServer
    names: tuple[str, ...]
    query: Mapping[str, list[str]]
    body: Mapping[str, Any]

    def need(self, permission: str) -> None:
        """RefusedError if the caller lacks it."""
        if permission in self.server.denied:
            raise RefusedError(403, f"Permission '{permission}' denied on resource (or it may not exist).",
                               "IAM_PERMISSION_DENIED", permission=permission)  # fmt: skip

    def need_project(self, project: str) -> None:
        """Google says the same of a project that is not there and of one that may not be seen."""
        if project not in (self.server.project, self.server.number):
            raise RefusedError(403, "The caller does not have permission")


# --- the methods -----------------------------------------------------------------------------------------------------


def project_v3(asked: Asked) -> dict[str, Any]:
    asked.need_project(asked.names[0])
    asked.need("resourcemanager.projects.get")
    server = asked.server
    return {
        "name": f"projects/{server.number}", "parent": "organizations/1234567890", "projectId": server.project,
        "state": server.state, "displayName": server.project, "createTime": "2026-01-02T03:04:05.678Z",
        "updateTime": "2026-01-02T03:04:05.678Z", "etag": "W/\"1\"",
    }  # fmt: skip


def project_v1(asked: Asked) -> dict[str, Any]:
    found = project_v3(asked)
    return {
        "projectNumber": asked.server.number, "projectId": found["projectId"], "lifecycleState": found["state"],
        "name": found["displayName"], "createTime": found["createTime"],
    }  # fmt: skip


def permissions(asked: Asked) -> dict[str, Any]:
    if asked.names and "@" not in asked.names[0]:
        asked.need_project(asked.names[0])
    elif asked.names and asked.names[0] not in asked.server.accounts:
        raise RefusedError(404, f"Unknown service account: {asked.names[0]}")
    for permission in asked.body["permissions"]:
        if not re.fullmatch(r"[a-z]+\.[A-Za-z]+\.[A-Za-z]+", permission):
            raise RefusedError(400, f"Permission {permission} is not valid for this resource.")
    held = [name for name in asked.body["permissions"] if name not in asked.server.denied]
    return {"permissions": held} if held else {}


def project_policy(asked: Asked) -> dict[str, Any]:
    asked.need_project(asked.names[0])
    if asked.server.policy is None:
        raise RefusedError(403, "The caller does not have permission", "IAM_PERMISSION_DENIED")
    return _policy(asked.server.policy)


def set_project_policy(asked: Asked) -> dict[str, Any]:
    asked.need_project(asked.names[0])
    asked.server.policy = _members(asked.body["policy"])
    asked.server.denied -= {name for role in asked.server.policy for name in ROLES.get(role, ())}
    return _policy(asked.server.policy)


def billing_info(asked: Asked) -> dict[str, Any]:
    asked.need_project(asked.names[0])
    server = asked.server
    on = {"billingAccountName": server.billing, "billingEnabled": True} if server.billing else {}
    return {"name": f"projects/{server.project}/billingInfo", "projectId": server.project, **on}


def services_by_name(asked: Asked) -> dict[str, Any]:
    names = asked.query.get("names", [])
    if not 1 <= len(names) <= 30:
        raise RefusedError(400, "Between 1 and 30 services may be asked for at once.")
    return {"services": [_service(asked.server, name) for name in names]}


def services(asked: Asked) -> dict[str, Any]:
    names = [f"projects/{asked.server.project}/services/{name}.googleapis.com" for name in sorted(KNOWN_APIS)]
    found = [_service(asked.server, name) for name in names]
    wanted = asked.query.get("filter", [""])[0].partition(":")[2]
    return {"services": [service for service in found if not wanted or service["state"] == wanted]}


def enable_services(asked: Asked) -> dict[str, Any]:
    named = asked.body.get("serviceIds") or [asked.names[1]]
    for name in named:
        _service(asked.server, f"projects/{asked.names[0]}/services/{name}")
        asked.server.services.add(name.partition(".")[0])
    return _done(asked, {"@type": "type.googleapis.com/google.api.serviceusage.v1.BatchEnableServicesResponse"})


def _service(server: ServicesServer, name: str) -> dict[str, Any]:
    found = re.fullmatch(r"projects/([^/]+)/services/([a-z]+)\.googleapis\.com", name)
    if not found or found[1] not in (server.project, server.number) or found[2] not in KNOWN_APIS:
        raise RefusedError(403, f"Not found or permission denied for service(s): {name.rpartition('/')[2]}.",
                           "SERVICE_CONFIG_NOT_FOUND_OR_PERMISSION_DENIED")  # fmt: skip
    api = f"{found[2]}.googleapis.com"
    return {
        "name": f"projects/{server.number}/services/{api}", "parent": f"projects/{server.number}",
        "config": {"name": api, "title": found[2]}, "state": "ENABLED" if found[2] in server.services else "DISABLED",
    }  # fmt: skip


def quota(asked: Asked) -> dict[str, Any]:
    metric = asked.names[1]
    asked.need("serviceusage.quotas.get")
    if metric not in asked.server.quotas:
        raise RefusedError(404, f"The metric {metric} was not found.")
    return _metric(asked.server, metric)


def quotas(asked: Asked) -> dict[str, Any]:
    asked.need("serviceusage.quotas.get")
    metrics = sorted(asked.server.quotas)
    size = int(asked.query.get("pageSize", ["100"])[0])
    start = int(asked.query.get("pageToken", ["0"])[0])
    more = {"nextPageToken": str(start + size)} if start + size < len(metrics) else {}
    return {"metrics": [_metric(asked.server, metric) for metric in metrics[start : start + size]], **more}


def _metric(server: ServicesServer, metric: str) -> dict[str, Any]:
    parent = f"projects/{server.number}/services/aiplatform.googleapis.com/consumerQuotaMetrics"
    name = f"{parent}/{metric.replace('/', '%2F')}"
    buckets = [
        {"effectiveLimit": str(limit), "defaultLimit": "0", **({"dimensions": {"region": region}} if region else {})}
        for region, limit in sorted(server.quotas[metric].items())
    ]
    limit = {
        "name": f"{name}/limits/%2Fproject%2Fregion", "metric": metric, "unit": "1/{project}/{region}",
        "isPrecise": True, "quotaBuckets": buckets,
    }  # fmt: skip
    return {"name": name, "metric": metric, "displayName": metric, "unit": "1", "consumerQuotaLimits": [limit]}


def account(asked: Asked) -> dict[str, Any]:
    asked.need("iam.serviceAccounts.get")
    if asked.names[0] not in asked.server.accounts:
        raise RefusedError(404, f"Unknown service account: {asked.names[0]}")
    return asked.server.accounts[asked.names[0]]


def create_account(asked: Asked) -> dict[str, Any]:
    email = asked.server.add_account(asked.body["accountId"])
    return asked.server.accounts[email]


def enable_account(asked: Asked) -> dict[str, Any]:
    account(asked).pop("disabled", None)
    return {}


def account_policy(asked: Asked) -> dict[str, Any]:
    account(asked)
    return _policy(asked.server.account_members.get(asked.names[0], {}))


def set_account_policy(asked: Asked) -> dict[str, Any]:
    account(asked)
    members = asked.server.account_members[asked.names[0]] = _members(asked.body["policy"])
    asked.server.denied -= {name for role in members for name in ROLES.get(role, ())}
    return _policy(members)


def network(asked: Asked) -> dict[str, Any]:
    project, name = asked.names
    if (
        project not in (asked.server.project, asked.server.number, *asked.server.hosts)
        or name not in asked.server.networks
    ):
        raise RefusedError(404, f"The resource 'projects/{project}/global/networks/{name}' was not found")
    return {
        "kind": "compute#network", "id": "1", "name": name, "autoCreateSubnetworks": True,
        "selfLink": f"https://www.googleapis.com/compute/v1/projects/{project}/global/networks/{name}",
        "peerings": asked.server.networks[name],
    }  # fmt: skip


def repository(asked: Asked) -> dict[str, Any]:
    _, location, name = asked.names
    if (location, name) not in asked.server.repositories:
        raise RefusedError(404, f'Repository "{"/".join(asked.names)}" not found or caller lacks permission')
    return {
        "name": "projects/{}/locations/{}/repositories/{}".format(*asked.names), "mode": "STANDARD_REPOSITORY",
        "format": asked.server.repositories[location, name], "createTime": "2026-01-02T03:04:05.678901Z",
        "updateTime": "2026-01-02T03:04:05.678901Z", "sizeBytes": "123456",
    }  # fmt: skip


def create_repository(asked: Asked) -> dict[str, Any]:
    project, location = asked.names
    name = asked.query["repositoryId"][0]
    asked.server.repositories[location, name] = asked.body["format"]
    made = repository(Asked(asked.server, (project, location, name), {}, {}))
    return _done(asked, {"@type": "type.googleapis.com/google.devtools.artifactregistry.v1.Repository", **made})


def repository_policy(asked: Asked) -> dict[str, Any]:
    repository(asked)
    if asked.server.pushers is None:
        raise RefusedError(403, "Permission 'artifactregistry.repositories.getIamPolicy' denied on resource.")
    return _policy(asked.server.pushers)


def set_repository_policy(asked: Asked) -> dict[str, Any]:
    repository(asked)
    asked.server.pushers = _members(asked.body["policy"])
    return _policy(asked.server.pushers)


def account_of_builds(asked: Asked) -> dict[str, Any]:
    project, location = asked.names
    asked.need_project(project)
    account = f"projects/{asked.server.project}/serviceAccounts/{asked.server.builder}"
    return {
        "name": f"projects/{asked.server.number}/locations/{location}/defaultServiceAccount",
        "serviceAccountEmail": account,
    }


def tag(asked: Asked) -> dict[str, Any]:
    *where, package, name = asked.names
    digest = asked.server.images.get((package, f"{name}@"))
    if not digest or tuple(where[1:]) not in asked.server.repositories:
        raise RefusedError(404, "Requested entity was not found.")
    parent = "projects/{}/locations/{}/repositories/{}/packages/".format(*where) + package
    return {"name": f"{parent}/tags/{name}", "version": f"{parent}/versions/{digest}"}


def version(asked: Asked) -> dict[str, Any]:
    *where, package, name = asked.names
    made = asked.server.images.get((package, name))
    if not made or tuple(where[1:]) not in asked.server.repositories:
        raise RefusedError(404, "Requested entity was not found.")
    parent = "projects/{}/locations/{}/repositories/{}/packages/".format(*where) + package
    return {"name": f"{parent}/versions/{name}", "createTime": made, "updateTime": made}


def instances(asked: Asked) -> dict[str, Any]:
    asked.need("file.instances.list")
    return {"instances": asked.server.instances} if asked.server.instances else {}


def bucket(asked: Asked) -> dict[str, Any]:
    name = asked.names[0]
    found = _bucket(asked)
    asked.need("storage.buckets.get")
    return {
        "kind": "storage#bucket", "id": name, "name": name, "projectNumber": asked.server.number,
        "location": found.location, "locationType": found.kind, "storageClass": "STANDARD",
        "iamConfiguration": {"uniformBucketLevelAccess": {"enabled": found.uniform}},
    }  # fmt: skip


def bucket_permissions(asked: Asked) -> dict[str, Any]:
    _bucket(asked)
    held = [name for name in asked.query.get("permissions", []) if name not in asked.server.denied]
    return {"kind": "storage#testIamPermissionsResponse", **({"permissions": held} if held else {})}


def bucket_policy(asked: Asked) -> dict[str, Any]:
    found = _bucket(asked)
    if found.members is None:
        raise RefusedError(403, "The caller does not have storage.buckets.getIamPolicy access to the bucket.")
    return {"kind": "storage#policy", "resourceId": f"projects/_/buckets/{asked.names[0]}", **_policy(found.members)}


def set_bucket_policy(asked: Asked) -> dict[str, Any]:
    found = _bucket(asked)
    found.members = _members(asked.body)
    asked.server.denied -= {name for role in found.members for name in ROLES.get(role, ())}
    return bucket_policy(asked)


def secret(asked: Asked) -> dict[str, Any]:
    project, name = asked.names
    asked.need_project(project)
    asked.need("secretmanager.secrets.get")
    if name not in asked.server.secrets:
        raise RefusedError(404, f"Secret [projects/{asked.server.number}/secrets/{name}] not found.")
    return {
        "name": f"projects/{asked.server.number}/secrets/{name}", "replication": {"automatic": {}},
        "createTime": "2026-01-02T03:04:05.678901Z", "etag": "\"1\"",
    }  # fmt: skip


def secret_policy(asked: Asked) -> dict[str, Any]:
    members = asked.server.secrets.get(asked.names[1])
    if members is None:
        raise RefusedError(403, "Permission 'secretmanager.secrets.getIamPolicy' denied for resource.")
    return _policy(members)


def list_objects(asked: Asked) -> dict[str, Any]:
    _bucket(asked)
    return {"kind": "storage#objects"}


def create_bucket(asked: Asked) -> dict[str, Any]:
    uniform = asked.body.get("iamConfiguration", {}).get("uniformBucketLevelAccess", {}).get("enabled", False)
    asked.server.buckets[asked.body["name"]] = Bucket(asked.body.get("location", "US").upper(), uniform=uniform)
    return bucket(Asked(asked.server, (asked.body["name"],), {}, {}))


def change_bucket(asked: Asked) -> dict[str, Any]:
    _bucket(asked).uniform = asked.body["iamConfiguration"]["uniformBucketLevelAccess"]["enabled"]
    return bucket(asked)


def _bucket(asked: Asked) -> Bucket:
    if asked.names[0] not in asked.server.buckets:
        raise RefusedError(404, "The specified bucket does not exist.")
    return asked.server.buckets[asked.names[0]]


def _policy(members: Mapping[str, list[str]]) -> dict[str, Any]:
    bindings = [{"role": role, "members": who} for role, who in members.items() if who]
    return {"version": 1, "etag": "BwXhqDVMdys=", **({"bindings": bindings} if bindings else {})}


def _members(policy: Mapping[str, Any]) -> dict[str, list[str]]:
    return {binding["role"]: list(binding["members"]) for binding in policy.get("bindings", ())}


def _done(asked: Asked, response: dict[str, Any]) -> dict[str, Any]:
    """An operation that has ended already."""
    where = "/".join(("projects", asked.names[0], "locations", asked.names[1], "")) if len(asked.names) > 1 else ""
    return {"name": f"{where}operations/acf.1", "done": True, "response": response}


PROJECT = r"projects/([^/:]+)"
ACCOUNT = r"projects/[^/]+/serviceAccounts/([^/:]+)"
BUCKET = r"storage/v1/b/([^/]+)"
REPOSITORIES = r"v1/projects/([^/]+)/locations/([^/]+)/repositories"
PACKAGE = rf"{REPOSITORIES}/([^/]+)/packages/([^/]+)"
QUOTAS = rf"v1beta1/{PROJECT}/services/aiplatform\.googleapis\.com/consumerQuotaMetrics"

Method = Callable[[Asked], dict[str, Any]]
METHODS: tuple[tuple[str, str, str, set[str], Method], ...] = (
    # service, HTTP method and path, parameters or fields of the body, what answers
    ("cloudresourcemanager", rf"GET v3/{PROJECT}", "", set(), project_v3),
    ("cloudresourcemanager", rf"GET v1/{PROJECT}", "", set(), project_v1),
    ("cloudresourcemanager", rf"POST v3/{PROJECT}:testIamPermissions", "body", {"permissions"}, permissions),
    ("cloudresourcemanager", rf"POST v[13]/{PROJECT}:getIamPolicy", "body", {"options"}, project_policy),
    ("cloudresourcemanager", rf"POST v[13]/{PROJECT}:setIamPolicy", "body", {"policy", "updateMask"},
     set_project_policy),
    ("cloudbilling", rf"GET v1/{PROJECT}/billingInfo", "", set(), billing_info),
    ("serviceusage", rf"GET v1/{PROJECT}/services:batchGet", "query", {"names"}, services_by_name),
    ("serviceusage", rf"GET v1/{PROJECT}/services", "query", {"filter", "pageSize", "pageToken"}, services),
    ("serviceusage", rf"POST v1/{PROJECT}/services:batchEnable", "body", {"serviceIds"}, enable_services),
    ("serviceusage", rf"POST v1/{PROJECT}/services/([^/:]+):enable", "", set(), enable_services),
    ("serviceusage", rf"GET {QUOTAS}", "query", {"pageSize", "pageToken", "view"}, quotas),
    ("serviceusage", rf"GET {QUOTAS}/([^/]+)", "query", {"view"}, quota),
    ("iam", rf"GET v1/{ACCOUNT}", "", set(), account),
    ("iam", rf"POST v1/{ACCOUNT}:testIamPermissions", "body", {"permissions"}, permissions),
    ("iam", rf"POST v1/{ACCOUNT}:enable", "", set(), enable_account),
    ("iam", rf"POST v1/{ACCOUNT}:getIamPolicy", "query", {"options.requestedPolicyVersion"}, account_policy),
    ("iam", rf"POST v1/{ACCOUNT}:setIamPolicy", "body", {"policy", "updateMask"}, set_account_policy),
    ("iam", rf"POST v1/{PROJECT}/serviceAccounts", "body", {"accountId", "serviceAccount"}, create_account),
    ("compute", rf"GET compute/v1/{PROJECT}/global/networks/([^/]+)", "", set(), network),
    ("artifactregistry", rf"GET {REPOSITORIES}/([^/:]+)", "", set(), repository),
    ("artifactregistry", rf"GET {REPOSITORIES}/([^/:]+):getIamPolicy", "query", {"options.requestedPolicyVersion"},
     repository_policy),
    ("artifactregistry", rf"POST {REPOSITORIES}/([^/:]+):setIamPolicy", "body", {"policy", "updateMask"},
     set_repository_policy),
    ("cloudbuild", rf"GET v1/{PROJECT}/locations/([^/]+)/defaultServiceAccount", "", set(), account_of_builds),
    ("artifactregistry", rf"POST {REPOSITORIES}", "query", {"repositoryId"}, create_repository),
    ("artifactregistry", rf"GET {PACKAGE}/tags/([^/]+)", "", set(), tag),
    ("artifactregistry", rf"GET {PACKAGE}/versions/([^/]+)", "", set(), version),
    ("file", rf"GET v1/{PROJECT}/locations/-/instances", "query", {"pageSize", "pageToken", "filter", "orderBy"},
     instances),
    ("secretmanager", rf"GET v1/{PROJECT}/secrets/([^/:]+)", "", set(), secret),
    ("secretmanager", rf"GET v1/{PROJECT}/secrets/([^/:]+):getIamPolicy", "query", {"options.requestedPolicyVersion"},
     secret_policy),
    ("storage", rf"GET {BUCKET}", "", set(), bucket),
    ("storage", rf"PATCH {BUCKET}", "body", {"iamConfiguration", "acl", "defaultObjectAcl"}, change_bucket),
    ("storage", rf"GET {BUCKET}/iam/testPermissions", "query", {"permissions"}, bucket_permissions),
    ("storage", rf"GET {BUCKET}/iam", "query", {"optionsRequestedPolicyVersion"}, bucket_policy),
    ("storage", rf"PUT {BUCKET}/iam", "body", {"bindings", "etag", "kind", "resourceId", "version"},
     set_bucket_policy),
    ("storage", rf"GET {BUCKET}/o", "query", {"prefix", "delimiter", "maxResults"}, list_objects),
    ("storage", r"POST storage/v1/b", "query", {"project", "enableObjectRetention"}, create_bucket),
)  # fmt: skip
