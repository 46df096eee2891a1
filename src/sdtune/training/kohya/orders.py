"""What sd-scripts' process and the one that started it say to each other about checkpoints.

sd-scripts' process asks, in a line of its standard output, and waits for an order, a line of its standard input: the
other one knows when a checkpoint is due and whether a signal has come, and writes and uploads what is in one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from queue import SimpleQueue
from threading import Thread
from typing import Any

from sdtune.errors import INTERRUPTED

ASK_MARK = '{"asks": '
"""How a line begins that waits for an order."""
BEGIN, STEP, SAVED = "begin", "step", "saved"
"""What is asked: at the beginning, after a step, and when the state has been written."""
TRAIN, SAVE, STOP = "train", "save", "stop"
"""Orders. STOP is given unasked: what is drawn or measured now is not waited for."""


def question(asks: str, **about: Any) -> str:
    """The line that asks."""
    return json.dumps({"asks": asks, **about})


class Orders:
    """Those that come in; the first process of those that train together listens."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._listen, daemon=True).start()

    def ask(self, asks: str, **about: Any) -> str:
        """TRAIN or SAVE."""
        sys.stdout.write(question(asks, **about) + "\n")
        sys.stdout.flush()
        return self._waiting.get()

    def _listen(self) -> None:
        # Without Python's own buffer, whose lock an ending interpreter would wait for.
        rest = b""
        while content := os.read(0, 4096):
            *lines, rest = (rest + content).split(b"\n")
            for line in lines:
                if line.decode() == STOP:
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    self._waiting.put(line.decode())
        # The other process has ended, or wants an end: nobody would take what is trained on.
        os._exit(INTERRUPTED)
