"""A Dockerfile read, and run as far as that can be done without Docker: its steps in Python, in an environment here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dockerfile_parse import DockerfileParser

from tests.conftest import ROOT

CONTAINERS = ROOT / "containers"
IMAGES = ("diffusers", "kohya")
IN_PYTHON = "python -m "
ELSEWHERE = ("/opt/", "/mnt/", "/home/sdtune", "/var/cache/sdtune")
"""Folders of the image, which are laid in a folder here."""
STAND_INS: dict[str, Path] = {}
"""Files to copy in place of the project's."""


@dataclass(frozen=True)
class Instruction:
    """One line of a Dockerfile, its continued lines joined. flags: ``--mount=...`` and the like, without the dashes."""

    name: str
    value: str
    flags: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        return shlex.split(self.value)


@dataclass(frozen=True)
class Dockerfile:
    """arguments: what ARG gives before the first FROM. stages: by their name, from FROM on."""

    image: str
    arguments: dict[str, str]
    stages: dict[str, list[Instruction]]

    def of(self, stage: str, *names: str) -> list[Instruction]:
        """The instructions of a stage that are called so, after those of the stage that it goes on from."""
        return [one for one in self.all(stage) if one.name in names]

    def all(self, stage: str) -> list[Instruction]:
        """Every instruction that made what the stage is."""
        first, *rest = self.stages[stage]
        below = first.words[0]
        return [*self.all(below), *rest] if below in self.stages else [first, *rest]

    @staticmethod
    def is_from_a_stage(one: Instruction) -> bool:
        return any(flag.startswith("from=") for flag in one.flags)


def read(image: str, project: Path = ROOT) -> Dockerfile:
    """The Dockerfile of one image, in a checkout or in the source that a build gets."""
    arguments: dict[str, str] = {}
    stages: dict[str, list[Instruction]] = {}
    stage: list[Instruction] | None = None
    for line in DockerfileParser(path=str(project / "containers" / image / "Dockerfile")).structure:
        if line["instruction"] == "COMMENT":
            continue
        one = _instruction(line["instruction"], line["value"])
        if one.name == "FROM":
            stage = stages.setdefault(one.words[2], [])
        if stage is None:
            name, _, value = one.value.partition("=")
            arguments[name] = value
        else:
            stage.append(one)
    return Dockerfile(image, arguments, stages)


def _instruction(name: str, value: str) -> Instruction:
    flags = []
    while value.startswith("--"):
        flag, _, value = value.partition(" ")
        flags.append(flag.removeprefix("--"))
        value = value.lstrip()
    return Instruction(name, value, tuple(flags))


def run_in_python(
    file: Dockerfile, stage: str, root: Path, python: Path, given: dict[str, str], project: Path = ROOT
) -> str:
    """Run a stage in ``python``'s environment, with the image's folders in ``root``; what it printed.

    COPY copies, ENV sets, RUN runs where it is in Python; all else is left out. What is copied from the stage with a
    compiler is made by its steps first. given: over what ENV sets.
    project: the folder that is built from.
    AssertionError: a step failed.
    """
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    printed = ""
    for one in file.all(stage):
        if one.name == "COPY" and file.is_from_a_stage(one):
            compile_in(file, root, python, project)
        elif one.name == "COPY":
            copy(one.words[:-1], Path(there(one.words[-1], root)), project)
        elif one.name == "ENV":
            pairs = (word.partition("=") for word in one.words)
            environment |= {name: there(value, root) for name, _, value in pairs if name not in ("PATH", *given)}
        elif one.name == "RUN" and one.value.startswith(IN_PYTHON):
            mounts = {target: str(project / source) for source, target in map(bind, one.flags) if source}
            # On the environment here, and not on the Python that this was made of.
            libraries = site_packages(python)
            lay = f"echo {libraries} > \\1/{libraries.relative_to(python.parents[1])}/below.pth"
            below = f"python -m venv --without-pip \\1 && {lay}"
            command = re.sub(r"^python -m venv --system-site-packages --without-pip (\S+)", below, one.value)
            for target, source in mounts.items():
                command = command.replace(target, source)
            ran = subprocess.run(
                [*(no_network() if "network=none" in one.flags else []), "bash", "-ec", there(command, root)],
                env=kept() | environment | given, cwd=root, capture_output=True, text=True,
            )  # fmt: skip
            printed += ran.stdout
            assert ran.returncode == 0, f"RUN {one.value}\n{ran.stdout}{ran.stderr}"
    return printed


def compile_in(file: Dockerfile, root: Path, python: Path, project: Path) -> None:
    """The steps of the stage ``compiler``, with ``python``'s own Triton, and the folders of both stages in ``root``."""
    for one in file.stages["compiler"]:
        if one.name == "COPY" and not file.is_from_a_stage(one):
            copy(one.words[:-1], Path(there(one.words[-1], root)), project)
        elif one.name == "RUN":
            environment = kept() | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
            command = [*no_network(), "bash", "-ec", there(one.value, root)]
            ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
            assert ran.returncode == 0, f"RUN {one.value}\n{ran.stdout}{ran.stderr}"


def site_packages(python: Path) -> Path:
    """Where an environment keeps its libraries."""
    (found,) = (python.parents[1] / "lib").glob("python3.*/site-packages")
    return found


def copy(sources: list[str], target: Path, project: Path) -> None:
    """As COPY does: files into a folder, the content of a folder as it."""
    for source in sources:
        if (project / source).is_dir():
            shutil.copytree(project / source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(STAND_INS.get(source, project / source), target / Path(source).name)


def there(text: str, root: Path) -> str:
    """``text`` with the image's folders in ``root``."""
    for folder in ELSEWHERE:
        text = text.replace(folder, f"{root}{folder}")
    return text


def bind(flag: str) -> tuple[str, str]:
    """Source and target of ``mount=type=bind,source=...,target=...``; nothing of another flag."""
    parts = dict(part.partition("=")[::2] for part in flag.removeprefix("mount=").split(","))
    return parts.get("source", ""), parts.get("target", "")


def no_network() -> list[str]:
    """What takes the network from a command, where this user may."""
    alone = ["unshare", "--net"]
    can = shutil.which("unshare") and not subprocess.run([*alone, "true"], capture_output=True).returncode
    return alone if can else []


def kept() -> dict[str, str]:
    """Of this environment, what finds packages and holds threads back."""
    names = ("OMP_NUM_THREADS", "TMPDIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "XDG_CONFIG_HOME")
    return {name: value for name, value in os.environ.items() if name in names or name.startswith("PIP_")}


def exec_form(one: Instruction) -> list[str]:
    """The list of ENTRYPOINT or CMD."""
    words: list[str] = json.loads(one.value)
    return words
