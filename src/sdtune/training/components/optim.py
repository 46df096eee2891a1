"""The optimizer, its learning-rate schedule, and what they do in a step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from transformers.optimization import Adafactor

from sdtune.errors import TrainingError
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.fused import can_fuse
from sdtune.training.components.weights import Group, Weights
from sdtune.training.run import Run

FLAT = ("adamw", "lion", "prodigy")
"""Optimizers to which a weight's shape means nothing: all weights of a group are updated as one long one."""


class Update:
    """What follows on the backward passes of a step: gradients are clipped, the masters moved by them, the model given
    their casts, and the gradients forgotten.

    scaler: of losses, at work in half precision of little range (fp16).
    """

    def __init__(self, weights: Weights, method: TrainingFields, run: Run) -> None:
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.mixed_precision == "fp16")
        self._at_once = fits_one_kernel(weights, method, run)
        self.optimizer, self.schedule = build_optimizer(weights, method, self._at_once)
        self._weights, self._max_grad_norm = weights, method.max_grad_norm

    def __call__(self) -> None:
        if self._at_once:
            self.optimizer.step()
            self.schedule.step()
            return
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self._weights.masters, self._max_grad_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # A step that overflowed in half precision was left out.
        if self.scaler.get_scale() >= scale:
            self.schedule.step()
        self._weights.cast()


def fits_one_kernel(weights: Weights, method: TrainingFields, run: Run) -> bool:
    """Whether ``FlatAdamW`` can do the update: no loss scale, and no sum of gradients, of passes or of processes, which
    is made in float32."""
    alone = method.gradient_accumulation_steps == 1 and run.share.of == 1
    adamw_of_casts = method.optimizer == "adamw" and weights.dtype is torch.bfloat16
    return alone and adamw_of_casts and can_fuse(run.device)


def build_optimizer(
    weights: Weights, method: TrainingFields, at_once: bool = False
) -> tuple[torch.optim.Optimizer, Any]:
    """The method's optimizer over the masters and the schedule of its learning rate, one tick per optimizer step.

    Optimizers are told the learning rate although each group has its own: the polynomial schedule, which ends at 1e-7
    whatever it starts from, asks for theirs. at_once: ``FlatAdamW``, which also clips and casts.
    """
    if at_once:
        from sdtune.training.components.flat_adamw import FlatAdamW

        optimizer: Any = FlatAdamW(weights, method.max_grad_norm, **_adam_options(method))
    else:
        optimizer = OPTIMIZERS[method.optimizer](weights.groups(flat=method.optimizer in FLAT), method)
    schedule = get_scheduler(
        method.lr_scheduler,
        optimizer,
        num_warmup_steps=method.lr_warmup_steps,
        num_training_steps=method.max_train_steps,
        num_cycles=method.lr_num_cycles,
    )
    return optimizer, schedule


def _adam_options(method: TrainingFields) -> dict[str, Any]:
    return {
        "lr": method.learning_rate,
        "betas": (method.adam_beta1, method.adam_beta2),
        "weight_decay": method.adam_weight_decay,
        "eps": method.adam_epsilon,
    }


def _adamw(groups: list[Group], method: TrainingFields) -> Any:
    return torch.optim.AdamW(groups, fused=groups[0]["params"][0].is_cuda, **_adam_options(method))


def _adamw8bit(groups: list[Group], method: TrainingFields) -> Any:
    """Dettmers et al. 2021, arXiv:2110.02861."""
    return _library("bitsandbytes").optim.AdamW8bit(groups, **_adam_options(method))


def _prodigy(groups: list[Group], method: TrainingFields) -> Any:
    """Mishchenko & Defazio 2023, arXiv:2306.06101; the learning rate multiplies the one it finds."""
    safeguard = method.lr_warmup_steps > 0
    return _library("prodigyopt").Prodigy(groups, decouple=True, safeguard_warmup=safeguard, **_adam_options(method))


def _adafactor(groups: list[Group], method: TrainingFields) -> Any:
    """Shazeer & Stern 2018, arXiv:1804.04235, at the given rate instead of its own schedule."""
    rate, decay = method.learning_rate, method.adam_weight_decay
    return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False, weight_decay=decay)


def _lion(groups: list[Group], method: TrainingFields) -> Any:
    """Chen et al. 2023, arXiv:2302.06675."""
    betas = (method.adam_beta1, method.adam_beta2)
    rate, decay = method.learning_rate, method.adam_weight_decay
    return _library("lion_pytorch").Lion(groups, lr=rate, betas=betas, weight_decay=decay)


OPTIMIZERS: dict[str, Callable[[list[Group], TrainingFields], Any]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "prodigy": _prodigy,
    "adafactor": _adafactor,
    "lion": _lion,
}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrainingError(
            f"optimizer: the library {name} is not installed here ({error}); "
            "install it with pip install -e '.[optimizers]' in sdtune's folder, or use --optimizer adamw."
        ) from None
