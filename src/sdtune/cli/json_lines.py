"""What --json prints: one object per line, each with its kind under ``event``."""

from __future__ import annotations

import json
import sys
from typing import Any


def json_line(event: str, **fields: Any) -> None:
    """Print one at once: whoever reads from a pipe waits for it."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()
