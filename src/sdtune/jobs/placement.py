"""Placement: where in Google Cloud a job runs, on what machine, for how long, and what it may reach.

Its fields are options of every command that submits a job, keys of ``sdtune.yaml`` and of recipes, and, as
``SDTUNE_<FIELD>``, environment variables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from sdtune import __version__
from sdtune.errors import RecipeError
from sdtune.jobs.durations import Duration
from sdtune.jobs.mounts import NfsMount, parse_mount
from sdtune.methods.passwords import TOKENS
from sdtune.methods.places import BUCKETS, MOUNT, in_bucket
from sdtune.methods.settings import Settings

Strategy = Literal["on-demand", "spot", "flex-start"]
_LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIALS|NETRC", re.IGNORECASE)
_WANDB_KEY = re.compile(r"[0-9a-f]{40}", re.IGNORECASE)


def _listed(value: Any) -> Any:
    """``a,b`` and a single text as the lists that YAML would have."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return [part.strip() for whole in value for part in whole.split(",") if part.strip()]
    return value


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _pairs(value: Any) -> Any:
    """A mapping of YAML as the ``name=value`` that are typed."""
    if isinstance(value, Mapping):
        return [f"{name}={'' if content is None else content}" for name, content in value.items()]
    return _one_or_more(value)


def _matching(pattern: str, wanted: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"found {value!r}, wanted {wanted}.")
        return value

    return check


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Pairs = Annotated[tuple[str, ...], BeforeValidator(_pairs)]


class Placement(Settings):
    """Where a job runs. None of it changes what is trained."""

    name: ClassVar[str] = "vertex"

    project: Annotated[str | None, Field(description="Google Cloud project. Not given: gcloud's own.")] = None
    region: Annotated[
        Names, Field(description="Region of the job; repeatable or A,B: the next one where there is no capacity.")
    ] = ("us-central1",)
    gpu: Annotated[
        str | None, Field(description="GPU, such as l4, v100 or a100-80gb (sdtune machines). Not given: l4.")
    ] = None
    gpus: Annotated[
        int | None, Field(ge=1, le=16, description="How many of them in each machine. Not given: 1, or the machine's.")
    ] = None
    machine_type: Annotated[
        str | None, Field(description="Machine type. Not given: the smallest good one for the GPU.")
    ] = None
    force_machine: Annotated[
        bool, Field(description="Send a machine type or GPU that sdtune does not know, as it is.")
    ] = False
    replicas: Annotated[int, Field(ge=1, le=100, description="Machines that train together.")] = 1
    boot_disk_gb: Annotated[int, Field(ge=100, le=64_000, description="Disk of each machine, in GB.")] = 100
    strategy: Annotated[
        Strategy,
        Field(description="spot: cheaper, can be taken away; flex-start: waits for its machine, then keeps it."),
    ] = "on-demand"
    spot: Annotated[bool, Field(description="The same as --strategy spot.")] = False
    max_wait: Annotated[
        Duration | None,
        Field(
            description="With flex-start: how long to wait for a machine; 0: for ever. Not given: 24h.",
            json_schema_extra={"metavar": "DURATION"},
        ),
    ] = None
    timeout: Annotated[
        Duration,
        Field(
            ge=60,
            le=28 * 86_400,
            description="The job is ended after this time, however far it is: 90m, 24h, 2d.",
            json_schema_extra={"metavar": "DURATION", "default": "24h"},
        ),
    ] = 86_400
    restart_on_preemption: Annotated[
        bool, Field(description="Start all machines of the job anew where one of them was taken away.")
    ] = False
    persistent_resource: Annotated[
        str | None, Field(description="Id of a persistent resource to run on, which starts at once.")
    ] = None
    image: Annotated[
        str | None, Field(description="Container image. Not given: sdtune's own of this version, in --repository.")
    ] = None
    repository: Annotated[str, Field(description="Artifact Registry repository of sdtune's images.")] = "sdtune"
    bucket: Annotated[
        str | None,
        Field(description="Bucket that folders of this machine are uploaded to. Not given: the output's."),
    ] = None
    service_account: Annotated[
        str | None, Field(description="Account that the job acts as. Not given: Vertex AI's own.")
    ] = None
    network: Annotated[
        str | None, Field(description="Peered network: projects/NUMBER/global/networks/NAME; NFS needs one.")
    ] = None
    reserved_ip_range: Annotated[Names, Field(description="Reserved range in that network; repeatable.")] = ()
    nfs: Annotated[
        Names,
        Field(
            description="Filestore share to mount; repeatable.",
            json_schema_extra={"metavar": "SERVER:/PATH=/mnt/nfs/NAME"},
        ),
    ] = ()
    save_nfs: Annotated[bool, Field(description="Copy the models to every --nfs share after training.")] = False
    tensorboard: Annotated[
        str | None,
        Field(
            description="Vertex AI TensorBoard: projects/P/locations/REGION/tensorboards/ID; needs --service-account."
        ),
    ] = None
    web_access: Annotated[bool, Field(description="Allow a shell into the running machines.")] = False
    labels: Annotated[
        Pairs, Field(description="Label of the job; repeatable.", json_schema_extra={"metavar": "KEY=VALUE"})
    ] = ()
    env: Annotated[
        Pairs,
        Field(description="Environment variable of the job; repeatable.", json_schema_extra={"metavar": "NAME=VALUE"}),
    ] = ()
    hf_token_secret: Annotated[
        str | None,
        Field(description="Secret Manager's name for the Hugging Face token: NAME or projects/P/secrets/NAME."),
    ] = None
    wandb_key_secret: Annotated[
        str | None, Field(description="Secret Manager's name for the Weights & Biases key.")
    ] = None
    kms_key: Annotated[
        str | None,
        Field(description="Key to encrypt with: projects/P/locations/REGION/keyRings/R/cryptoKeys/K."),
    ] = None

    @field_validator("project")
    @classmethod
    def _is_a_project(cls, value: str | None) -> str | None:
        pattern = r"(?:[a-z][a-z0-9.-]*:)?[a-z][a-z0-9-]{4,28}[a-z0-9]|\d{6,}"
        return value and _matching(pattern, "a project's id, such as my-project-123")(value)

    @field_validator("region")
    @classmethod
    def _are_regions(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not values:
            raise ValueError("found none, wanted at least one region, such as us-central1.")
        for value in values:
            if re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", value):
                raise ValueError(f"found {value!r}, which is a zone; wanted its region, {value[:-2]}.")
            _matching(r"[a-z]+-[a-z]+\d+", "a region, such as us-central1")(value)
        return tuple(dict.fromkeys(values))

    @field_validator("spot")
    @classmethod
    def _agrees_with_the_strategy(cls, spot: bool, info: ValidationInfo) -> bool:
        if spot and info.data.get("strategy") == "flex-start":
            raise ValueError("found true with strategy flex-start; leave one of them out.")
        return spot

    @field_validator("max_wait")
    @classmethod
    def _waits_for_something(cls, seconds: int | None, info: ValidationInfo) -> int | None:
        if seconds is not None and info.data.get("strategy") != "flex-start":
            raise ValueError("only --strategy flex-start waits for its machine; add that or leave --max-wait out.")
        return seconds

    @field_validator("timeout")
    @classmethod
    def _is_allowed(cls, seconds: int, info: ValidationInfo) -> int:
        if info.data.get("strategy") == "flex-start" and seconds > 7 * 86_400:
            raise ValueError("flex-start runs for 7d at most.")
        return seconds

    @field_validator("persistent_resource")
    @classmethod
    def _is_one_place(cls, value: str | None, info: ValidationInfo) -> str | None:
        return value and _in_one_region(value, info)

    @field_validator("bucket")
    @classmethod
    def _is_a_bucket(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            return in_bucket(value if value.startswith((BUCKETS, f"{MOUNT}/")) else f"{BUCKETS}{value}")
        except RecipeError as error:
            raise ValueError(str(error)) from None

    @field_validator("service_account")
    @classmethod
    def _is_an_account(cls, value: str | None) -> str | None:
        return value and _matching(r"[^@\s]+@[^@\s]+\.[^@\s]+", "NAME@PROJECT.iam.gserviceaccount.com")(value)

    @field_validator("network")
    @classmethod
    def _is_told_by_number(cls, value: str | None) -> str | None:
        if (
            value
            and (named := re.fullmatch(r"projects/([^/]+)/global/networks/[^/]+", value))
            and not named[1].isdigit()
        ):
            raise ValueError(
                f"found the project's id {named[1]!r}; Vertex AI wants its number, which this tells: "
                f"gcloud projects describe {named[1]} --format='value(projectNumber)'"
            )
        return value and _matching(
            r"projects/\d+/global/networks/[a-z][a-z0-9-]*", "projects/NUMBER/global/networks/NAME"
        )(value)

    @field_validator("reserved_ip_range")
    @classmethod
    def _in_a_network(cls, values: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if values and not info.data.get("network"):
            raise ValueError("a reserved range lies in a network; add --network.")
        return values

    @field_validator("nfs")
    @classmethod
    def _are_shares(cls, values: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if values and not info.data.get("network"):
            raise ValueError("a share is reached through a peered network; add --network.")
        mounts = [parse_mount(value) for value in values]
        points = [mount.mount_point for mount in mounts]
        if len(set(points)) < len(points):
            raise ValueError(f"two shares at one place: {', '.join(points)}.")
        return values

    @field_validator("save_nfs")
    @classmethod
    def _has_a_share(cls, save: bool, info: ValidationInfo) -> bool:
        if save and not info.data.get("nfs"):
            raise ValueError("there is no share to copy to; add --nfs SERVER:/PATH=/mnt/nfs/NAME.")
        return save

    @field_validator("tensorboard")
    @classmethod
    def _is_a_tensorboard(cls, value: str | None, info: ValidationInfo) -> str | None:
        if not value:
            return None
        wanted = "projects/P/locations/REGION/tensorboards/ID"
        _matching(r"projects/[^/]+/locations/[^/]+/tensorboards/\d+", wanted)(value)
        if not info.data.get("service_account"):
            raise ValueError("Vertex AI TensorBoard needs --service-account, an account that may write to it.")
        return _in_region(value, info)

    @field_validator("labels")
    @classmethod
    def _are_labels(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        for key, value in map(_pair, pairs):
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                raise ValueError(
                    f"found {key}={value}, wanted key and value of at most 63 lower-case letters, digits, '_' and '-'."
                )
            if _SECRET_NAMES.search(key) or TOKENS.search(value):
                raise ValueError(f"{key} looks like a secret, and everybody who may see the job would read its labels.")
            if key == "sdtune" or key.startswith("sdtune-"):
                raise ValueError(f"found {key}; labels that begin with sdtune are sdtune's own.")
        return pairs

    @field_validator("env")
    @classmethod
    def _are_variables(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        for name, value in map(_pair, pairs):
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f"found {name!r}, wanted a name of letters, digits and '_'.")
            if _SECRET_NAMES.search(name) or _is_a_token(value):
                raise ValueError(
                    f"{name} looks like a secret, and everybody who may see the job would read it; keep it in Secret "
                    "Manager and give --hf-token-secret or --wandb-key-secret."
                )
        return pairs

    @field_validator("hf_token_secret", "wandb_key_secret")
    @classmethod
    def _is_a_secret(cls, value: str | None) -> str | None:
        if value and _is_a_token(value):
            raise ValueError(
                "found what looks like the token itself; wanted the name under which Secret Manager keeps it."
            )
        pattern = r"(?:projects/[^/\s]+/secrets/)?[A-Za-z0-9_-]{1,255}(?:/versions/(?:\d+|latest))?"
        return value and _matching(pattern, "NAME or projects/P/secrets/NAME")(value)

    @field_validator("kms_key")
    @classmethod
    def _is_a_key(cls, value: str | None, info: ValidationInfo) -> str | None:
        wanted = "projects/P/locations/REGION/keyRings/RING/cryptoKeys/KEY"
        pattern = r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+"
        return value and _in_region(_matching(pattern, wanted)(value), info)

    @property
    def effective_strategy(self) -> Strategy:
        """What ``--spot`` and ``--strategy`` come to."""
        return "spot" if self.spot else self.strategy

    @property
    def mounts(self) -> tuple[NfsMount, ...]:
        """The NFS shares."""
        return tuple(map(parse_mount, self.nfs))

    @property
    def label_pairs(self) -> dict[str, str]:
        """The user's own labels."""
        return dict(map(_pair, self.labels))

    @property
    def env_pairs(self) -> dict[str, str]:
        """The user's own environment variables."""
        return dict(map(_pair, self.env))

    def secret_of(self, value: str) -> str:
        """The full name of a secret's version in Secret Manager."""
        named = value if value.startswith("projects/") else f"projects/{self.project}/secrets/{value}"
        return named if "/versions/" in named else f"{named}/versions/latest"

    def image_of(self, container: str) -> str:
        """The image that runs methods of ``container``."""
        return self.image or (
            f"{self.region[0]}-docker.pkg.dev/{(self.project or '').replace(':', '/')}/{self.repository}/"
            f"sdtune-{container}:{__version__}"
        )

    def in_project(self) -> Self:
        """The same; RecipeError if no project is known."""
        if not self.project:
            raise RecipeError(
                "project: missing; give --project, write `project: ID` into sdtune.yaml (sdtune init makes one), or "
                "run: gcloud config set project ID"
            )
        return self


def is_token(text: str) -> bool:
    """Whether a text looks like a token or key, which has no place where others may read."""
    return bool(TOKENS.search(text))


def _is_a_token(text: str) -> bool:
    # A key of Weights & Biases is 40 hexadecimal digits, as a commit is, which a text may well name.
    return is_token(text) or bool(_WANDB_KEY.fullmatch(text))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"found {text!r}, wanted NAME=VALUE.")
    return name, value


def _in_region(resource: str, info: ValidationInfo) -> str:
    """``resource`` if it is in the one region of the job."""
    region = resource.split("/")[3]
    regions = info.data.get("region", ())
    if regions and regions != (region,):
        raise ValueError(f"is in {region}, but the job may run in {', '.join(regions)}; it must run in {region} alone.")
    return resource


def _in_one_region(value: str, info: ValidationInfo) -> str:
    if len(info.data.get("region", ())) > 1:
        raise ValueError(f"{value} is in one region; give that one alone.")
    return value
