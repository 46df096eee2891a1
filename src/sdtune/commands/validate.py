"""Validate: the dataset check of ``train``, on its own."""

from __future__ import annotations

from collections.abc import Callable

from sdtune.jobs.backend import Backend
from sdtune.methods.layouts import check_source
from sdtune.methods.ledger import Layout, Ledger
from sdtune.methods.places import in_bucket

Progress = Callable[[int, int], None]


def look_at(
    dataset: str,
    layout: Layout,
    backend: Backend,
    *,
    resolution: int | None = None,
    progress: Progress | None = None,
) -> Ledger | None:
    """The ledger of a dataset, here or in a bucket; None where no look can be had. DatasetError: it is not there.

    resolution: side of the training pictures in pixels. progress: called with (images checked, images in all).
    """
    source = backend.dataset(dataset)
    if source is None:
        return None
    # Of pictures in a bucket the headers are read, and the pixels not.
    return check_source(source, layout, resolution=resolution, decode=in_bucket(dataset) is None, progress=progress)
