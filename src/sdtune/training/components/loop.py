"""fit(): the loop that every trainer runs."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods.fields import TrainingFields
from sdtune.training import interrupts
from sdtune.training.components.batches import Draws, Noised
from sdtune.training.components.captured import Captured, CudaGraph, Pass
from sdtune.training.components.models import Parts
from sdtune.training.components.optim import Update
from sdtune.training.components.processes import exchange
from sdtune.training.components.weights import Weights
from sdtune.training.run import Run

SECONDS_BETWEEN_REPORTS = 1.0
STEPS_TO_JUDGE_SPEED = 3
STEPS_AHEAD = 8
"""So many steps may wait for the GPU: enough that it never waits for Python, few enough that a stop is soon obeyed."""


class Training:
    """What moves while a model is trained: ``state_dict`` is all of it, so that another process can go on exactly.

    step: optimizer steps made. losses: of those of the last tenth that were read from the device.
    """

    def __init__(self, weights: Weights, draws: Draws, method: TrainingFields, run: Run, average: Any = None) -> None:
        """average: of the weights, a diffusers EMAModel."""
        self.weights, self.draws, self.average = weights, draws, average
        self.update = Update(weights, method, run)
        self.optimizer, self.schedule, self.scaler = self.update.optimizer, self.update.schedule, self.update.scaler
        self.step = 0
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return {"step": self.step, "losses": list(self.losses), "random": random, **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        if self.average is not None:
            self.average.to(self.weights.masters[0].device)
        self.step, self.losses = state["step"], list(state["losses"])
        torch.set_rng_state(state["random"]["cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random"]["cuda"])

    @property
    def _parts(self) -> dict[str, Any]:
        parts = {
            "weights": self.weights, "optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler,
            "draws": self.draws,
        }  # fmt: skip
        return parts if self.average is None else {**parts, "average": self.average}


def fit(
    loss_of: Callable[[Noised], torch.Tensor],
    parts: Parts,
    training: Training,
    method: TrainingFields,
    run: Run,
    after_step: Sequence[Callable[[int], None]] = (),
) -> float:
    """Train up to ``max_train_steps`` optimizer steps; the mean loss over their last tenth.

    ``after_step`` is called with the number of each step.

    Losses stay on the device until a report is due: reading one makes the host wait for the GPU.
    Raises TrainingError as soon as a report finds a loss that is not finite.
    """
    together = f" in {run.share.of} processes together" if run.share.of > 1 else ""
    run.tell(events.Phase("train", f"Training {method.max_train_steps} steps{together}"))
    # Dropout must not be the same in every process; the first goes on as it would alone.
    if run.share.number:
        torch.manual_seed(method.seed + run.share.number)
    weights = training.weights
    run.checkpoints.restore(training)
    forward_and_backward = pass_of(loss_of, parts, training, method, run)
    one_pass = Captured(forward_and_backward, run.device, run.tell, CudaGraph if run.device.type == "cuda" else None)
    report = _Report(training, method, run)
    queue = _Queue(run.device)

    def follow_up() -> None:
        """What follows on a step, and then what all processes do about checkpoints and signals."""
        whole = _whole(after_step, training.step)
        # The first process may have drawn for long, and the others wait for it here.
        slow = any(every and training.step % every == 0 for every in (method.sample_every, method.held_out_every))
        run.checkpoints.after(training, report.tell, ask=slow, whole=whole)

    # A signal waits for the end of the step, where all processes agree on what to do.
    with interrupts.held():
        if run.checkpoints.owes:
            follow_up()
        while training.step < method.max_train_steps:
            names: list[str] = []
            step_loss = torch.zeros((), device=run.device)
            for _ in range(method.gradient_accumulation_steps):
                noised = next(training.draws)
                names += noised.batch.names
                step_loss += one_pass(noised)
            if run.share.of > 1:
                exchange(weights.gradients, run.accelerator)
                step_loss = run.accelerator.reduce(step_loss, reduction="mean")
            training.update()
            training.step += 1
            if training.average is not None:
                training.average.step(weights.masters)
            queue.wait()
            report.add(step_loss, names)
            follow_up()
    return sum(training.losses) / len(training.losses)


def pass_of(
    loss_of: Callable[[Noised], torch.Tensor], parts: Parts, training: Training, method: TrainingFields, run: Run
) -> Pass:
    """Forward and backward, which adds to the gradients; the loss, divided by the passes of a step."""
    # Dropout and gradient checkpointing are at work in this mode alone.
    for module in (parts.unet, *parts.text_encoders):
        module.train()
    autocast = run.accelerator.autocast if parts.is_mixed(run.weight_dtype) else nullcontext

    def forward_and_backward(noised: Noised) -> torch.Tensor:
        with autocast():
            loss = loss_of(noised) / method.gradient_accumulation_steps
        torch.autograd.backward(training.scaler.scale(loss))
        training.weights.collect()
        return loss.detach()

    return forward_and_backward


def _whole(calls: Sequence[Callable[[int], None]], step: int) -> bool:
    """Whether all that follows on a step was done: a signal ends it at once, for it changes nothing that is trained."""
    try:
        with interrupts.let_through():
            for call in calls:
                call(step)
    except KeyboardInterrupt:
        return False
    return True


class _Queue:
    """Keeps the host at most STEPS_AHEAD steps ahead of the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._events = device, deque[Any]()

    def wait(self) -> None:
        """Called when a step is under way."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.current_stream().record_event()
        self._events.append(event)
        if len(self._events) > STEPS_AHEAD:
            self._events.popleft().synchronize()


class _Report:
    """Reads the losses from the device now and then, and tells them."""

    def __init__(self, training: Training, method: TrainingFields, run: Run) -> None:
        self._training, self._method, self._run = training, method, run
        self._unread: list[tuple[int, torch.Tensor, list[str]]] = []
        self._first = training.step
        self._reported, self._last = training.step, time.perf_counter()
        self._started = self._last

    def add(self, loss: torch.Tensor, names: list[str]) -> None:
        """The loss of the step just made, and the pictures that it saw."""
        step, steps = self._training.step, self._method.max_train_steps
        self._unread.append((step, loss, names))
        first_estimate = step == self._first + STEPS_TO_JUDGE_SPEED
        if first_estimate or step == steps or time.perf_counter() - self._last >= SECONDS_BETWEEN_REPORTS:
            self.tell()

    def tell(self) -> None:
        """Tell what has not been told."""
        if not self._unread:
            return
        training, method, run = self._training, self._method, self._run
        step, steps = training.step, method.max_train_steps
        losses = self._read()
        # Reading waits for the device.
        now = time.perf_counter()
        pictures = method.train_batch_size * method.gradient_accumulation_steps * run.share.of
        run.tell(
            events.Step(
                step=step,
                steps=steps,
                loss=round(sum(losses) / len(losses), 6),
                learning_rate=training.schedule.get_last_lr()[0],
                images_per_second=round((step - self._reported) / (now - self._last) * pictures, 3),
                seconds_left=round((steps - step) * (now - self._started) / (step - self._first), 1),
            )
        )
        self._reported, self._last = step, now

    def _read(self) -> list[float]:
        losses: list[float] = torch.stack([loss for _, loss, _ in self._unread]).tolist()
        for (step, _, names), loss in zip(self._unread, losses, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss was {loss} at step {step} ({', '.join(dict.fromkeys(names))}): the run has diverged and "
                    "nothing was saved. Lower --learning-rate, or use --mixed-precision bf16 (or no) if it was fp16."
                )
        self._unread.clear()
        last_tenth = max(1, self._method.max_train_steps // 10)
        self._training.losses = (self._training.losses + losses)[-last_tenth:]
        return losses
