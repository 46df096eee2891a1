"""The fused kernels, without a GPU: interpreted in a process of their own, and compiled for one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels' language; it comes with the extra dev on Linux")

HERE = Path(__file__).parent


def test_interpreted_kernels_agree_with_their_references():
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "kernels")]
    run = subprocess.run(
        tests, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:]
    assert int(re.findall(r"(\d+) passed", run.stdout)[-1]) >= 90


def test_kernels_compile_for_an_h100(tmp_path):
    """The interpreter takes what the compiler refuses, as a variable that changes its type in a loop."""
    compiling = [sys.executable, str(HERE / "kernels" / "compiling.py")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(compiling, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-6000:]
    kernels = {line.split()[0] for line in run.stdout.splitlines()}
    assert len(kernels) == 18
    # Numbers that do not fit a thread's registers would go through memory.
    assert not re.findall(r"(?m)^\S+ .*spilled", run.stdout)
    # Attention of heads of 160 has some addresses there; sums would be thousands of bytes.
    assert max(int(count) for count in re.findall(r"(\d+) bytes beside", run.stdout)) <= 256
