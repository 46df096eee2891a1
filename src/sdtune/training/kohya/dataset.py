"""The dataset as sd-scripts reads it, laid out anew from the examples of the check.

sd-scripts opens images as they are stored: turned by EXIF, see-through parts black, 16 bits cut. What every program
sees alike is linked; the rest is written as PNG through the same function that the other trainers open images with.
Files are numbered, so that no name is hidden, doubled, or taken for that of a cropped face.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from posixpath import splitext

from sdtune.errors import DatasetError
from sdtune.methods.images import open_image
from sdtune.methods.layouts import KOHYA_SUFFIXES, check
from sdtune.methods.ledger import Example, Layout, Ledger

METADATA = "metadata.json"
MOST_PROMPTS = 4


@dataclass(frozen=True)
class StagedDataset:
    """Folders for --train_data_dir and --reg_data_dir, and the file for --in_json.

    pictures: of the training images, in their order; trigger_words: names of the folders that are captions; prompts:
    what to draw if nothing is asked for; regularisation: what to tell of the balance, or "".
    """

    train_data_dir: Path
    pictures: list[Path]
    trigger_words: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    in_json: Path | None = None
    reg_data_dir: Path | None = None
    regularisation: str = ""


def stage_repeats_folders(folder: Path, class_data_dir: str | None, target: Path) -> StagedDataset:
    """A dataset of folders named <repeats>_<name>, and regularisation pictures laid out alike.

    DatasetError: one of the two cannot be trained on as it is.
    """
    ledger = checked(folder, Layout.KOHYA)
    names = [_top(example).partition("_")[2] for example in ledger.examples]
    captions = [example.caption or "" for example in ledger.examples]
    words = list(dict.fromkeys(name for name, caption in zip(names, captions, strict=True) if name == caption != ""))
    staged = StagedDataset(
        train_data_dir=_stage_folders(ledger, target / "train"),
        pictures=[folder / example.image for example in ledger.examples],
        trigger_words=words,
        prompts=words[:MOST_PROMPTS] or [caption for caption in captions if caption][:1],
    )
    if class_data_dir is None:
        return staged
    try:
        regularisation = checked(Path(class_data_dir), Layout.KOHYA)
    except DatasetError as error:
        raise DatasetError(f"class_data_dir: {error}") from None
    return replace(
        staged,
        reg_data_dir=_stage_folders(regularisation, target / "regularisation"),
        regularisation=_balance(_shown(ledger), _shown(regularisation)),
    )


def stage_captioned(folder: Path, target: Path) -> StagedDataset:
    """A captioned dataset, and the JSON of sd-scripts that says what is in it."""
    ledger = checked(folder, Layout.CAPTIONED)
    images = target / "images"
    images.mkdir(parents=True)
    metadata = {
        str(_stage(folder / example.image, example, images, number)): {
            "caption": example.caption or "",
            "image_size": [example.width, example.height],
        }
        for number, example in enumerate(ledger.examples)
    }
    in_json = target / METADATA
    in_json.write_text(json.dumps(metadata, ensure_ascii=False, indent=1), encoding="utf-8")
    return StagedDataset(
        train_data_dir=images,
        pictures=[folder / example.image for example in ledger.examples],
        in_json=in_json,
    )


def checked(folder: Path, layout: Layout) -> Ledger:
    """The ledger of a dataset that has no error. (sd-scripts ends with success where it finds nothing to train on.)"""
    ledger = check(folder, layout, decode=False)
    ledger.raise_for_errors()
    if not ledger.examples:
        raise DatasetError(f"{folder}: no image is left to train on.")
    return ledger


def _stage_folders(ledger: Ledger, target: Path) -> Path:
    for number, example in enumerate(ledger.examples):
        parent = target / _top(example)
        parent.mkdir(parents=True, exist_ok=True)
        image = _stage(Path(ledger.root) / example.image, example, parent, number)
        # Always there: without it sd-scripts takes the folder's name, which is what an example without one has too.
        image.with_suffix(".txt").write_text((example.caption or "") + "\n", encoding="utf-8")
    return target


def _stage(image: Path, example: Example, parent: Path, number: int) -> Path:
    suffix = splitext(example.image)[1].lower()
    if example.plain and suffix in KOHYA_SUFFIXES:
        staged = parent / f"{number:06d}{suffix}"
        staged.symlink_to(image.resolve())
        return staged
    staged = parent / f"{number:06d}.png"
    with image.open("rb") as file:
        open_image(file).save(staged, compress_level=1)
    return staged


def _top(example: Example) -> str:
    return example.image.partition("/")[0]


def _shown(ledger: Ledger) -> int:
    return sum(example.repeats for example in ledger.examples)


def _balance(training: int, regularisation: int) -> str:
    head = f"{regularisation} regularisation pictures, with their repeats, for {training} training pictures"
    if regularisation > training:
        return f"{head}: sd-scripts leaves out {regularisation - training} of them. Raise the repeats of the subject's."
    if regularisation < training:
        return f"{head}: sd-scripts shows them again, so that both are shown equally often."
    return f"{head}."
