"""Small runs of kohya's methods, with something random or moving in each, and their datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from sdtune.methods.catalog import METHODS
from tests.conftest import BASE_MODEL

STEPS = 14
COMMON: dict[str, Any] = {
    "base_model": str(BASE_MODEL),
    "resolution": 64,
    "max_train_steps": STEPS,
    "learning_rate": 1e-3,
    "network_dim": 4,
    "num_samples": 1,
    "sample_steps": 2,
    "sample_every": 5,
    "held_out_every": 4,
    "save_precision": "float",
    "checkpointing_steps": 2,
}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # An epoch has 8 batches, and every second step sees the end of one.
    "kohya-regularised": (
        "kohya-dreambooth-lora",
        {"network_dropout": 0.1, "flip_aug": True, "prior_loss_weight": 0.5, "lr_scheduler": "cosine"},
    ),
    # An epoch has 5 batches of two shapes, so that its last step is made of fewer than the others.
    "kohya-captioned": (
        "kohya-native-lora",
        {
            "shuffle_caption": True, "caption_dropout_rate": 0.4, "gradient_accumulation_steps": 2, "noise_offset": 0.1,
            "train_batch_size": 2, "min_bucket_reso": 64, "max_bucket_reso": 128, "conv_dim": 2,
        },
    ),
    # Pictures are read by processes of their own, and encoded anew at each step.
    "kohya-cropped": (
        "kohya-native-lora",
        {
            "cache_latents": False, "random_crop": True, "flip_aug": True, "shuffle_caption": True,
            "optimizer_type": "Prodigy", "learning_rate": 1.0, "train_text_encoder": False,
        },
    ),
    "kohya-adafactor": ("kohya-dreambooth-lora", {"optimizer_type": "AdaFactor", "text_encoder_lr": 1e-4}),
    "kohya-lion": ("kohya-native-lora", {"optimizer_type": "Lion", "learning_rate": 1e-4, "caption_dropout_rate": 0.4}),
}  # fmt: skip


def _noise(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.as_posix().encode()[-12:])
    pixels = numpy.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(path)


def lay_out(folder: Path) -> None:
    """The datasets of all kinds, in ``folder``."""
    for number in range(2):
        _noise(folder / "subject" / "2_sks cat" / f"{number}.png", 128, 96)
        _noise(folder / "class" / "1_cat" / f"{number}.png", 96, 128)
    rows = []
    for number in range(9):
        width, height = (128, 64) if number < 4 else (64, 96)
        _noise(folder / "captioned" / f"{number}.png", width, height)
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"a drawing, number {number}, red, blue, wide"}))
    (folder / "captioned" / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


def words_of(kind: str, datasets: Path, output: str | Path, *more: str, **settings: Any) -> list[str]:
    """The arguments of the training process; datasets: where they were laid out."""
    name, own = KINDS[kind]
    subject = name == "kohya-dreambooth-lora"
    if subject:
        own = {"class_data_dir": str(datasets / "class"), **own}
    method = METHODS[name].from_settings({**COMMON, "sample_prompt": ["a drawing"], **own, **settings})
    return ["train", name, f"--dataset={datasets / ('subject' if subject else 'captioned')}", f"--output={output}",
            *more, *method.to_args()]  # fmt: skip
