"""The held-out loss, measured inside sd-scripts on the very UNet and text encoders that it trains.

So it can be measured during training, nothing is loaded twice, and what is measured is what is trained. Imports
nothing of sdtune but events: sd-scripts' Python runs this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch.nn import functional

from sdtune.events import Event, Measure, emit

AT_ONCE = 8


def is_first() -> bool:
    """Of several processes that train together one speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def tell(event: Event) -> None:
    """Say it once, however many processes train together."""
    if is_first():
        emit(event)


class Scene(NamedTuple):
    """What sd-scripts passes on to where it draws; text_encoder: two in a list for SDXL."""

    accelerator: Any
    args: Any
    device: Any
    vae: Any
    tokenizers: Any
    text_encoder: Any
    unet: Any


class HeldOutLoss:
    """Mean squared error of the prediction over the draws in ``file``, weighted by nothing.

    captions: of the pictures in ``file``, which ``held_out.py`` writes. trainer: a NetworkTrainer, for its words on
    tokens, text, noise and the UNet's conditions, with its ``network`` and ``weight_dtype``.
    """

    def __init__(self, file: str, captions: Sequence[str], trainer: Any, scene: Scene) -> None:
        self._captions, self._trainer, self._scene = captions, trainer, scene
        both = isinstance(scene.text_encoder, list)
        self._text_encoders = scene.text_encoder if both else [scene.text_encoder]
        self._tokenize_strategy = trainer.get_tokenize_strategy(scene.args)
        self._text_encoding_strategy = trainer.get_text_encoding_strategy(scene.args)
        held_out = load_file(file)
        self._pictures, self._noise, self._timesteps = (held_out[name] for name in ("pictures", "noise", "timesteps"))
        self._latents = self._encode(held_out["pixels"])

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """Tell the loss after ``step`` steps."""
        scheduler = self._trainer.get_noise_scheduler(self._scene.args, self._scene.device)
        with self._evaluating(), self._scene.accelerator.autocast():
            draws = torch.split(torch.arange(len(self._noise)), AT_ONCE)
            found = torch.cat([self._errors(scheduler, rows) for rows in draws])
        tell(Measure("held_out_loss", step, round(found.mean().item(), 6)))

    def _errors(self, scheduler: Any, rows: torch.Tensor) -> torch.Tensor:
        """The mean squared error of each of these draws, float32 [rows]."""
        accelerator, args, device, *_ = self._scene
        pictures = self._pictures[rows]
        latents, noise = self._latents[pictures].to(device), self._noise[rows].to(device)
        timesteps = self._timesteps[rows].to(device)
        noise_pred = self._trainer.call_unet(
            args,
            accelerator,
            self._scene.unet,
            scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            self._encode_captions([self._captions[picture] for picture in pictures.tolist()]),
            _sizes(latents),
            self._trainer.weight_dtype,
        )
        target = scheduler.get_velocity(latents, noise, timesteps) if args.v_parameterization else noise
        return functional.mse_loss(noise_pred.float(), target, reduction="none").mean(dim=(1, 2, 3))

    def _encode_captions(self, captions: list[str]) -> Any:
        accelerator, args, device, *_ = self._scene
        input_ids = [ids.to(device) for ids in self._tokenize_strategy.tokenize(captions)]
        models = self._trainer.get_models_for_text_encoding(args, accelerator, self._text_encoders)
        return self._text_encoding_strategy.encode_tokens(self._tokenize_strategy, models, input_ids)

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean latents of uint8 ``pixels``, scaled, float32 on the CPU: without the VAE's noise, always the same."""
        vae = self._scene.vae
        was = vae.device
        vae.to(self._scene.device)
        means = [
            vae.encode((picture[None].float() / 127.5 - 1).to(vae.device, vae.dtype)).latent_dist.mean.float().cpu()
            for picture in pixels
        ]
        vae.to(was)
        latents: torch.Tensor = self._trainer.shift_scale_latents(self._scene.args, torch.cat(means))
        return latents

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modules = [self._scene.unet, *self._text_encoders, self._trainer.network]
        training = [module.training for module in modules]
        try:
            for module in modules:
                module.eval()
            yield
        finally:
            for module, was in zip(modules, training, strict=True):
                module.train(was)


def _sizes(latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """What SDXL is told of a picture, as in a batch of sd-scripts: it was whole, and of the size it is trained at."""
    size = torch.tensor([[side * 8 for side in latents.shape[-2:]]]).expand(len(latents), 2)
    return {"original_sizes_hw": size, "crop_top_lefts": torch.zeros_like(size), "target_sizes_hw": size}
