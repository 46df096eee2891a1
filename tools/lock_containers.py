"""Writes the locks of the container images: every wheel by version and hash, for Linux on x86_64 and their Python.

    python3.11 tools/lock_containers.py            # renew the locks, containers/*/*.txt
    python3.11 tools/lock_containers.py --sizes    # what the wheels of the locks as they are weigh

pip's own resolver chooses, from PyPI alone and wheels alone, and nothing is downloaded but metadata: pip reads it
beside the wheels, and the sizes stand at the end of each. Configuration of this machine, such as folders of wheels and
caps on versions, is left out, and a wheel of this machine is refused: it would not be the one that the image gets.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
import venv
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
CONTAINERS = ROOT / "containers"
IMAGES = {"diffusers": ("requirements", "workbench"), "kohya": ("requirements", "workbench", "sd-scripts")}
"""The images, and the locks that jobs in them have. The training wing's is the same in both."""
WORKBENCH = ("ipykernel", "nbclient")
"""What runs notebooks beside the image's own wheels, in a Workbench instance and as a job."""
NOTEBOOKS = "What runs notebooks beside requirements.txt: a kernel, and the client that jobs run its cells with."
PIP = "pip>=25.1"
"""Older ones download every wheel to resolve."""
HEAD = """\
# {what}
# Every wheel by version and hash, for Linux on x86_64 and CPython {python}. Renewed by: make lock-containers
"""
LARGEST = 10
TAILS = (1 << 18, 1 << 24)
"""Bytes at the end of a wheel that hold the list of its files: of most wheels, of all."""


@dataclass(frozen=True)
class Wheel:
    """One wheel as pip chose it."""

    name: str
    version: str
    url: str
    sha256: str

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version} \\\n    --hash=sha256:{self.sha256}\n"


@dataclass(frozen=True)
class Size:
    """Bytes of a wheel, and of its files once installed (without bytecode)."""

    name: str
    download: int
    unpacked: int


def main() -> None:
    """Renew the locks, or tell what they weigh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", action="store_true", help="print what each image's wheels weigh, and change nothing")
    asked = parser.parse_args()
    check_machine()
    with new_pip() as pip:
        if not asked.sizes:
            lock(pip)
        else:
            for image in IMAGES:
                print_sizes(image, pip)


def image_python() -> str:
    """The Python of the images, such as 3.11, as their Dockerfiles say; one for both."""
    found = {
        match[1]
        for image in IMAGES
        for match in re.finditer(
            r"^ARG BASE=python:(\d+\.\d+)\.", (CONTAINERS / image / "Dockerfile").read_text(), re.M
        )
    }
    if len(found) != 1:
        sys.exit(f"containers/*/Dockerfile: found ARG BASE=python:... of {sorted(found)}, wanted one Python for all.")
    return found.pop()


def check_machine() -> None:
    """Wheels are chosen for the machine that asks, so it must be like the images."""
    here = (f"{sys.version_info[0]}.{sys.version_info[1]}", platform.system(), platform.machine())
    wanted = (image_python(), "Linux", "x86_64")
    if here != wanted:
        sys.exit(f"found Python {' '.join(here)}, wanted {' '.join(wanted)}, as in the images; run it there.")


@contextlib.contextmanager
def new_pip() -> Iterator[list[str]]:
    """The command of a current pip in an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", PIP], check=True)
        yield [python, "-m", "pip"]


def resolve(pip: Sequence[str], *options: str) -> list[Wheel]:
    """What pip would install, sorted by name."""
    chosen = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name == "PIP_CERT"}
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [*pip, "install", "--dry-run", "--ignore-installed", "--only-binary=:all:", "--quiet"]
        # Of pip's configuration nothing but the machine's certificates.
        environment = chosen | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        ran = subprocess.run([*command, "--report", report.name, *options], cwd=ROOT, env=environment)
        if ran.returncode:
            sys.exit("pip found no set of wheels that fit together; it says above which do not.")
        installed = json.loads(Path(report.name).read_text(encoding="utf-8"))["install"]
    return sorted((wheel_of(entry) for entry in installed), key=lambda wheel: wheel.name)


def wheel_of(entry: dict[str, dict[str, dict[str, dict[str, str]]]]) -> Wheel:
    """One entry of pip's report."""
    name, version = str(entry["metadata"]["name"]), str(entry["metadata"]["version"])
    url = str(entry["download_info"]["url"])
    if urlsplit(url).scheme != "https" or "+" in version:
        sys.exit(f"{name} {version} is a wheel of this machine ({url}), wanted PyPI's.")
    return Wheel(normal(name), version, url, entry["download_info"]["archive_info"]["hashes"]["sha256"])


def normal(name: str) -> str:
    """A package's name as all its spellings have it in common."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lock(pip: Sequence[str]) -> None:
    """Write every lock.

    The training wing's has the versions of constraints.txt, which the tests run with. sd-scripts' Python stands on it,
    and has on top what must be otherwise for sd-scripts.
    """
    wing = resolve(pip, "-r", "containers/diffusers/requirements.in", "-c", "constraints.txt")
    kernel = missing_in(wing, resolve(pip, *WORKBENCH, *pinned(wing), "-c", "constraints.txt"))
    launcher = launcher_beside(pip, [*wing, *kernel])
    for image in IMAGES:
        write(image, "requirements", "The training wing and what it imports.", wing)
        write(image, "workbench", NOTEBOOKS, kernel)
        write(image, "launcher", "What sdtune sends jobs with from a notebook, beside the other two.", launcher)
    asked = (CONTAINERS / "kohya" / "sd-scripts.in").read_text(encoding="utf-8")
    otherwise = {normal(name) for name in re.findall(r"^([\w.-]+)[=<>]", asked, re.M)}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as below:
        below.writelines(f"{wheel.name}=={wheel.version}\n" for wheel in wing if wheel.name not in otherwise)
        below.flush()
        scripts = missing_in(wing, resolve(pip, "-r", "containers/kohya/sd-scripts.in", "-c", below.name))
    write("kohya", "sd-scripts", "What sd-scripts' own Python has over requirements.txt, on which it stands.", scripts)


def launcher_beside(pip: Sequence[str], below: Sequence[Wheel]) -> list[Wheel]:
    """What the project itself wants and ``below`` does not have; the project's own code is copied into the image."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["hpo"]]
    return missing_in(below, resolve(pip, *asked, *pinned(below), "-c", "constraints.txt"))


def pinned(wheels: Sequence[Wheel]) -> list[str]:
    """What asks for exactly these."""
    return [f"{wheel.name}=={wheel.version}" for wheel in wheels]


def missing_in(below: Sequence[Wheel], wheels: Sequence[Wheel]) -> list[Wheel]:
    """Those of ``wheels`` that are not the same in ``below``."""
    return [wheel for wheel in wheels if wheel not in below]


def write(image: str, name: str, what: str, wheels: Sequence[Wheel]) -> None:
    """One lock."""
    file = CONTAINERS / image / f"{name}.txt"
    file.write_text(HEAD.format(what=what, python=image_python()) + "".join(w.pin for w in wheels), encoding="utf-8")
    print(f"{file.relative_to(ROOT)}: {len(wheels)} wheels")


# --- sizes -----------------------------------------------------------------------------------------------------------


def print_sizes(image: str, pip: Sequence[str]) -> None:
    """The sum of an image's wheels, and the largest of them."""
    locks = [str(CONTAINERS / image / f"{name}.txt") for name in IMAGES[image]]
    wheels = [wheel for lock in locks for wheel in resolve(pip, "--no-deps", "--require-hashes", "-r", lock)]
    with ThreadPoolExecutor(8) as pool:
        sizes = sorted(pool.map(size_of, wheels), key=lambda size: -size.unpacked)
    download, unpacked = (sum(getattr(size, what) for size in sizes) for what in ("download", "unpacked"))
    print(f"\n{image}: {len(sizes)} wheels, {download / 1e6:,.0f} MB to download, {unpacked / 1e6:,.0f} MB unpacked")
    print(f"  {'MB unpacked':>12} {'MB wheel':>9}")
    for size in sizes[:LARGEST]:
        print(f"  {size.unpacked / 1e6:12,.0f} {size.download / 1e6:9,.0f}  {size.name}")


def size_of(wheel: Wheel) -> Size:
    """Read off the list of files at the end of the wheel."""
    for tail in TAILS:
        asked = urllib.request.Request(wheel.url, headers={"Range": f"bytes=-{tail}"})
        with urllib.request.urlopen(asked) as answer:
            end = answer.read()
            # "bytes 100-199/200" of a part, nothing where the whole came.
            whole = int(answer.headers.get("Content-Range", f"/{len(end)}").rpartition("/")[2])
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(end)) as listing:
            return Size(wheel.name, whole, sum(file.file_size for file in listing.infolist()))
    sys.exit(f"{wheel.name} {wheel.version}: the list of its files is longer than {TAILS[-1]} bytes.")


if __name__ == "__main__":
    main()
