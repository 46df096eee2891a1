"""What ``sdtune doctor`` asks of this machine."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sdtune.jobs.findings import Check, Finding

TRAINER = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
_PIP = f"{sys.executable} -m pip install"
ROOM_GB = 20
"""A base model in 32-bit floats, its copy in the cache, and results."""


def local_checks() -> list[Check]:
    """The checks of this machine, in the order in which they are shown."""
    return [
        Check("python", python),
        Check("trainer", trainer),
        Check("GPU", gpu),
        Check("disk", disk),
    ]


def python() -> Finding:
    """The interpreter, which is also that of training."""
    found = platform.python_version()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("warning", f"{found}; sdtune is tried with 3.11 to 3.13")
    return Finding("good", f"{found}, {sys.executable}")


def trainer() -> Finding:
    """What training imports."""
    found = {name: _version(name) for name in TRAINER}
    if missing := [name for name, number in found.items() if number is None]:
        return Finding("bad", f"not installed: {', '.join(missing)}", (f"{_PIP} 'sdtune[train]'",))
    return Finding("good", ", ".join(f"{name} {found[name]}" for name in ("torch", "diffusers", "peft")))


def gpu() -> Finding:
    """GPUs that the driver knows, and whether torch was built for them."""
    gpus = _gpus()
    if not gpus:
        return Finding("warning", "none is seen by nvidia-smi; the CPU takes hours where a GPU takes minutes")
    if "+cpu" in (_version("torch") or ""):
        return Finding(
            "bad",
            f"{', '.join(gpus)}, but torch {_version('torch')} is built without CUDA",
            (f"{_PIP} --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128",),
        )
    return Finding("good", ", ".join(gpus))


def disk() -> Finding:
    """Room for results here, and for base models in the cache of the Hugging Face Hub."""
    here = shutil.disk_usage(Path.cwd()).free / 1e9
    text = f"{here:,.0f} GB free in {Path.cwd()}"
    if here < ROOM_GB:
        return Finding("warning", f"{text}; a base model and its results take up to {ROOM_GB} GB")
    return Finding("good", text)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """By name and memory, as the driver tells them."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.splitlines() if line.strip()]
