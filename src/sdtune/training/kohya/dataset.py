"""The dataset as sd-scripts reads it, laid out anew from the examples of the check.

sd-scripts opens images as they are stored: turned by EXIF, see-through parts black, 16 bits cut. What every program
sees alike is linked; the rest is written as PNG through the same function that the other trainers open images with.
Files are numbered, so that no name is hidden, doubled, or taken for that of a cropped face.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import splitext
from typing import Any

from sdtune.errors import DatasetError
from sdtune.methods.images import open_image
from sdtune.methods.kohya import KohyaDreamBoothLora, KohyaFields
from sdtune.methods.layouts import KOHYA_SUFFIXES, check_source
from sdtune.methods.ledger import Example, Layout, Ledger
from sdtune.training.components.dataset import Picture, first_captions, keep_apart
from sdtune.training.components.fetch import folder_here, source_of

METADATA = "metadata.json"
MOST_PROMPTS = 4


@dataclass(frozen=True)
class StagedDataset:
    """The file for --dataset_config, or the folder for --train_data_dir and the file for --in_json.

    pictures: those trained on, in their order; measured: those the held-out loss is measured on; trigger_words: names
    of the folders that are captions; prompts: what to draw if nothing is asked for; regularisation: what to tell of the
    balance, or ""; class_pictures: how many regularisation pictures there are.
    """

    pictures: list[Picture]
    measured: list[Picture]
    trigger_words: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    dataset_config: Path | None = None
    train_data_dir: Path | None = None
    in_json: Path | None = None
    regularisation: str = ""
    class_pictures: int = 0


def stage_repeats_folders(folder: Path, method: KohyaDreamBoothLora, target: Path) -> StagedDataset:
    """A dataset of folders named <repeats>_<name>, and regularisation pictures laid out alike.

    DatasetError: one of the two cannot be trained on as it is.
    """
    examples = checked(folder, Layout.KOHYA).examples
    method.check_examples(len(examples))
    trained, apart = keep_apart(examples, method.held_out_images)
    names = [_top(example).partition("_")[2] for example in trained]
    captions = [example.caption or "" for example in trained]
    words = list(dict.fromkeys(name for name, caption in zip(names, captions, strict=True) if name == caption != ""))
    subsets, balance = _stage_folders(folder, trained, target / "train"), ""
    classes: Sequence[Example] = []
    if method.class_data_dir is not None:
        class_folder = folder_here(method.class_data_dir, "class_data_dir")
        try:
            classes = checked(class_folder, Layout.KOHYA).examples
        except DatasetError as error:
            raise DatasetError(f"class_data_dir: {error}") from None
        staged = _stage_folders(class_folder, classes, target / "regularisation")
        subsets += [{**subset, "is_reg": True} for subset in staged]
        balance = _balance(_shown(trained), _shown(classes))
    # A folder of folders would do, but sd-scripts takes them in the file system's order, which varies.
    dataset_config = target / "dataset.json"
    dataset_config.write_text(json.dumps({"datasets": [{"subsets": subsets}]}, indent=1), encoding="utf-8")
    return StagedDataset(
        pictures=_pictures(folder, trained),
        measured=_pictures(folder, apart or trained),
        trigger_words=words,
        prompts=words[:MOST_PROMPTS] or [caption for caption in captions if caption][:1],
        dataset_config=dataset_config,
        regularisation=balance,
        class_pictures=len(classes),
    )


def stage_captioned(folder: Path, method: KohyaFields, target: Path) -> StagedDataset:
    """A captioned dataset, and the JSON of sd-scripts that says what is in it."""
    examples = checked(folder, Layout.CAPTIONED).examples
    method.check_examples(len(examples))
    trained, apart = keep_apart(examples, method.held_out_images)
    images = target / "images"
    images.mkdir(parents=True)
    metadata = {
        str(_stage(folder / example.image, example, images, number)): {
            # sd-scripts would read its first line alone. To CLIP's tokenizer both are a space.
            "caption": " ".join((example.caption or "").splitlines()),
            "image_size": [example.width, example.height],
        }
        for number, example in enumerate(trained)
    }
    in_json = target / METADATA
    in_json.write_text(json.dumps(metadata, ensure_ascii=False, indent=1), encoding="utf-8")
    pictures = _pictures(folder, trained)
    return StagedDataset(
        pictures=pictures,
        measured=_pictures(folder, apart or trained),
        prompts=first_captions(pictures),
        train_data_dir=images,
        in_json=in_json,
    )


def checked(folder: Path, layout: Layout) -> Ledger:
    """The ledger of a dataset that has no error. (sd-scripts ends with success where it finds nothing to train on.)"""
    ledger = check_source(source_of(folder), layout, decode=False)
    ledger.raise_for_errors()
    if not ledger.examples:
        raise DatasetError(f"{ledger.root}: no image is left to train on.")
    return ledger


def _stage_folders(folder: Path, examples: Sequence[Example], target: Path) -> list[dict[str, Any]]:
    """The folders laid out in ``target``, and each as a subset of --dataset_config."""
    subsets: dict[str, dict[str, Any]] = {}
    for number, example in enumerate(examples):
        name = _top(example)
        parent = target / name
        parent.mkdir(parents=True, exist_ok=True)
        subsets[name] = {
            "image_dir": str(parent),
            "num_repeats": example.repeats,
            "class_tokens": name.partition("_")[2],
        }
        image = _stage(folder / example.image, example, parent, number)
        # Always there: without it sd-scripts takes the folder's name, which is what an example without one has too.
        image.with_suffix(".txt").write_text((example.caption or "") + "\n", encoding="utf-8")
    return list(subsets.values())


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


def _pictures(folder: Path, examples: Sequence[Example]) -> list[Picture]:
    return [Picture.of(folder, example, "") for example in examples]


def _shown(examples: Sequence[Example]) -> int:
    return sum(example.repeats for example in examples)


def _balance(training: int, regularisation: int) -> str:
    head = f"{regularisation} regularisation pictures, with their repeats, for {training} training pictures"
    if regularisation > training:
        return f"{head}: sd-scripts leaves out {regularisation - training} of them. Raise the repeats of the subject's."
    if regularisation < training:
        return f"{head}: sd-scripts shows them again, so that both are shown equally often."
    return f"{head}."
