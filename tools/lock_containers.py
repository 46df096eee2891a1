"""Writes the locks of the container images: every wheel by version and hash, for Linux on x86_64 and their Python.

    python3.11 tools/lock_containers.py            # renew containers/*/requirements.txt and workbench.txt
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
IMAGES = {"diffusers": ("-c", "constraints.txt"), "kohya": ()}
"""The images, and what else pip is told. The tests run with constraints.txt; sd-scripts wants other versions."""
WORKBENCH = ("ipykernel",)
"""What a notebook's kernel needs beside the image's own wheels."""
PIP = "pip>=25.1"
"""Older ones download every wheel to resolve."""
HEAD = """\
# {what} Every wheel by version and hash, for Linux on
# x86_64 and CPython {python}. Renewed by: make lock-containers
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
    parser.add_argument("image", nargs="*", help=f"of {', '.join(IMAGES)}; not given: all")
    asked = parser.parse_args()
    unknown = [name for name in asked.image if name not in IMAGES]
    if unknown:
        parser.error(f"no image is called {unknown[0]}; there are: {', '.join(IMAGES)}")
    check_machine()
    with new_pip() as pip:
        for image in asked.image or IMAGES:
            (print_sizes if asked.sizes else lock)(image, pip)


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
    normal = re.sub(r"[-_.]+", "-", name).lower()
    return Wheel(normal, version, url, entry["download_info"]["archive_info"]["hashes"]["sha256"])


def lock(image: str, pip: Sequence[str]) -> None:
    """Write requirements.txt from requirements.in, and workbench.txt: what comes on top in a notebook's kernel."""
    folder, python = CONTAINERS / image, image_python()
    wheels = resolve(pip, "-r", str(folder / "requirements.in"), *IMAGES[image])
    requirements = folder / "requirements.txt"
    head = HEAD.format(what=f"What the {image} image holds.", python=python)
    requirements.write_text(head + "".join(wheel.pin for wheel in wheels), encoding="utf-8")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.writelines(f"{wheel.name}=={wheel.version}\n" for wheel in wheels)
        pins.flush()
        both = resolve(pip, "-r", pins.name, *WORKBENCH)
    known = {wheel.name for wheel in wheels}
    more = [wheel for wheel in both if wheel.name not in known]
    head = HEAD.format(what=f"What {image}'s notebook kernel needs beside requirements.txt.", python=python)
    (folder / "workbench.txt").write_text(head + "".join(wheel.pin for wheel in more), encoding="utf-8")
    print(f"{image}: {len(wheels)} wheels, {len(more)} more for a notebook's kernel")


# --- sizes -----------------------------------------------------------------------------------------------------------


def print_sizes(image: str, pip: Sequence[str]) -> None:
    """The sum of an image's wheels, and the largest of them."""
    wheels = resolve(pip, "--no-deps", "--require-hashes", "-r", str(CONTAINERS / image / "requirements.txt"))
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
