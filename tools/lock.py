"""Writes constraints.txt: the exact versions that pyproject.toml gives today, for every supported Python.

Installs everything into a new environment with pip's own resolver and notes what it chose. No hashes and no
addresses: torch is another build on a machine with a GPU. The containers have hashed locks of their own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = """\
# Exact versions of everything that make installs. No hashes and no addresses: torch's CPU and CUDA builds differ.
# Renewed by: make lock
"""
TORCH = "torch==2.13.0"
"""Held back by hand: the newest release with a CPU build at hand wherever the tests run."""


def main() -> None:
    """Resolve, and write what was resolved."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        extras = f"{ROOT}[train,optimizers,wandb,dev]"
        subprocess.run([python, "-m", "pip", "install", "--quiet", TORCH, extras], check=True)
        subprocess.run([python, "-m", "pip", "check"], check=True)
        listing = [python, "-m", "pip", "list", "--format=freeze"]
        ours = [f"--exclude={name}" for name in ("sdtune", "pip", "setuptools")]
        frozen = subprocess.run([*listing, *ours], check=True, capture_output=True, text=True).stdout
    # 2.13.0+cpu is how a build names itself; the version is 2.13.0.
    pins = sorted((line.partition("+")[0] for line in frozen.splitlines()), key=str.lower)
    (ROOT / "constraints.txt").write_text(HEAD + "\n".join(pins) + "\n")
    print(f"{len(pins)} pins, by Python {sys.version_info[0]}.{sys.version_info[1]}")


if __name__ == "__main__":
    main()
