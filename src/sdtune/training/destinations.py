"""Where a run writes, and where its result goes from there: a bucket, TensorBoard's folder, NFS shares."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdtune.errors import PublishError, RecipeError, TrainingError
from sdtune.methods.places import bucket_and_path, in_bucket
from sdtune.methods.resuming import CHECKPOINTS
from sdtune.training.components.copying import cache
from sdtune.training.components.store import in_store

MODEL_DIR, LOG_DIR, CHECKPOINT_DIR = "AIP_MODEL_DIR", "AIP_TENSORBOARD_LOG_DIR", "AIP_CHECKPOINT_DIR"
"""Set by Vertex AI where a job has a baseOutputDirectory: gs:// addresses that end with a slash."""
RUN_FOLDER = "SDTUNE_RUN_FOLDER"
"""In the environment, for the processes that this one starts: where a run whose output is a bucket writes."""


@dataclass(frozen=True)
class Destinations:
    """Where the result goes besides the folder it is written to.

    address: the output in a bucket. curves: another folder there, for the curves alone. shares: folders of NFS mounts.
    checkpoints: a folder in a bucket, where another machine finds them.
    """

    address: str | None = None
    curves: str | None = None
    shares: tuple[Path, ...] = ()
    checkpoints: str | None = None


def find_output(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The output as gs://bucket/path or a folder of this machine; not given, what Vertex AI says.

    RecipeError: there is none, or it is a whole bucket.
    """
    place = given or environment.get(MODEL_DIR)
    if not place:
        raise RecipeError(f"output: missing; give --output, or run where Vertex AI sets {MODEL_DIR}.")
    address = in_store(place)
    if address is None:
        return place
    if not bucket_and_path(address)[1]:
        raise RecipeError(f"output: {place} is a whole bucket; wanted a folder in it, gs://bucket/path.")
    return address


def find_curves(output: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Where else curves are wanted: Vertex AI's folder for TensorBoard, unless that is the output's own."""
    wanted = environment.get(LOG_DIR)
    address = in_bucket(wanted) if wanted else None
    return address if address != f"{in_bucket(output) or output}/logs" else None


def find_checkpoints(output: str, named: bool, environment: Mapping[str, str] = os.environ) -> str | None:
    """Where checkpoints of a run into a bucket go: beside its result, or where Vertex AI says.

    named: the output was given. Then its checkpoints are in it, whatever the environment says, so that they are found
    again by the output alone.
    """
    address = in_store(output)
    wanted = environment.get(CHECKPOINT_DIR)
    if not named and address and wanted and (there := in_bucket(wanted)):
        return there
    return f"{address}/{CHECKPOINTS}" if address else None


def destinations(output: str, shares: Sequence[str], named: bool = True) -> Destinations:
    """All of a run's; named: the output was given."""
    return Destinations(
        in_store(output), find_curves(output), tuple(Path(share) for share in shares), find_checkpoints(output, named)
    )


@dataclass
class RunFolder:
    """Where a run writes. kept: something could not be published, and this may be the only copy."""

    path: Path
    kept: bool = False


@contextmanager
def folder_of_run(output: str) -> Iterator[RunFolder]:
    """The output, or for one in a bucket a folder of the same name on this disk, removed at the end unless kept."""
    address = in_store(output)
    if address is None:
        yield RunFolder(Path(output))
        return
    if given := os.environ.get(RUN_FOLDER):
        # The process that made it removes it.
        yield RunFolder(Path(given))
        return
    made = _make_folder(address)
    run = RunFolder(made / address.rpartition("/")[2])
    os.environ[RUN_FOLDER] = str(run.path)
    try:
        yield run
    except PublishError:
        run.kept = True
        raise
    finally:
        del os.environ[RUN_FOLDER]
        if not run.kept:
            shutil.rmtree(made, ignore_errors=True)


def _make_folder(address: str) -> Path:
    parent = cache("runs")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise TrainingError(
            f"output: a run into {address} writes to {parent} first, which cannot be written to "
            f"({error.strerror or error}); set SDTUNE_CACHE to a folder on a disk with room for it."
        ) from None
