"""``python -m sdtune.training.kohya.launcher sd|sdxl SETUP OPTIONS``: sd-scripts' LoRA trainer, telling how it goes.

Runs in the folder and in the Python of sd-scripts, so it imports nothing of sdtune but events and errors, which need
no library, and measure.py. Nothing of sd-scripts is patched: its NetworkTrainer is subclassed at the methods it has for
that, and constants of the UNet it builds are set to the base model's before it does.
"""

from __future__ import annotations

import importlib
import json
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtune.errors import INTERRUPTED, SdtuneError, TrainingError
from sdtune.events import Failed, Phase, Step, emit
from sdtune.training.kohya.measure import HeldOutLoss, Scene, is_first, tell

SCRIPTS = {"sd": ("train_network", "NetworkTrainer"), "sdxl": ("sdxl_train_network", "SdxlNetworkTrainer")}
AVERAGE_MARK = '{"avr_loss": '
"""How a line begins that tells sd-scripts' own moving average, for which there is no event."""
SECONDS_BETWEEN_REPORTS = 1.0
STEPS_TO_JUDGE_SPEED = 3
SAMPLED_VAE_SCALE = 0.18215
"""What the pipeline that draws Stable Diffusion's samples divides latents by, whatever the VAE says."""
BUCKET_STEPS = 64
"""What NetworkTrainer asks of Stable Diffusion's buckets, for a UNet of four blocks."""


@dataclass(frozen=True)
class Setup:
    """What sd-scripts has no option for; SETUP is a JSON file of it.

    unet_constants, vae_scale_factor, bucket_steps: the base model's ``Shape``. held_out, captions: the file and the
    captions of ``write_held_out``; held_out_every: 0 measures before and after training.
    """

    unet_constants: Mapping[str, Any]
    vae_scale_factor: float | None
    bucket_steps: int
    held_out: str
    captions: Sequence[str]
    held_out_every: int


def main(argv: Sequence[str]) -> int:
    """Train; the exit code. Errors of ours are told as events, all others end with a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    module_name, class_name = SCRIPTS[argv[0]]
    script = importlib.import_module(module_name)
    train_util = importlib.import_module("library.train_util")
    setup = Setup(**json.loads(Path(argv[1]).read_text(encoding="utf-8")))
    parser = script.setup_parser()
    args = parser.parse_args(argv[2:])
    train_util.verify_command_line_training_args(args)
    try:
        set_constants(importlib.import_module("library.original_unet"), setup.unet_constants)
        reporting(getattr(script, class_name), setup)().train(args)
    except SdtuneError as error:
        emit(Failed(kind=error.kind, text=str(error)))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def set_constants(module: Any, constants: Mapping[str, Any]) -> None:
    """Make ``module`` build another UNet. TrainingError: it has no such constant, so that would change nothing."""
    for name, value in constants.items():
        if not hasattr(module, name):
            raise TrainingError(
                f"{module.__name__} of this copy of sd-scripts has no {name}, which the base model's shape is told by; "
                "use the commit in containers/kohya/SD_SCRIPTS_COMMIT."
            )
        setattr(module, name, value)


def reporting(trainer: type[Any], setup: Setup) -> type[Any]:
    """``trainer``, a NetworkTrainer of sd-scripts, that says what it does."""

    class Reporting(trainer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            if setup.vae_scale_factor is not None:
                self.vae_scale_factor = setup.vae_scale_factor

        def assert_extra_args(self, args: Any, train_dataset_group: Any, val_dataset_group: Any) -> None:
            # Of Stable Diffusion this looks at the steps alone, and wants those of a UNet of four blocks.
            if setup.bucket_steps % BUCKET_STEPS == 0:
                super().assert_extra_args(args, train_dataset_group, val_dataset_group)

        def load_target_model(self, args: Any, weight_dtype: Any, accelerator: Any) -> Any:
            tell(Phase("load", "Loading the base model"))
            self.weight_dtype = weight_dtype
            loaded = super().load_target_model(args, weight_dtype, accelerator)
            if args.cache_latents:
                tell(Phase("cache", "Encoding the pictures"))
            return loaded

        def post_process_network(
            self, args: Any, accelerator: Any, network: Any, text_encoders: Any, unet: Any
        ) -> None:
            super().post_process_network(args, accelerator, network, text_encoders, unet)
            pictures = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
            self.network, self.reporter = network, Reporter(args.max_train_steps, pictures)

        def sample_images(self, accelerator: Any, args: Any, epoch: int | None, global_step: int, *models: Any) -> None:
            # Called before the first step with epoch 0, after each step without an epoch, and at the end of each epoch.
            self.due = not epoch and self._sampling_is_due(args, global_step)
            self.scene = Scene(accelerator, args, *models)
            if global_step == 0:
                self._draw_if_due(global_step)
                self.held_out = HeldOutLoss(setup.held_out, setup.captions, self, self.scene)
                self.held_out.measure(step=0)
                tell(Phase("train", f"Training {args.max_train_steps} steps"))
                self.reporter.start()

        def _draw_if_due(self, global_step: int) -> None:
            """Draw what sample_images was asked for; after a step that is put off until the step has been told."""
            if not self.due:
                return
            self.due = False
            args = self.scene.args
            when = f"after step {global_step}" if global_step else "before training"
            tell(Phase("sample", f"Drawing samples {when}"))
            started, training, every = time.perf_counter(), self.network.training, args.sample_every_n_steps
            args.sample_every_n_steps = global_step or every
            self.network.eval()
            self._draw(global_step, *self.scene)
            self.network.train(training)
            args.sample_every_n_steps = every
            self.reporter.pause(time.perf_counter() - started)
            if 0 < global_step < args.max_train_steps:
                tell(Phase("train", f"Training on, to step {args.max_train_steps}"))

        def _draw(
            self, global_step: int, accelerator: Any, args: Any, device: Any, vae: Any, tokenizers: Any, *models: Any
        ) -> None:
            if setup.vae_scale_factor in (None, SAMPLED_VAE_SCALE):
                super().sample_images(accelerator, args, None, global_step, device, vae, tokenizers, *models)
                return
            train_util = importlib.import_module("library.train_util")
            pipeline = with_vae_scale(train_util.StableDiffusionLongPromptWeightingPipeline, setup.vae_scale_factor)
            train_util.sample_images_common(
                pipeline, accelerator, args, None, global_step, device, vae, tokenizers[0], *models
            )

        def _measure_if_due(self, global_step: int) -> None:
            every = setup.held_out_every
            if global_step == self.reporter.steps or (every and global_step % every == 0):
                started = time.perf_counter()
                self.held_out.measure(global_step)
                self.reporter.pause(time.perf_counter() - started)

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
            if self.reporter.add(global_step, logs["loss/current"], logs["loss/average"], logs["lr"]):
                self._draw_if_due(global_step)
                self._measure_if_due(global_step)

        def accelerator_logging(self, *args: Any, **named: Any) -> None:
            """Not to sd-scripts' own trackers: step_logging tells the run."""

    return Reporting


def with_vae_scale(pipeline: type[Any], vae_scale_factor: float) -> type[Any]:
    """``pipeline``, that of sd-scripts' samples, for latents of another scale than Stable Diffusion's."""

    class Scaled(pipeline):  # type: ignore[misc]
        def decode_latents(self, latents: Any) -> Any:
            return super().decode_latents(latents * (SAMPLED_VAE_SCALE / vae_scale_factor))

    return Scaled


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
        now = time.perf_counter()
        if step in (STEPS_TO_JUDGE_SPEED, self.steps) or now - self.last_report >= SECONDS_BETWEEN_REPORTS:
            self._report(step, average, learning_rate, now)
        return True

    def _report(self, step: int, average: float, learning_rate: float, now: float) -> None:
        last = self.losses[self._reported :]
        tell(
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
        if is_first():
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()
        self._reported, self.last_report = step, now


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
