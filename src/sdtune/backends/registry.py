"""The backends by name. A backend's module is imported when it is opened: Google's clients take seconds."""

from __future__ import annotations

import importlib

from sdtune.errors import ProjectError
from sdtune.jobs.backend import Backend

BACKENDS = {"local": "sdtune.backends.local.backend:LocalBackend"}


def open_backend(name: str) -> Backend:
    """The backend called ``name``."""
    if name not in BACKENDS:
        raise ProjectError(f"no backend is called {name!r}; there are: {', '.join(BACKENDS)}.")
    module, _, backend = BACKENDS[name].partition(":")
    opened: Backend = getattr(importlib.import_module(module), backend)()
    return opened
