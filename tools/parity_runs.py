"""Four short runs that diffusers_parity.py compares, and sdtune's half of each: trained as usual, and listened to.

The settings have the same names and meanings in diffusers' example scripts. What is set here is far from the defaults
where a mistake would else be too small to see in 20 losses: a weight decay of 1 in place of 0.01, for one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers.loaders
import torch
import transformers.integrations.peft
from diffusers.training_utils import EMAModel
from PIL import Image

from sdtune.methods.catalog import find_method
from sdtune.training.__main__ import run_training
from sdtune.training.components import loss

ROOT = Path(__file__).parent.parent
BASE_MODEL = ROOT / "examples" / "base-model"
DATASETS = ROOT / "examples" / "datasets"
STORED = ROOT / "tests" / "training" / "diffusers_losses.json"
RESOLUTION = 128
"""The base model's own."""
CLASS_PICTURES = 5
"""Coprime to the 8 pictures of the subject: diffusers' dataset then reaches every pair of both by one index."""

DREAMBOOTH = {
    "instance_prompt": "a photo of sks cat",
    "with_prior_preservation": True,
    "class_prompt": "a drawing of an owl",
    "num_class_images": CLASS_PICTURES,
    "prior_loss_weight": 0.4,
    "train_text_encoder": True,
    "train_batch_size": 2,
    "max_train_steps": 20,
}
CASES: dict[str, dict[str, Any]] = {
    "dreambooth": {
        **DREAMBOOTH,
        "learning_rate": 1e-4,
        "lr_scheduler": "polynomial",
        "lr_warmup_steps": 2,
        "adam_weight_decay": 1.0,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 0.5,
    },
    "dreambooth-lora": {
        **DREAMBOOTH,
        "rank": 4,
        "learning_rate": 4e-3,
        "lr_scheduler": "cosine_with_restarts",
        "lr_num_cycles": 2,
        "lr_warmup_steps": 3,
        "adam_weight_decay": 1.0,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.2,
    },
    "text-to-image": {
        "train_batch_size": 3,
        "max_train_steps": 20,
        "snr_gamma": 5.0,
        "use_ema": True,
        "learning_rate": 1e-4,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 4,
        "adam_weight_decay": 1.0,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 0.3,
    },
    "text-to-image-lora": {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 20,
        "prediction_type": "v_prediction",
        "snr_gamma": 5.0,
        "rank": 8,
        "learning_rate": 4e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 5,
        "adam_weight_decay": 1.0,
        # diffusers' script hands the optimizer's own, used-up iterator to the clipping, which so never clips.
        "max_grad_norm": 1e6,
    },
}
OURS_ALONE = {"mixed_precision": "no", "seed": 7, "num_samples": 0}


@dataclass(frozen=True)
class Draw:
    """What one batch trains on.

    latents: scaled; noise: of the same shape; timesteps: int64 [batch]. Class pictures, if any, are the second half.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


@dataclass
class Heard:
    """One run: its draws, the loss of each batch, and of each moving average how far it was from its weights."""

    draws: list[Draw] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    averages: list[float] = field(default_factory=list)

    @property
    def timesteps(self) -> list[str]:
        """Of each batch, as they are stored: one line for each."""
        return [" ".join(map(str, draw.timesteps.tolist())) for draw in self.draws]

    def step_losses(self, batches_per_step: int) -> list[float]:
        """The mean loss of each optimizer step, unrounded."""
        return torch.tensor(self.losses, dtype=torch.float64).reshape(-1, batches_per_step).mean(1).tolist()


def lay_out(folder: Path) -> dict[str, Path]:
    """The datasets of each method, square.

    Those of DreamBooth are of the model's own size already: its scripts make pictures smaller by another filter than
    sdtune does.
    """
    sources = {"instance": sorted((DATASETS / "images").iterdir())}
    sources["class"] = sorted((DATASETS / "toy").iterdir())[:CLASS_PICTURES]
    for name, pictures in sources.items():
        (folder / name).mkdir(parents=True)
        for path in pictures:
            picture = Image.open(path).resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
            picture.save(folder / name / f"{path.stem}.png")
    return {"instance": folder / "instance", "class": folder / "class", "captioned": DATASETS / "captioned"}


def train(name: str, settings: dict[str, Any], datasets: dict[str, Path], output: Path) -> Heard:
    """Train by sdtune's own entry point, and what was heard of it."""
    given = {"class_data_dir": str(datasets["class"])} if settings.get("with_prior_preservation") else {}
    method = find_method(name).from_settings({"base_model": str(BASE_MODEL), **OURS_ALONE, **given, **settings})
    trainer = importlib.import_module(f"sdtune.training.trainers.{method.trainer}")
    heard = Heard()
    with (
        patch.object(loss, "errors", _noting_draws(heard.draws)),
        patch.object(trainer, "diffusion_loss", _noting_losses(heard.losses, trainer.diffusion_loss)),
        noting_averages(heard.averages),
        same_lora_weights(),
    ):
        dataset = datasets["instance" if name.startswith("dreambooth") else "captioned"]
        run_training(method, dataset, output)
    return heard


def _noting_draws(draws: list[Draw]) -> Any:
    real = loss.errors

    def errors(parts: Any, latents: Any, conditioning: Any, noise: Any, timesteps: Any) -> torch.Tensor:
        draws.append(Draw(latents, noise, timesteps))
        return real(parts, latents, conditioning, noise, timesteps)

    return errors


def _noting_losses(losses: list[float], real: Any) -> Any:
    def diffusion_loss(*args: Any) -> torch.Tensor:
        value: torch.Tensor = real(*args)
        losses.append(value.item())
        return value

    return diffusion_loss


@contextmanager
def noting_averages(averages: list[float]) -> Iterator[None]:
    """Notes the L2 distance of each moving average from the weights whose place it takes at the end."""
    real = EMAModel.copy_to

    def copy_to(self: EMAModel, parameters: Any) -> None:
        weights = list(parameters)
        pairs = zip(self.shadow_params, weights, strict=True)
        averages.append(sum(float((mean - weight.detach()).square().sum()) for mean, weight in pairs) ** 0.5)
        real(self, weights)

    with patch.object(EMAModel, "copy_to", copy_to):
        yield


@contextmanager
def same_lora_weights() -> Iterator[None]:
    """Every adapter starts from the same weights, wherever torch's generator stands when it is attached."""
    with ExitStack() as stack:
        for mixin in (diffusers.loaders.PeftAdapterMixin, transformers.integrations.peft.PeftAdapterMixin):
            stack.enter_context(patch.object(mixin, "add_adapter", _seeded(mixin.add_adapter)))
        yield


def _seeded(add_adapter: Any) -> Any:
    def seeded(*args: Any, **options: Any) -> None:
        torch.manual_seed(0)
        add_adapter(*args, **options)

    return seeded
