"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.optimization import get_scheduler

from sdtune.methods.fields import TrainingFields


def build_optimizer(
    parameters: list[torch.nn.Parameter], method: TrainingFields
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over ``parameters`` and the schedule of its learning rate, one tick per optimizer step."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=method.learning_rate,
        betas=(method.adam_beta1, method.adam_beta2),
        weight_decay=method.adam_weight_decay,
        eps=method.adam_epsilon,
        fused=parameters[0].is_cuda,
    )
    schedule: Any = get_scheduler(
        method.lr_scheduler,
        optimizer,
        num_warmup_steps=method.lr_warmup_steps,
        num_training_steps=method.max_train_steps,
    )
    return optimizer, schedule
