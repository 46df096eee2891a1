"""Container images: what one is built from, what it is called, how it is built.

The source is packed so that the same files give the same bytes on every machine, and its digest is part of the image's
tag. So an image whose source has not changed is known to be there already, and is not built again.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

import sdtune
from sdtune.errors import ProjectError, RecipeError
from sdtune.jobs.durations import Duration
from sdtune.jobs.placement import Placement
from sdtune.methods.catalog import METHODS
from sdtune.methods.settings import Settings, read_settings

CONTAINERS = tuple(dict.fromkeys(method.container for method in METHODS.values()))
Target = Literal["train", "workbench"]
LARGEST_BUILD = 24 * 3600
"""Seconds: Cloud Build's own limit."""

TRAINER = ("__init__.py", "errors.py", "events.py", "methods", "training")
"""What of the package trains, and with it nothing that launches."""
LAUNCHER = ("__main__.py", "api", "backends", "cli", "commands", "jobs")
"""The rest, which a notebook sends jobs with."""
TRAINER_AT = "src/sdtune"
"""As in a checkout, so that the same Dockerfile builds from one."""
MODEL = "examples/base-model"
"""What the smoke test trains; its pictures it draws itself."""
BASES = "containers/base-images.yaml"
"""The images that these are built on, with the digests that their tags have had."""
CARRIED = "sources"
"""The folder of the installed package that has what a checkout has around it."""
OF_A_CONTAINER = (
    "Dockerfile", "Dockerfile.dockerignore", "requirements.in", "requirements.txt", "workbench.txt", "launcher.txt",
    "sd-scripts.in", "sd-scripts.txt", "SD_SCRIPTS_COMMIT",
)  # fmt: skip
OF_THE_TRAINER = re.compile(
    r".+\.py|configs/clip/merges\.txt\.gz"
    r"|configs/\w+/(?:model_index|(?:\w+/)(?:config|scheduler_config|tokenizer_config))\.json"
)
OF_A_MODEL = re.compile(
    r"model_index\.json|(?:unet|vae|text_encoder)/(?:config\.json|(?:diffusion_pytorch_)?model\.safetensors)"
    r"|scheduler/scheduler_config\.json"
    r"|tokenizer/(?:tokenizer_config\.json|special_tokens_map\.json|vocab\.json|merges\.txt|tokenizer\.json)"
)
"""All that is uploaded for a build. What else lies there, notes or keys, stays where it is; so does what is a link."""


def _spelled(value: Any) -> Any:
    """``e2-highcpu-8``, as Compute Engine writes it, as Cloud Build does."""
    return value.upper().replace("-", "_") if isinstance(value, str) else value


MachineType = Annotated[
    Literal["E2_HIGHCPU_8", "E2_HIGHCPU_32", "E2_STANDARD_2", "E2_MEDIUM", "N1_HIGHCPU_8", "N1_HIGHCPU_32"],
    BeforeValidator(_spelled),
]


class BuildSettings(Settings):
    """How an image is built. None of it changes what is in it."""

    name: ClassVar[str] = "build"

    machine_type: Annotated[
        MachineType, Field(description="Machine of the build.", json_schema_extra={"metavar": "TYPE"})
    ] = "E2_HIGHCPU_8"
    disk_gb: Annotated[int, Field(ge=100, le=4000, description="Disk of that machine, in GB.")] = 200
    timeout: Annotated[
        Duration,
        Field(
            ge=60,
            le=LARGEST_BUILD,
            description="The build is ended after this time: 90m, 2h.",
            json_schema_extra={"metavar": "DURATION", "default": "2h"},
        ),
    ] = 7200
    service_account: Annotated[
        str | None,
        Field(description="Account that the build acts as, which may push images. Not given: the project's own."),
    ] = None

    @classmethod
    def help_command(cls) -> str:
        return "sdtune build --help"

    @field_validator("service_account")
    @classmethod
    def _is_an_account(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(r"[^@\s]+@[^@\s]+\.[^@\s]+", value):
            raise ValueError(f"found {value!r}, wanted NAME@PROJECT.iam.gserviceaccount.com.")
        return value


# --- the source ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What an image is built from: files by their name in the build's folder, sorted."""

    files: tuple[tuple[str, Path], ...]

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits of names and contents: what a compressor makes of them differs between its versions."""
        hashed = [(name, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in self.files]
        return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()

    def pack(self) -> bytes:
        """All of it as a .tgz without anything of the machine or the hour that made it."""
        packed = io.BytesIO()
        with (
            gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for name, path in self.files:
                content = path.read_bytes()
                member = tarfile.TarInfo(name)
                # All else is 0 or empty in a new TarInfo. A wheel keeps no mode, so none of a checkout's is kept.
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))
        return packed.getvalue()


def source_root() -> Path:
    """The folder with ``containers/`` and ``examples/``: in the installed package, or the checkout around it."""
    package = Path(sdtune.__file__).parent
    carried = package / CARRIED
    return carried if carried.is_dir() else package.parents[1]


def find_source(container: str, root: Path | None = None, target: Target = "train") -> Source:
    """The files of one image. ProjectError: this installation does not have them."""
    root = root or source_root()
    dockerfile = root / "containers" / container / "Dockerfile"
    if not dockerfile.is_file():
        raise ProjectError(f"{dockerfile} is not there, so that nothing can be built; install sdtune anew.")
    package = Path(sdtune.__file__).parent
    bases = root / BASES
    found = [(BASES, bases)] if bases.is_file() else []
    folder = root / "containers" / container
    found += [(f"containers/{container}/{name}", path) for name, path in _below(folder) if name in OF_A_CONTAINER]
    for part in (*TRAINER, *LAUNCHER) if target == "workbench" else TRAINER:
        at = package / part
        found += (
            [(f"{TRAINER_AT}/{part}", at)]
            if at.is_file()
            else [(f"{TRAINER_AT}/{part}/{name}", path) for name, path in _below(at) if OF_THE_TRAINER.fullmatch(name)]
        )
    found += [(f"{MODEL}/{name}", path) for name, path in _below(root / MODEL) if OF_A_MODEL.fullmatch(name)]
    return Source(tuple(sorted(found)))


def pinned_bases(root: Path | None = None) -> dict[str, str]:
    """Build arguments: the bases whose digests are known, by name and digest. All others are what their tags mean."""
    path = (root or source_root()) / BASES
    listed = read_settings(path, "bases") if path.is_file() else {}
    return {name: f"{base['tag']}@{base['digest']}" for name, base in listed.items() if base.get("digest")}


def record_bases(used: Iterable[str], root: Path | None = None) -> list[str]:
    """Note which digests the bases had, where a checkout does not know them yet; those that were noted.

    used: addresses such as docker.io/library/python:3@sha256:..., as a build tells them. What came with an installed
    package is left as it is.
    """
    root = root or source_root()
    path = root / BASES
    if root.name == CARRIED or not path.is_file() or not os.access(path, os.W_OK):
        return []
    text, noted = path.read_text(encoding="utf-8"), []
    for base in used:
        address, _, digest = base.partition("@")
        for named in re.finditer(r'(?m)^  tag: (\S+)\n  digest: ""$', text):
            tag = named[1]
            if address == tag or address.endswith(f"/{tag}"):
                text = text.replace(named[0], f"  tag: {tag}\n  digest: {digest}")
                noted.append(f"{tag}@{digest}")
    if noted:
        path.write_text(text, encoding="utf-8")
    return noted


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files in ``folder`` by their path in it, without links, and without what Python and desktops leave there."""
    for path in folder.rglob("*"):
        name = PurePosixPath(path.relative_to(folder).as_posix())
        linked = any(at.is_symlink() for at in (path, *path.parents) if at.is_relative_to(folder) and at != folder)
        if path.is_file() and not linked and not any(part.startswith((".", "__pycache__")) for part in name.parts):
            yield str(name), path


# --- the image -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSpec:
    """An image to build. registry: host, project and repository, as image addresses begin; bases: see pinned_bases."""

    container: str
    target: Target
    registry: str
    source: Source
    bases: Mapping[str, str] = field(default_factory=dict)
    version: str = sdtune.__version__

    @property
    def name(self) -> str:
        return image_name(self.container, self.target)

    @property
    def address(self) -> str:
        """Without a tag."""
        return f"{self.registry}/{self.name}"

    @property
    def tag(self) -> str:
        """The tag that no other source has."""
        return f"{self.version}-{self.source.digest[:12]}"

    @property
    def tags(self) -> tuple[str, ...]:
        """The same, and those that move: what ``train`` takes, and what people type."""
        return (self.tag, self.version, "latest")

    @property
    def uri(self) -> str:
        return f"{self.address}:{self.tag}"

    @property
    def uris(self) -> tuple[str, ...]:
        return tuple(f"{self.address}:{tag}" for tag in self.tags)


def image_name(container: str, target: Target = "train") -> str:
    """What ``Placement.image_of`` calls an image, and the same for Workbench."""
    return f"sdtune-{container}" if target == "train" else f"sdtune-{container}-{target}"


def plan_image(container: str, target: Target, placement: Placement, root: Path | None = None) -> ImageSpec:
    """The image of ``container`` in the repository of ``placement``. RecipeError: there is no such container."""
    if container not in CONTAINERS:
        raise RecipeError(f"there is no image {container!r}; there are: {', '.join(CONTAINERS)}.")
    address = placement.model_copy(update={"image": None}).image_of(container)
    source = find_source(container, root, target)
    return ImageSpec(container, target, address.rpartition("/")[0], source, pinned_bases(root))


def bucket_of(placement: Placement) -> str:
    """The bucket that sdtune keeps its own things in; not given: the one that ``sdtune setup`` makes."""
    name = (placement.project or "").replace(":", "-").replace(".", "-")
    return placement.bucket or f"gs://{name}-sdtune"
