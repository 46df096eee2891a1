"""Validate: the dataset check of ``train``, on its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdtune.methods.fields import CommonFields
from sdtune.methods.layouts import check
from sdtune.methods.ledger import Ledger


def validate(
    method: type[CommonFields],
    dataset: str,
    *,
    resolution: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Ledger:
    """The ledger of ``dataset`` as ``method`` would read it. resolution: side of the training pictures in pixels."""
    return check(Path(dataset).expanduser(), method.layout, resolution=resolution, progress=progress)
