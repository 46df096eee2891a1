"""What is told of the losses of a training inside sd-scripts. Its Python runs this."""

from __future__ import annotations

import json
import math
import sys
import time

from sdtune.errors import TrainingError
from sdtune.events import Step
from sdtune.training.kohya.measure import is_first, tell

AVERAGE_MARK = '{"avr_loss": '
"""How a line begins that tells sd-scripts' own moving average, for which there is no event."""
SECONDS_BETWEEN_REPORTS = 1.0
STEPS_TO_JUDGE_SPEED = 3


class Reporter:
    """From the losses of micro-batches to a step event each second."""

    def __init__(self, steps: int, pictures_per_step: int) -> None:
        self.steps, self.pictures_per_step = steps, pictures_per_step
        self.losses: list[float] = []
        self._batches: list[float] = []
        self._average = self._learning_rate = 0.0
        self.start()

    def start(self) -> None:
        """Time runs from now, and what was added by now has been told."""
        self.started = self.last_report = time.perf_counter()
        self._first = self._reported = len(self.losses)

    def pause(self, seconds: float) -> None:
        """Time that did not go into training."""
        self.started += seconds
        self.last_report += seconds

    def add(self, step: int, loss: float, average: float, learning_rate: float) -> bool:
        """A batch was computed; whether it ended a step. ``step``: optimizer steps made so far."""
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss was {loss} at step {len(self.losses) + 1}: the run has diverged and nothing was saved. "
                "Lower --learning-rate, or use --mixed-precision bf16 (or no) if it was fp16."
            )
        self._batches.append(loss)
        if step == len(self.losses):  # gradients are still being added up
            return False
        self.losses.append(sum(self._batches) / len(self._batches))
        self._batches.clear()
        self._average, self._learning_rate = average, learning_rate
        return True

    def tell_if_due(self) -> None:
        """Called after each step that was trained."""
        step = len(self.losses)
        first_estimate = step == self._first + STEPS_TO_JUDGE_SPEED
        if first_estimate or step == self.steps or time.perf_counter() - self.last_report >= SECONDS_BETWEEN_REPORTS:
            self.tell()

    def tell(self) -> None:
        """Tell what has not been told."""
        step, last = len(self.losses), self.losses[self._reported :]
        if not last:
            return
        now = time.perf_counter()
        tell(
            Step(
                step=step,
                steps=self.steps,
                loss=round(sum(last) / len(last), 6),
                learning_rate=self._learning_rate,
                images_per_second=round(len(last) * self.pictures_per_step / max(now - self.last_report, 1e-9), 3),
                seconds_left=round((self.steps - step) * (now - self.started) / (step - self._first), 1),
            )
        )
        self.tell_averages()
        self._reported, self.last_report = step, now

    def tell_averages(self) -> None:
        """sd-scripts' moving average of the loss, and the mean of the last tenth of all steps."""
        last_tenth = self.losses[-max(1, self.steps // 10) :]
        mean = sum(last_tenth) / len(last_tenth)
        told = {"avr_loss": round(self._average, 6), "step": len(self.losses), "last_tenth": round(mean, 6)}
        if is_first():
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()
