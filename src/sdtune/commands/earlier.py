"""What an output holds of a run that is to be started: nothing, a part of it, or its result."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sdtune import events
from sdtune.jobs.backend import Backend
from sdtune.methods.base import MARK, RECIPE_FILE
from sdtune.methods.fields import CommonFields
from sdtune.methods.resuming import CHECKPOINTS, MANIFEST, Asked, FinishedRun, Manifest, name_of, refused, step_of


@dataclass(frozen=True)
class Earlier:
    """step: of the newest checkpoint that it may go on from; 0 for none. finished: what it said at its end."""

    step: int = 0
    finished: events.Finished | None = None


def find_earlier(method: CommonFields, dataset: str, output: str, names: Collection[str], backend: Backend) -> Earlier:
    """Looks at manifests alone: whether a checkpoint is whole, the training process finds out when it starts.

    method, dataset, output: as the training process will have them. names: of what lies directly in the output.
    RecipeError: it holds another run.
    """
    asked = Asked(dataset)
    done, other = None, ["what it was trained with is not known"]
    if RECIPE_FILE in names:
        done = FinishedRun.of(_read(backend, f"{output}/{RECIPE_FILE}"), _read(backend, f"{output}/{MARK}"))
        other = done.differences(method, asked) if done else other
        if done and not other:
            return Earlier(finished=done.finished)
    if {CHECKPOINTS, f"{CHECKPOINTS}/"} & set(names):
        folder = f"{output}/{CHECKPOINTS}"
        steps = [step_of(name.rstrip("/")) for name in backend.list_names(folder)]
        for step in sorted((step for step in steps if step is not None), reverse=True):
            manifest = Manifest.of(_read(backend, f"{folder}/{name_of(step)}/{MANIFEST}") or b"")
            if manifest and not (found := manifest.differences(method, asked)):
                return Earlier(step)
            if manifest and RECIPE_FILE not in names:
                raise refused(output, f"an unfinished run, at step {step},", found)
    if RECIPE_FILE in names:
        raise refused(output, "a finished run", other)
    return Earlier()


def _read(backend: Backend, file: str) -> bytes | None:
    try:
        return backend.read(file)
    except OSError:
        return None
