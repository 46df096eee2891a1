"""``python -m sdtune.training.kohya.launcher sd|sdxl OPTIONS``: sd-scripts' own LoRA trainer, telling how it goes.

Runs in the folder and in the Python of sd-scripts, so it imports nothing of sdtune but events and errors, which need
no library. Nothing of sd-scripts is patched: its NetworkTrainer is subclassed at the methods it has for that.
"""

from __future__ import annotations

import importlib
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from sdtune.errors import SdtuneError, TrainingError
from sdtune.events import Failed, Phase, Step, emit

SCRIPTS = {"sd": ("train_network", "NetworkTrainer"), "sdxl": ("sdxl_train_network", "SdxlNetworkTrainer")}
INTERRUPTED = 130
AVERAGE_MARK = '{"avr_loss": '
"""How a line begins that tells sd-scripts' own moving average, for which there is no event."""
SECONDS_BETWEEN_REPORTS = 1.0
STEPS_TO_JUDGE_SPEED = 3


def main(argv: Sequence[str]) -> int:
    """Train; the exit code. Errors of ours are told as events, all others end with a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    module_name, class_name = SCRIPTS[argv[0]]
    script = importlib.import_module(module_name)
    train_util = importlib.import_module("library.train_util")
    parser = script.setup_parser()
    args = parser.parse_args(argv[1:])
    train_util.verify_command_line_training_args(args)
    try:
        reporting(getattr(script, class_name))().train(args)
    except SdtuneError as error:
        emit(Failed(kind=error.kind, text=str(error)))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def reporting(trainer: type[Any]) -> type[Any]:
    """``trainer``, a NetworkTrainer of sd-scripts, that says what it does."""

    class Reporting(trainer):  # type: ignore[misc]
        def load_target_model(self, args: Any, weight_dtype: Any, accelerator: Any) -> Any:
            emit(Phase("load", "Loading the base model"))
            loaded = super().load_target_model(args, weight_dtype, accelerator)
            if args.cache_latents:
                emit(Phase("cache", "Encoding the pictures"))
            return loaded

        def post_process_network(
            self, args: Any, accelerator: Any, network: Any, text_encoders: Any, unet: Any
        ) -> None:
            super().post_process_network(args, accelerator, network, text_encoders, unet)
            pictures = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
            self.network, self.reporter = network, Reporter(args.max_train_steps, pictures)

        def sample_images(
            self, accelerator: Any, args: Any, epoch: int | None, global_step: int, *rest: Any, **named: Any
        ) -> None:
            # Called before the first step with epoch 0, after each step without an epoch, and at the end of each epoch.
            self.due = None
            if not epoch and self._sampling_is_due(args, global_step):
                self.due = (accelerator, args, global_step, rest, named)
            if global_step == 0:
                self._draw_if_due()
                emit(Phase("train", f"Training {args.max_train_steps} steps"))
                self.reporter.start()

        def _draw_if_due(self) -> None:
            """Draw what sample_images was asked for; after a step that is put off until the step has been told."""
            if self.due is None:
                return
            accelerator, args, global_step, rest, named = self.due
            self.due = None
            when = f"after step {global_step}" if global_step else "before training"
            emit(Phase("sample", f"Drawing samples {when}"))
            started, training, every = time.perf_counter(), self.network.training, args.sample_every_n_steps
            args.sample_every_n_steps = global_step or every
            self.network.eval()
            super().sample_images(accelerator, args, None, global_step, *rest, **named)
            self.network.train(training)
            args.sample_every_n_steps = every
            self.reporter.pause(time.perf_counter() - started)
            if 0 < global_step < args.max_train_steps:
                emit(Phase("train", f"Training on, to step {args.max_train_steps}"))

        def _sampling_is_due(self, args: Any, global_step: int) -> bool:
            if args.sample_prompts is None:
                return False
            if global_step == 0:
                return bool(args.sample_at_first)
            return bool(global_step % args.sample_every_n_steps == 0 or global_step == args.max_train_steps)

        def generate_step_logs(
            self, args: Any, current_loss: float, avr_loss: float, lr_scheduler: Any, *rest: Any, **named: Any
        ) -> dict[str, Any]:
            logs: dict[str, Any] = super().generate_step_logs(
                args, current_loss, avr_loss, lr_scheduler, *rest, **named
            )
            # The UNet's rate is the last; where the optimizer finds the rate itself, that is told.
            rates = [value for name, value in logs.items() if name.startswith("lr/d*lr")] or lr_scheduler.get_last_lr()
            return {"loss/current": current_loss, "loss/average": avr_loss, "lr": float(rates[-1])}

        def step_logging(self, accelerator: Any, logs: dict[str, Any], global_step: int, epoch: int) -> None:
            if accelerator.is_main_process:
                self.reporter.add(global_step, logs["loss/current"], logs["loss/average"], logs["lr"])
            self._draw_if_due()

        def accelerator_logging(self, *args: Any, **named: Any) -> None:
            """Not to sd-scripts' own trackers: step_logging tells the run."""

    return Reporting


class Reporter:
    """From the losses of micro-batches to a step event each second."""

    def __init__(self, steps: int, pictures_per_step: int) -> None:
        self.steps, self.pictures_per_step = steps, pictures_per_step
        self.losses: list[float] = []
        self._batches: list[float] = []
        self._reported = 0
        self.start()

    def start(self) -> None:
        """Time runs from now."""
        self.started = self.last_report = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Time that did not go into training."""
        self.started += seconds
        self.last_report += seconds

    def add(self, step: int, loss: float, average: float, learning_rate: float) -> None:
        """A batch was computed; ``step``: optimizer steps made so far."""
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss was {loss} at step {len(self.losses) + 1}: the run has diverged and nothing was saved. "
                "Lower --learning-rate, or use --mixed-precision bf16 (or no) if it was fp16."
            )
        self._batches.append(loss)
        if step == len(self.losses):  # gradients are still being added up
            return
        self.losses.append(sum(self._batches) / len(self._batches))
        self._batches.clear()
        now = time.perf_counter()
        if step in (STEPS_TO_JUDGE_SPEED, self.steps) or now - self.last_report >= SECONDS_BETWEEN_REPORTS:
            self._report(step, average, learning_rate, now)

    def _report(self, step: int, average: float, learning_rate: float, now: float) -> None:
        last = self.losses[self._reported :]
        emit(
            Step(
                step=step,
                steps=self.steps,
                loss=round(sum(last) / len(last), 6),
                learning_rate=learning_rate,
                images_per_second=round(len(last) * self.pictures_per_step / max(now - self.last_report, 1e-9), 3),
                seconds_left=round((self.steps - step) * (now - self.started) / step, 1),
            )
        )
        last_tenth = self.losses[-max(1, self.steps // 10) :]
        told = {"avr_loss": round(average, 6), "step": step, "last_tenth": round(sum(last_tenth) / len(last_tenth), 6)}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        self._reported, self.last_report = step, now


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
