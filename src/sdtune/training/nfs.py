"""Models onto NFS shares (Filestore), where web UIs read them: each file whole or not at all.

A run ``dog`` of the method ``dreambooth-lora`` becomes, on a share mounted at /mnt/nfs/models:

    /mnt/nfs/models/dreambooth-lora/dog.safetensors                          for A1111, Forge, ComfyUI and SD.Next
    /mnt/nfs/models/dreambooth-lora/dog/pytorch_lora_weights.safetensors     for diffusers

A LoRA or a checkpoint for web UIs has its run's name, which is what they show and what a prompt says (<lora:dog:1>),
so two runs of one method stand side by side, and a later run of the same name takes the place of the earlier. The forms
for programs, whose files are called the same in every run, have a folder with the run's name: ``from_pretrained`` and
``load_lora_weights`` take it. Web UIs look into folders of any depth, so a share serves with --lora-dir or --ckpt-dir
at /mnt/nfs/models/<method>, or linked as models/Lora/<method> or models/Stable-diffusion/<method>. They list what ends
with .safetensors: a file that is being written does not.
"""

from __future__ import annotations

import base64
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import yaml

from sdtune import events
from sdtune.errors import ProjectError, PublishError, RecipeError, SdtuneError
from sdtune.methods.base import MARK, RECIPE_FILE
from sdtune.methods.base_models import WITH_WEIGHTS, WITHOUT_WEIGHTS
from sdtune.methods.catalog import find_method
from sdtune.training.components.copying import Original, Write, megabytes
from sdtune.training.components.fetch import check_names
from sdtune.training.components.files import publish
from sdtune.training.components.store import Asked, Folder, in_store

INDEX = "model_index.json"
FOR_DIFFUSERS = "pytorch_lora_weights.safetensors"
FOR_PEFT = ("adapter_config.json", "adapter_model.safetensors")
PARTS = (*WITH_WEIGHTS, *WITHOUT_WEIGHTS, "safety_checker")
BLOCK = 1 << 23
SECONDS_OF_A_COPY = 86_400
"""An unfinished copy older than that belongs to nobody."""

Tell = Callable[[events.Event], None]


@dataclass(frozen=True)
class Model:
    """A file to copy. crc32c: as Cloud Storage writes it; reading it may take as long as reading the file."""

    original: Original
    crc32c: Callable[[], str]


class Models(Protocol):
    """A folder with the result of a run."""

    @property
    def place(self) -> str:
        """As the user calls it."""

    @property
    def name(self) -> str:
        """Of the run."""

    def names(self) -> Collection[str]:
        """Of its files, relative to it."""

    def read(self, name: str) -> bytes | None:
        """A small file, if it is there."""

    def model(self, name: str) -> Model:
        """A file to copy."""


class LocalModels:
    """A folder of this machine. place: as the user calls it, if that is another name."""

    def __init__(self, folder: Path, place: str | None = None) -> None:
        self._folder = folder.resolve()
        self.place, self.name = place or str(folder), self._folder.name

    def names(self) -> list[str]:
        return [path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file()]

    def read(self, name: str) -> bytes | None:
        file = self._folder / name
        return file.read_bytes() if file.is_file() else None

    def model(self, name: str) -> Model:
        file = self._folder / name

        def copy_to(write: Write, stop: Event) -> None:
            for block in _blocks(file):
                write(block)

        return Model(Original(name, file.stat().st_size, "", copy_to), lambda: _crc32c(file))


class BucketModels:
    """A folder of a bucket."""

    def __init__(self, address: str) -> None:
        self.place, self.name = address, address.rpartition("/")[2]
        self._folder = Folder(address, Asked("from", RecipeError))
        self._blobs: dict[str, Any] = {}

    def names(self) -> list[str]:
        self._blobs = self._folder.files()
        return list(self._blobs)

    def read(self, name: str) -> bytes | None:
        return self._folder.read(name)

    def model(self, name: str) -> Model:
        blob = self._blobs[name]
        return Model(self._folder.original(name, blob), lambda: str(blob.crc32c))


def sync(source: str, method: str | None, shares: Sequence[str]) -> None:
    """Copy the models at ``source`` (gs://bucket/path, or a folder) to every share; the task ``sync-nfs``.

    method: not given, as the run's recipe says. RecipeError: there is no model. ProjectError: a share is missing or
    cannot be written to. PublishError: a file could not be copied.
    """
    folders = [Path(share) for share in shares]
    check_shares(folders)
    address = in_store(source)
    models: Models = BucketModels(address) if address else LocalModels(Path(source))
    copy_models(models, find_method(method).name if method else method_of(models), folders)


def check_shares(shares: Sequence[Path]) -> None:
    """ProjectError: a share is not mounted, or cannot be written to."""
    for share in shares:
        if not share.is_dir():
            raise ProjectError(
                f"nfs: {share} is not there: was the job given --nfs SERVER:/PATH={share}, and --network?"
            )
        try:
            with tempfile.NamedTemporaryFile(dir=share, prefix=".sdtune-"):
                pass
        except OSError as error:
            raise ProjectError(
                f"nfs: {share} cannot be written to ({error.strerror or error}); does the share export it for writing, "
                "and to this user?"
            ) from None


def method_of(models: Models) -> str:
    """The method that made them, as their recipe says."""
    try:
        recipe = yaml.safe_load(models.read(RECIPE_FILE) or b"")
    except yaml.YAMLError:
        recipe = None
    name = recipe.get("method") if isinstance(recipe, dict) else None
    if not isinstance(name, str):
        raise RecipeError(
            f"method: {models.place} has no {RECIPE_FILE} that names one, so it is no finished run; check the path, or "
            "give --method."
        )
    return find_method(name).name


def copy_models(models: Models, method: str, shares: Sequence[Path], tell: Tell = events.emit) -> None:
    """Copy to <share>/<method>/, where equal files are left as they are, and tell what became of each.

    RecipeError: there is no model. PublishError: a file could not be copied; the others were.
    """
    names = models.names()
    if MARK in names and RECIPE_FILE not in names:
        raise RecipeError(f"from: {models.place} holds a run that has not finished; wait for its end.")
    targets = choose(names, models.name)
    if not targets:
        raise RecipeError(
            f"from: {models.place} holds no model: neither {INDEX} nor a .safetensors file; check the path."
        )
    check_names(models.place, targets, "from")
    files = {name: models.model(name) for name in targets}
    total = megabytes(sum(file.original.size for file in files.values()) * len(shares))
    tell(events.Phase("copy", f"Copying {len(files)} files, {total:,} MB, to {', '.join(map(str, shares))}"))
    rows: list[events.Copy] = []
    done = 0
    for share in shares:
        for name, file in files.items():
            target = share / method / targets[name]
            row = _copy(file, target, f"{models.place}/{name}")
            tell(row)
            rows.append(row)
            done += file.original.size
            tell(events.Progress("copy", megabytes(done), total))
    if failed := [row for row in rows if row.outcome == "failed"]:
        raise PublishError(
            f"nfs: {len(failed)} of {len(rows)} files could not be copied, such as {failed[0].path}: {failed[0].why}."
        )


def choose(names: Collection[str], run: str) -> dict[str, str]:
    """The files that are models, in the order to copy them, and where each goes in the method's folder."""
    whole = INDEX in names
    chosen: dict[str, str] = {}
    # What tells a program that a folder is a model comes last.
    for name in sorted(names, key=lambda name: (name == INDEX or name.endswith(FOR_PEFT[0]), name)):
        folder, _, last = name.rpartition("/")
        for_uis = not folder and name.endswith(".safetensors") and name != FOR_DIFFUSERS
        for_programs = name in (FOR_DIFFUSERS, *([INDEX] if whole else [])) or last in FOR_PEFT
        if for_uis:
            chosen[name] = name
        elif for_programs or (whole and name.partition("/")[0] in PARTS and folder):
            chosen[name] = f"{run}/{name}"
    return chosen if any(name.endswith(".safetensors") for name in chosen) or whole else {}


def _copy(file: Model, target: Path, source: str) -> events.Copy:
    try:
        if target.is_file() and target.stat().st_size == file.original.size and _crc32c(target) == file.crc32c():
            return events.Copy(source, str(target), "equal")
        _clean(target)
        with publish(target) as temporary:
            _write(file.original, temporary)
            if temporary.stat().st_size != file.original.size or _crc32c(temporary) != file.crc32c():
                raise OSError("what was read back is not what was written")
        _sync_folder(target.parent)
    except (SdtuneError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return events.Copy(source, str(target), "failed", why.rstrip("."))
    return events.Copy(source, str(target), "copied")


def _write(original: Original, file: Path) -> None:
    with file.open("wb") as stream:
        original.copy_to(stream.write, Event())
        stream.flush()
        os.fsync(stream.fileno())
        # So that reading back asks the server.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    """The new name is on the server too, where its file system can say so."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _clean(target: Path) -> None:
    """Take away what copies that were killed have left."""
    for left in target.parent.glob(f".{escape(target.name)}.partial-*"):
        if left.stat().st_mtime < time.time() - SECONDS_OF_A_COPY:
            left.unlink(missing_ok=True)


def _crc32c(file: Path) -> str:
    from google_crc32c import Checksum

    checksum = Checksum()
    for block in _blocks(file):
        checksum.update(block)
    return base64.b64encode(checksum.digest()).decode()


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block
