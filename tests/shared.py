"""What takes minutes to make is made once, also where several workers run the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` has filled: the first worker that needs it does, the others wait for it.

    Where ``make`` fails, the next one tries again, in an empty folder of its own.
    """
    base = factory.getbasetemp()
    # Each worker has a folder of its own in that of the whole run.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    named = shared / f"{name}.made"
    with FileLock(shared / f"{name}.lock"):
        if not named.exists():
            folder = factory.mktemp(name)
            make(folder)
            named.write_text(str(folder))
    return Path(named.read_text())
