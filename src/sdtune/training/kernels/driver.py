"""``python driver.py FOLDER``: the library by which Triton starts kernels, for machines without a compiler.

Triton compiles it in C, for Python and against the driver's libcuda.so.1, when the first kernel starts, and keeps it in
TRITON_CACHE_DIR. An image has neither a compiler nor a driver: a stage of its build runs this, with a library of that
name to link against whose functions are empty, and FOLDER becomes the image's TRITON_CACHE_DIR. It needs Triton, not
torch, and runs without the rest of sdtune.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from unittest.mock import patch

LIBRARY = "libcuda.so.1"
MODULE = "cuda_utils"


def main(folder: Path) -> int:
    """Make it; the exit code."""
    from triton.backends.nvidia.driver import CudaUtils
    from triton.runtime.build import platform_key

    with tempfile.TemporaryDirectory() as temporary:
        # With a function missing, or none of them there, linkers would not note that the library is needed.
        functions = sorted(set(re.findall(r"\b(cu[A-Z]\w+)\(", source())))
        stub = Path(temporary) / "stub.c"
        stub.write_text("".join(f"void {name}(void) {{}}\n" for name in functions), encoding="utf-8")
        linked = ["-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", "-o", str(stub.with_name(LIBRARY))]
        subprocess.run([os.environ.get("CC", "gcc"), str(stub), *linked], check=True)
        os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_LIBCUDA_PATH": temporary}

        # Part of the name it is kept under, and told by the program ``file`` where that is installed. Images have none.
        with patch.dict(os.environ, {"PATH": ""}):
            platform_key()
        try:
            CudaUtils()
        except ImportError as error:
            # It was made and cannot be loaded: what it needs of the driver is not here.
            sys.stdout.write(f"{error}\n")
        made = library()
    sys.stdout.write(f"made {made}\n" if made else f"nothing was made in {folder}\n")
    return 0 if made else 1


def library() -> str | None:
    """Where this machine's Triton has it; None: it will need a compiler."""
    from triton.runtime.build import platform_key
    from triton.runtime.cache import get_cache_manager

    key = hashlib.sha256((source() + platform_key()).encode()).hexdigest()
    kept: str | None = get_cache_manager(key).get_file(f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}")
    return kept


def source() -> str:
    """What Triton compiles."""
    from triton.backends.nvidia import driver

    return Path(driver.__file__).with_name("driver.c").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
