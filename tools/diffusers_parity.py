"""Writes tests/training/diffusers_losses.json: what diffusers' own example scripts lose on what sdtune trains on.

    git clone --branch v0.40.0 https://github.com/huggingface/diffusers ../diffusers
    make parity DIFFUSERS=../diffusers

Each method is trained twice for 20 steps in float32 on the CPU: by sdtune, noting what it draws, and by the example
script, which is run as it is. Only what is random in the script is replaced: the order of the pictures, the VAE's own
noise, noise and timesteps, and the seed of the LoRA's first weights. Everything else is the script's: pictures and
captions read, VAE and text encoder, noising, loss, clipping, optimizer, schedule, averaging.

Where the two differ on purpose, both are brought to one setting:
- the scripts do not train a text encoder that is stored in half precision, so they get a float32 copy of the model;
- the scripts crop at random; here at the centre, and no picture is mirrored;
- losses of accumulated batches are told as their mean, by both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from parity_runs import (
    BASE_MODEL,
    CASES,
    OURS_ALONE,
    RESOLUTION,
    STORED,
    Draw,
    Heard,
    lay_out,
    noting_averages,
    same_lora_weights,
    train,
)
from PIL import Image

SCRIPTS = {
    "dreambooth": "dreambooth/train_dreambooth.py",
    "dreambooth-lora": "dreambooth/train_dreambooth_lora.py",
    "text-to-image": "text_to_image/train_text_to_image.py",
    "text-to-image-lora": "text_to_image/train_text_to_image_lora.py",
}
LIBRARIES = ("diffusers", "transformers", "peft", "accelerate", "torch", "torchvision", "datasets")
FARTHEST = 7.0
"""Of a draw from the normal distribution: no picture's latents are taken for another's."""


@dataclass(frozen=True)
class Batch:
    """A Draw as a script takes it: names of the pictures, and the VAE's noise of which their latents were made."""

    pictures: list[str]
    posterior_noise: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


class Pictures:
    """The pictures through the VAE, to tell from latents of which picture and which noise they were made."""

    def __init__(self, folders: list[Path]) -> None:
        paths = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jpg")]
        self.names = [path.name for path in paths]
        vae = AutoencoderKL.from_pretrained(BASE_MODEL, subfolder="vae")
        self._scaling_factor = vae.config.scaling_factor
        with torch.no_grad():
            self._posterior = vae.encode(torch.stack([_pixels(path) for path in paths])).latent_dist

    def batch(self, draw: Draw) -> Batch:
        """Exits where latents are of no picture."""
        names, posterior_noise = [], []
        for latents in draw.latents / self._scaling_factor:
            noise = (latents - self._posterior.mean) / self._posterior.std
            distances = noise.abs().amax((1, 2, 3))
            nearest = int(distances.argmin())
            if distances[nearest] > FARTHEST:
                sys.exit(f"sdtune trained on latents that are {distances[nearest]:.1f} deviations from every picture's")
            names.append(self.names[nearest])
            posterior_noise.append(noise[nearest])
        return Batch(names, torch.stack(posterior_noise), draw.noise, draw.timesteps)


def _pixels(path: Path) -> torch.Tensor:
    picture = Image.open(path).convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 127.5 - 1.0


class Order(torch.utils.data.Sampler[int]):
    """Stands for the script's RandomSampler: the indices of given pictures in its dataset."""

    def __init__(self, batches: list[Batch], dataset: Any) -> None:
        find = _in_dreambooth if hasattr(dataset, "instance_images_path") else _in_image_folder
        self._indices = [index for batch in batches for index in find(dataset, batch.pictures)]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def _in_dreambooth(dataset: Any, pictures: list[str]) -> list[int]:
    """Item ``i`` is the pair of subject ``i`` and class ``i``, each modulo how many there are."""
    subjects = [path.name for path in dataset.instance_images_path]
    classes = [path.name for path in dataset.class_images_path]
    pairs = {
        (subjects[index % len(subjects)], classes[index % len(classes)]): index
        for index in range(len(subjects) * len(classes))
    }
    half = len(pictures) // 2
    return [pairs[pair] for pair in zip(pictures[:half], pictures[half:], strict=True)]


def _in_image_folder(dataset: Any, pictures: list[str]) -> list[int]:
    images = dataset.with_format("arrow")[:]["image"]
    names = [Path(image["path"]).name for image in images.to_pylist()]
    return [names.index(picture) for picture in pictures]


@contextmanager
def fed(batches: list[Batch], losses: list[float]) -> Iterator[None]:
    """The script draws what ``batches`` says, in this order, and what it logs is kept; afterwards all must be drawn."""
    posterior_noise, noise, timesteps = (
        iter([getattr(batch, name) for batch in batches]) for name in ("posterior_noise", "noise", "timesteps")
    )

    def log(_: Accelerator, values: dict[str, float], step: int) -> None:
        losses.append(values["loss"] if "loss" in values else values["train_loss"])

    with (
        patch("torch.utils.data.dataloader.RandomSampler", lambda dataset, generator: Order(batches, dataset)),
        patch.object(
            DiagonalGaussianDistribution, "sample", lambda normal: normal.mean + normal.std * next(posterior_noise)
        ),
        patch("torch.randn_like", lambda latents: next(noise)),
        patch("torch.randint", lambda low, high, shape, device: next(timesteps)),
        patch.object(Accelerator, "log", log),
        patch("diffusers.utils.check_min_version", lambda version: None),
    ):
        yield
    if any(next(draws, None) is not None for draws in (posterior_noise, noise, timesteps)):
        sys.exit("the script drew less than sdtune did")


def run_script(
    path: Path, name: str, batches: list[Batch], model: Path, datasets: dict[str, Path], output: Path
) -> Heard:
    """Run one example script as its users do, but for what it draws."""
    places = {
        "pretrained_model_name_or_path": model,
        "output_dir": output,
        "resolution": RESOLUTION,
        "center_crop": True,
        "mixed_precision": OURS_ALONE["mixed_precision"],
    }
    if name.startswith("dreambooth"):
        places |= {"instance_data_dir": datasets["instance"], "class_data_dir": datasets["class"]}
    else:
        places |= {"train_data_dir": datasets["captioned"], "cache_dir": output / "cache"}
    settings = {**places, **CASES[name]}
    arguments = [f"--{option}" if value is True else f"--{option}={value}" for option, value in settings.items()]
    heard = Heard()
    with (
        patch.object(sys, "argv", [path.name, *arguments]),
        fed(batches, heard.losses),
        noting_averages(heard.averages),
        same_lora_weights(),
    ):
        runpy.run_path(str(path), run_name="__main__")
    return heard


def compare(name: str, examples: Path, folder: Path) -> dict[str, Any]:
    """Train by both; what is to be stored."""
    datasets, model = lay_out(folder / name / "data"), folder / "model"
    ours = train(name, CASES[name], datasets, folder / name / "sdtune")
    forget_accelerate()
    if name.startswith("dreambooth"):
        pictures = Pictures([datasets["instance"], datasets["class"]])
    else:
        pictures = Pictures([datasets["captioned"]])
    batches = [pictures.batch(draw) for draw in ours.draws]
    theirs = run_script(examples / SCRIPTS[name], name, batches, model, datasets, folder / name / "diffusers")
    forget_accelerate()
    accumulated = CASES[name].get("gradient_accumulation_steps", 1)
    pairs = zip(ours.step_losses(accumulated) + ours.averages, theirs.losses + theirs.averages, strict=True)
    farthest = max(abs(found - wanted) / wanted for found, wanted in pairs)
    print(f"{name}: {len(theirs.losses)} losses, largest relative difference {farthest:.1e}", file=sys.stderr)
    return {
        "script": f"examples/{SCRIPTS[name]}",
        "settings": CASES[name],
        "timesteps": ours.timesteps,
        "losses": theirs.losses,
        "averages": theirs.averages,
    }


def forget_accelerate() -> None:
    """Accelerate keeps its state for the whole process; a run has the process to itself, here it has not."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def commit_of(diffusers: Path) -> str:
    """The commit that is checked out; exits where the examples are not those of one."""
    git = ["git", f"--git-dir={diffusers / '.git'}", f"--work-tree={diffusers}"]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--", "examples"], capture_output=True, text=True)
    if found.returncode or changed.returncode or changed.stdout:
        sys.exit(f"{diffusers}: wanted a git checkout of huggingface/diffusers with its examples unchanged")
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("diffusers", type=Path, help="a git checkout of huggingface/diffusers")
    diffusers = parser.parse_args().diffusers.resolve()
    stored: dict[str, Any] = {
        "commit": commit_of(diffusers),
        "python": platform.python_version(),
        "libraries": {name: version(name).partition("+")[0] for name in LIBRARIES},
    }
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline = StableDiffusionPipeline.from_pretrained(BASE_MODEL, dtype=torch.float32, local_files_only=True)
        pipeline.save_pretrained(folder / "model")
        stored["methods"] = {name: compare(name, diffusers / "examples", folder) for name in CASES}
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
