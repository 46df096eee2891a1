"""WHAT IS LAUNCHED: pure nouns of launching a run; no cloud, no torch.

For users, ``sdtune.jobs.list()`` and its neighbours are ``sdtune jobs list`` and its: this package only has the name.
"""

from importlib import import_module
from typing import Any

_OF_API = ("cancel", "list", "logs", "open", "show")


def __getattr__(name: str) -> Any:
    if name in _OF_API:
        return getattr(import_module("sdtune.api.jobs"), name)
    raise AttributeError(f"module 'sdtune.jobs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_API])
