"""Small runs of every kind, what they leave, and what must be true of it at any moment."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sdtune.methods.catalog import METHODS
from sdtune.methods.resuming import CHECKPOINTS
from sdtune.training.components.checkpoint_files import damage, read_manifest, steps_in
from tests.conftest import BASE_MODEL, DATASETS

STEPS = 12
COMMON: dict[str, Any] = {
    "base_model": str(BASE_MODEL),
    "resolution": 64,
    "max_train_steps": STEPS,
    "learning_rate": 1e-3,
    "num_samples": 1,
    "sample_steps": 2,
    "sample_every": 5,
    "checkpointing_steps": 2,
}
SUBJECT = {"instance_prompt": "a photo of sks cat"}
PRIOR = {"with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 3}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("dreambooth-lora", {**SUBJECT, "lora_dropout": 0.1, "rank": 4}),
    "lora-prior-text-encoder": (
        "dreambooth-lora",
        {**SUBJECT, **PRIOR, "train_text_encoder": True, "rank": 4, "train_batch_size": 2, "lr_scheduler": "cosine"},
    ),
    "lora-prodigy": ("dreambooth-lora", {**SUBJECT, "rank": 4, "optimizer": "prodigy", "learning_rate": 1.0}),
    "captioned-lora": (
        "text-to-image-lora",
        {
            "rank": 4, "lora_dropout": 0.2, "proportion_empty_prompts": 0.5, "gradient_accumulation_steps": 3,
            "optimizer": "lion", "noise_offset": 0.1, "random_flip": True,
        },
    ),
    "whole-ema": (
        "text-to-image",
        {"use_ema": True, "ema_decay": 0.9, "snr_gamma": 5.0, "lr_scheduler": "linear", "lr_warmup_steps": 2,
         "num_samples": 0, "sample_every": 0},
    ),
    "whole-prior": (
        "dreambooth", {**SUBJECT, **PRIOR, "train_text_encoder": True, "optimizer": "adafactor", "num_samples": 0,
                       "sample_every": 0},
    ),
    "peft-lora-dora": ("peft-dreambooth-lora", {**SUBJECT, "rank": 4, "use_dora": True, "train_text_encoder": True}),
    "peft-lokr": ("peft-dreambooth-lora", {**SUBJECT, "adapter": "lokr", "rank": 4, "lora_dropout": 0.3}),
    "peft-oft": ("peft-dreambooth-lora", {**SUBJECT, "adapter": "oft", "rank": 8, "lora_dropout": 0.3}),
}  # fmt: skip
"""By a name: the method, and settings that have something random or moving in each."""


def words_of(kind: str, output: str | Path, *more: str, dataset: str | None = None, **settings: Any) -> list[str]:
    """The arguments of the training process."""
    name, own = KINDS[kind]
    method = METHODS[name].from_settings({**COMMON, **own, **settings})
    pictures = dataset or str(DATASETS / METHODS[name].layout.value)
    return ["train", name, f"--dataset={pictures}", f"--output={output}", *more, *method.to_args()]


def result_of(output: Path) -> dict[str, str]:
    """The hashes of all weights and samples that a run has left."""
    files = [file for file in output.rglob("*") if file.suffix in (".safetensors", ".png")]
    return {
        file.relative_to(output).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if CHECKPOINTS not in file.parts and "class_pictures" not in file.parts
    }


def all_is_whole(output: Path) -> None:
    """At any moment: what looks like a checkpoint is one, and what looks like a result can be read to its end."""
    folder = output / CHECKPOINTS
    for step in steps_in(folder):
        place = folder / f"step-{step:06d}"
        manifest = read_manifest(place)
        assert manifest, place
        assert damage(place, manifest) is None
    for file in output.rglob("*.safetensors"):
        if not any(part.startswith(".") for part in file.relative_to(output).parts):
            content = file.read_bytes()
            start = 8 + int.from_bytes(content[:8], "little")
            entries = json.loads(content[8:start])
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            assert start + max(ends) == len(content), file
