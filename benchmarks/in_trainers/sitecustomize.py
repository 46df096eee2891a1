"""Python reads this at the start of every trainer that train_speed.py measures, whose code stays as it is.

Each process says how much of the GPU torch had at most, twice a second where it has risen, as a line of JSON in the
file SPEED_MEMORY names: however it ends. SIGTERM, with which a trainer that has been measured is ended, ends it as
Python ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

SECONDS_BETWEEN_LOOKS = 0.5


def watch() -> None:
    """For as long as the process lives."""
    told: dict[str, int] = {}
    while True:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if (now := peaks()) and now != told:
            told = now
            # pathlib is not for here: every process of a trainer would import it at its start.
            with open(os.environ["SPEED_MEMORY"], "a", encoding="utf-8") as file:  # noqa: PTH123
                file.write(json.dumps(now) + "\n")


def peaks() -> dict[str, int]:
    """Of the GPU that had most; nothing where torch has used none."""
    cuda = sys.modules.get("torch.cuda")
    try:
        if cuda is None or not cuda.is_initialized():
            return {}
        devices = range(cuda.device_count())
        return {
            "allocated": max(map(cuda.max_memory_allocated, devices)),
            "reserved": max(map(cuda.max_memory_reserved, devices)),
        }
    except (AttributeError, RuntimeError):
        # While it is being imported, or the GPU being opened.
        return {}


if "SPEED_MEMORY" in os.environ:
    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
