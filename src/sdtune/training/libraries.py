"""The libraries of a trainer: importing torch, diffusers and what they need takes ten seconds of a machine's start."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from threading import Thread
from typing import Any

from sdtune.methods.fields import CommonFields


def import_trainer(method: CommonFields) -> Any:
    """The module of the method's trainer."""
    _quiet()
    return importlib.import_module(f"sdtune.training.trainers.{method.trainer}")


def import_ahead(method: CommonFields) -> None:
    """Begin with it while something is fetched, which waits for the network; ``import_trainer`` waits for the end."""

    def work() -> None:
        # Whoever needs it imports it again, and is told what is wrong.
        with contextlib.suppress(Exception):
            import_trainer(method)

    Thread(target=work, name="imports", daemon=True).start()


def _quiet() -> None:
    # Read when these libraries are imported: their hints on every start would drown the run's own words.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # diffusers imports it where it is installed, and it warns of kernels that no trainer here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # What will change in them is for those who write such code.
    warnings.filterwarnings("ignore", category=FutureWarning)
