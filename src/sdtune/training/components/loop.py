"""fit(): the loop that every trainer runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.data import Batch
from sdtune.training.components.models import Parts
from sdtune.training.components.optim import parameters_of
from sdtune.training.components.processes import exchange_gradients
from sdtune.training.run import Run

SECONDS_BETWEEN_REPORTS = 1.0
STEPS_TO_JUDGE_SPEED = 3


def fit(
    loss_of: Callable[[Batch], torch.Tensor],
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    batches: Iterator[Batch],
    method: TrainingFields,
    run: Run,
    after_step: Sequence[Callable[[int], None]] = (),
) -> float:
    """Train for ``max_train_steps`` optimizer steps; the mean loss over their last tenth.

    ``after_step`` is called with the number of each step.

    Losses stay on the device until a report is due: reading one makes the host wait for the GPU.
    Raises TrainingError as soon as a report finds a loss that is not finite.
    """
    together = f" in {run.share.of} processes together" if run.share.of > 1 else ""
    run.tell(events.Phase("train", f"Training {method.max_train_steps} steps{together}"))
    # Dropout must not be the same in every process; the first goes on as it would alone.
    if run.share.number:
        torch.manual_seed(method.seed + run.share.number)
    # Dropout and gradient checkpointing are at work in this mode alone.
    for module in (parts.unet, *parts.text_encoders):
        module.train()
    optimizer, schedule = run.accelerator.prepare(optimizer, schedule)
    pictures_per_step = method.train_batch_size * method.gradient_accumulation_steps * run.share.of
    last_tenth = max(1, method.max_train_steps // 10)
    losses: list[torch.Tensor] = []
    reported, started = 0, time.perf_counter()
    last_report = started
    for step in range(1, method.max_train_steps + 1):
        step_loss = torch.zeros((), device=run.device)
        for _ in range(method.gradient_accumulation_steps):
            with run.accelerator.autocast():
                loss = loss_of(next(batches)) / method.gradient_accumulation_steps
            run.accelerator.backward(loss)
            step_loss += loss.detach()
        if run.share.of > 1:
            exchange_gradients(parameters_of(optimizer.param_groups), run.accelerator)
            step_loss = run.accelerator.reduce(step_loss, reduction="mean")
        run.accelerator.clip_grad_norm_(parameters_of(optimizer.param_groups), method.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step_loss)

        now = time.perf_counter()
        first_estimate = step == STEPS_TO_JUDGE_SPEED
        if first_estimate or step == method.max_train_steps or now - last_report >= SECONDS_BETWEEN_REPORTS:
            mean = finite_mean(losses[reported:], reported + 1, step)
            # The mean may have waited for the device.
            now = time.perf_counter()
            rate = (step - reported) / (now - last_report)
            run.tell(
                events.Step(
                    step=step,
                    steps=method.max_train_steps,
                    loss=round(mean, 6),
                    learning_rate=schedule.get_last_lr()[0],
                    images_per_second=round(rate * pictures_per_step, 3),
                    seconds_left=round((method.max_train_steps - step) * (now - started) / step, 1),
                )
            )
            reported, last_report = step, now
        for call in after_step:
            call(step)
    return finite_mean(losses[-last_tenth:], method.max_train_steps - last_tenth + 1, method.max_train_steps)


def finite_mean(losses: list[torch.Tensor], first: int, last: int) -> float:
    """The mean of the losses of steps ``first`` to ``last``."""
    values = torch.stack(losses)
    mean = values.mean().item()
    if not math.isfinite(mean):
        bad = first + int((~torch.isfinite(values)).nonzero()[0])
        raise TrainingError(
            f"the loss was {values[bad - first].item()} at step {bad}: the run has diverged and nothing was saved. "
            "Lower --learning-rate, or use --mixed-precision bf16 (or no) if it was fp16."
        )
    return mean
