"""Room for what is cached: in memory, and where that would be filled by it, in a file of the local disk.

The file has no name, so that nothing of it is left however the run ends.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import numpy
import torch

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods import places
from sdtune.training.components.checkpoint_memory import free_memory
from sdtune.training.components.copying import cache, megabytes
from sdtune.training.run import Run

SHARE_OF_MEMORY = 1 / 3
"""Of what is left, that one cache may take: a run has up to four, and a model that is saved passes through memory."""


def room_for(what: str, numbers: int, dtype: torch.dtype, run: Run) -> torch.Tensor:
    """A tensor of so many numbers on the CPU, to be filled. what: is kept in it, for messages, in the plural.

    TrainingError: neither memory nor disk has so much.
    """
    size, left = numbers * dtype.itemsize, free_memory()
    # Every process of a machine keeps all of it. Where nobody says what is free, on other systems than Linux, it is so.
    if not left or size * run.share_of_machine.of <= SHARE_OF_MEMORY * left:
        return torch.empty(numbers, dtype=dtype)
    folder = _folder()
    needed = f"{what} take {_size_of(size, run)}, and {megabytes(left):,} MB of memory are free"
    try:
        flat = _on_disk(folder, size)
    except OSError as error:
        raise TrainingError(
            f"the {needed}, of which they may have a third; {folder} does not take them "
            f"({error.strerror or error}{_free(folder)}). Set SDTUNE_CACHE to a folder on a disk with room for them, "
            "or use a machine with more memory."
        ) from None
    run.tell(events.Note(f"The {needed}: until the run ends they are kept on disk, in {folder}."))
    return torch.from_numpy(flat).view(dtype)


def _size_of(size: int, run: Run) -> str:
    processes = run.share_of_machine.of
    return f"{megabytes(size):,} MB" + (f" in each of {processes} processes" if processes > 1 else "")


def _folder() -> Path:
    folder = cache("spilled")
    # A mounted bucket is no disk: it takes no writes in the middle of a file.
    return Path(tempfile.gettempdir()) if folder.is_relative_to(places.MOUNT) else folder


def _free(folder: Path) -> str:
    try:
        return f"; {megabytes(shutil.disk_usage(folder).free):,} MB are free"
    except OSError:
        return ""


def _on_disk(folder: Path, size: int) -> numpy.memmap:
    """So many bytes of a file that nothing else can open. OSError: the disk does not have them."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with tempfile.TemporaryFile(dir=folder) as file:
        # A disk that were full later would end the process by a signal (SIGBUS), in the middle of a write to memory.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        # The mapping holds the file open.
        return numpy.memmap(file, numpy.uint8, "r+", shape=(size,))
