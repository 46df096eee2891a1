"""Python reads this at the start of every trainer that train_speed.py measures, whose code stays as it is.

At its end each process says how much of the GPU torch had at most, as a line of JSON in the file SPEED_MEMORY names.
SIGTERM, with which a trainer that has been measured is ended, comes to that end too.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys


def tell() -> None:
    """Of the GPU that had most; nothing where torch used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    devices = range(torch.cuda.device_count())
    peaks = {
        "allocated": max(map(torch.cuda.max_memory_allocated, devices)),
        "reserved": max(map(torch.cuda.max_memory_reserved, devices)),
    }
    # pathlib is not for here: every process of a trainer would import it at its start.
    with open(os.environ["SPEED_MEMORY"], "a", encoding="utf-8") as file:  # noqa: PTH123
        file.write(json.dumps(peaks) + "\n")


if "SPEED_MEMORY" in os.environ:
    atexit.register(tell)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
