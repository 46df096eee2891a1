"""What a project has settled once: ``sdtune.yaml``, ``SDTUNE_*`` variables and gcloud's own configuration.

What was typed wins, then the environment, then the recipe, then ``sdtune.yaml``, then gcloud.
"""

from __future__ import annotations

import configparser
import os
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from sdtune.errors import RecipeError
from sdtune.jobs.placement import Placement
from sdtune.methods.settings import as_yaml, read_settings

PROJECT_FILE = "sdtune.yaml"
PREFIX = "SDTUNE_"


def find_project_file(start: Path | None = None) -> Path | None:
    """The nearest ``sdtune.yaml``: in ``start`` (the current folder), or in a folder above it.

    RecipeError: it is another user's, as one in /tmp may be: it would say where your files go, and as whom jobs act.
    """
    folder = (start or Path.cwd()).resolve()
    found = next((file for at in (folder, *folder.parents) if (file := at / PROJECT_FILE).is_file()), None)
    if found and _owner(found) not in (0, _user(), _owner(folder)):
        raise RecipeError(
            f"{found}: belongs neither to you nor to whom {folder} belongs, and would say where your files go; make "
            "one of your own in this folder (sdtune init), or go to another."
        )
    return found


def _owner(path: Path) -> int:
    return path.stat().st_uid


def _user() -> int:
    return os.getuid()


def read_project_file(path: Path | None, more: Collection[str] = ()) -> dict[str, Any]:
    """The settings of the project; none without a file. more: names it may have beside those of Placement.

    RecipeError: it is not YAML, or has a line that nobody would read.
    """
    if path is None:
        return {}
    found = read_settings(path, PROJECT_FILE)
    allowed = [*Placement.model_fields, *more]
    for name in found:
        if name not in allowed:
            raise RecipeError(
                f"{path}: found {name!r}, which is not a setting of a project; settings of training belong into a "
                "recipe (--config), and sdtune init shows what may stand here."
            )
    return found


def from_environment(names: Collection[str], environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The settings among ``names`` that ``SDTUNE_<NAME>`` variables give. An empty one gives nothing."""
    given = {name: environment.get(PREFIX + name.upper(), "") for name in names}
    return {name: _flag(name, value) for name, value in given.items() if value}


def _flag(name: str, value: str) -> Any:
    """Several labels or variables in one, a line each: their values may hold commas."""
    return value.splitlines() if name in ("labels", "env") else value


def gcloud_defaults(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """project and region as ``gcloud config set project`` and ``ai/region`` left them; asks nobody."""
    found: dict[str, Any] = {}
    project = environment.get("CLOUDSDK_CORE_PROJECT") or environment.get("GOOGLE_CLOUD_PROJECT")
    region = environment.get("CLOUDSDK_AI_REGION")
    folder = Path(environment.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud")
    configuration = configparser.ConfigParser(interpolation=None)
    try:
        active = environment.get("CLOUDSDK_ACTIVE_CONFIG_NAME") or (folder / "active_config").read_text().strip()
        configuration.read(folder / "configurations" / f"config_{active or 'default'}", encoding="utf-8")
    except (OSError, ValueError, configparser.Error):
        pass
    if project := project or configuration.get("core", "project", fallback=""):
        found["project"] = project
    if region := region or configuration.get("ai", "region", fallback=""):
        found["region"] = region
    return found


def settled(
    names: Collection[str], typed: Mapping[str, Any], recipe: Mapping[str, Any], project: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of ``names``, each from the first that has it: typed, environment, recipe, project, gcloud."""
    layers = (gcloud_defaults(), project, recipe, from_environment(names), typed)
    return {name: layer[name] for layer in layers for name in names if name in layer}


def project_file_text(settings: Mapping[str, Any]) -> str:
    """A commented ``sdtune.yaml`` with ``settings``; all others stand there as comments, with their defaults."""
    lines = [
        "# Where sdtune's jobs run. Every line may be typed instead (--service-account), stand in a recipe,",
        "# or be an environment variable (SDTUNE_SERVICE_ACCOUNT): what was typed wins, then the environment,",
        "# then the recipe, then this file, then gcloud's own configuration. Take away the # before a name to set it.",
        "",
        "# Where to train where neither --backend nor a gs:// output says it: local or vertex.",
        "#backend: vertex",
    ]
    for name, info in Placement.model_fields.items():
        lines += ["", *(f"# {line}" for line in textwrap.wrap(info.description or "", 100))]
        if name in settings:
            lines += as_yaml({name: settings[name]}).rstrip("\n").split("\n")
        else:
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            example = EXAMPLES.get(name, extra.get("default", info.default))
            lines += [f"#{line}" for line in yaml.safe_dump({name: _plain(example)}).splitlines()]
    return "\n".join(lines) + "\n"


EXAMPLES: dict[str, Any] = {
    "project": "my-project-123",
    "gpu": "l4",
    "gpus": 1,
    "machine_type": "g2-standard-8",
    "max_wait": "2h",
    "persistent_resource": "my-cluster",
    "image": "us-central1-docker.pkg.dev/my-project-123/sdtune/sdtune-diffusers:latest",
    "bucket": "gs://my-bucket",
    "service_account": "trainer@my-project-123.iam.gserviceaccount.com",
    "network": "projects/123456789/global/networks/default",
    "reserved_ip_range": ["vertex-ranges"],
    "nfs": ["10.0.0.2:/vol1=/mnt/nfs/models"],
    "tensorboard": "projects/my-project-123/locations/us-central1/tensorboards/1234567890",
    "labels": {"team": "art"},
    "env": {"NCCL_DEBUG": "INFO"},
    "hf_token_secret": "hf-token",
    "wandb_key_secret": "wandb-key",
    "kms_key": "projects/my-project-123/locations/us-central1/keyRings/ring/cryptoKeys/key",
}
"""What a line of ``sdtune.yaml`` may look like, where the default would not show it."""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
