"""How a run begins: anew, where an earlier process of it came to, or not at all because it has finished.

Decided before torch is imported. The process that starts those that train together decides for all of its machine;
they find the decision in their environment.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from sdtune import events
from sdtune.errors import ProjectError, SdtuneError
from sdtune.methods.base import MARK, RECIPE_FILE
from sdtune.methods.fields import CheckpointFields, CommonFields
from sdtune.methods.resuming import CHECKPOINTS, Asked, FinishedRun, Manifest, name_of, refused
from sdtune.training.components.checkpoint_files import damage, read_manifest, remove_others
from sdtune.training.components.checkpoint_store import CheckpointStore, newest_first
from sdtune.training.components.store import Asked as AskedOf
from sdtune.training.components.store import Folder
from sdtune.training.destinations import Destinations

STEP = "SDTUNE_GOES_ON_FROM"
"""In the environment, for the processes that this one starts: the step of the checkpoint, 0 to begin anew."""


@dataclass(frozen=True)
class Beginning:
    """asked: the run. goes_on: the checkpoint that it goes on from, on this machine, its files whole; None: anew."""

    asked: Asked
    goes_on: Manifest | None = None


class FinishedError(Exception):
    """There is nothing to do: the output holds this run, with its result."""

    def __init__(self, output: str, run: FinishedRun) -> None:
        super().__init__(f"{output} holds this run already, and it has finished; --overwrite trains it anew.")
        self.finished, self.measures, self.published = run.finished, run.measures, bool(run.facts.get("published"))


def find_beginning(
    method: CommonFields, asked: Asked, output: Path, to: Destinations, *, decided: bool = False
) -> Beginning:
    """Where the run that is ``asked`` for begins; output: the folder on this machine.

    decided: by the process that started this one. FinishedError: the output holds its result. RecipeError: it holds
    another run, and how that differs.
    """
    folder = output / CHECKPOINTS
    if decided:
        step = int(os.environ[STEP])
        return Beginning(asked, read_manifest(folder / name_of(step)))
    store = CheckpointStore(to.checkpoints) if to.checkpoints else None
    earlier = _finished(output, to)
    if earlier and earlier.is_replaced(asked):
        earlier = None
    other = earlier.differences(method, asked) if earlier else []
    if earlier and not other:
        if not (isinstance(method, CheckpointFields) and method.keep_checkpoints):
            # Of a run that was stopped between its result and its last breath.
            remove_others(folder, ())
            if store:
                store.remove_others(())
        raise FinishedError(to.address or str(output), earlier)
    goes_on = _newest_valid(method, asked, folder, store, to, refuse=not earlier)
    if earlier and not goes_on:
        raise refused(to.address or str(output), "a finished run", other)
    os.environ[STEP] = str(goes_on.step if goes_on else 0)
    return Beginning(asked, goes_on)


def _newest_valid(
    method: CommonFields, asked: Asked, folder: Path, store: CheckpointStore | None, to: Destinations, refuse: bool
) -> Manifest | None:
    """The newest checkpoint that is whole, of this run; on this machine when this returns. Others are told.

    refuse: RecipeError if the newest is of another run.
    """
    damaged = False
    for step in newest_first(folder, store):
        here = folder / name_of(step)
        manifest = read_manifest(here) or (store.manifest(step) if store else None)
        why: str | None
        if manifest is None:
            why = "has no manifest that is right"
        elif asked.token and manifest.token != asked.token:
            continue
        elif other := manifest.differences(method, asked):
            if refuse:
                raise refused(to.address or str(folder.parent), f"an unfinished run, at step {step},", other)
            return None
        elif not (why := _had_here(step, manifest, here, store)):
            return manifest
        damaged = True
        _warn(f"The checkpoint of step {step} {why}; looking at the one before.")
    if damaged:
        _warn("No checkpoint is left that is whole, so the run begins anew.")
    return None


def _had_here(step: int, manifest: Manifest, here: Path, store: CheckpointStore | None) -> str | None:
    """What is wrong with the checkpoint, which is fetched if need be."""
    if read_manifest(here) is None and store:
        try:
            store.fetch(step, manifest, here)
        except ProjectError:
            raise
        except SdtuneError as error:
            return f"cannot be fetched ({error})"
    return damage(here, manifest)


def _finished(output: Path, to: Destinations) -> FinishedRun | None:
    if to.address:
        bucket = Folder(to.address, AskedOf("output", ProjectError))
        return FinishedRun.of(bucket.read(RECIPE_FILE), bucket.read(MARK))
    return FinishedRun.of(_read(output / RECIPE_FILE), _read(output / MARK))


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _warn(text: str) -> None:
    events.emit(events.Note(text, "warning"))


def files_of_dataset(folder: Path) -> str:
    """What a dataset consists of, in few words that are others where a file has come, gone or another size."""
    found = sorted(
        (path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:8]
    return f"{len(found)} files of {sum(size for _, size in found):,} bytes ({digest})"
