"""``python -m sdtune.training.kohya.launcher sd|sdxl SETUP OPTIONS``: sd-scripts' LoRA trainer, telling how it goes.

Runs in the folder and in the Python of sd-scripts, so it imports nothing of sdtune but what needs torch and safetensors
alone. Nothing of sd-scripts is patched: its NetworkTrainer is subclassed at the methods it has for that, what it trains
with is watched where accelerate prepares it, and constants of the UNet it builds are set to the base model's before it
does.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdtune.errors import INTERRUPTED, SdtuneError, TrainingError
from sdtune.events import Failed, Phase, emit
from sdtune.training import interrupts
from sdtune.training.kohya.measure import HeldOutLoss, Scene, is_first, tell
from sdtune.training.kohya.moving import Moving
from sdtune.training.kohya.orders import BEGIN, SAVE, SAVED, STEP, Orders
from sdtune.training.kohya.reporter import Reporter
from sdtune.training.kohya.state import drawing_apart, read_state, write_state

SCRIPTS = {"sd": ("train_network", "NetworkTrainer"), "sdxl": ("sdxl_train_network", "SdxlNetworkTrainer")}
SAMPLED_VAE_SCALE = 0.18215
"""What the pipeline that draws Stable Diffusion's samples divides latents by, whatever the VAE says."""
BUCKET_STEPS = 64
"""What NetworkTrainer asks of Stable Diffusion's buckets, for a UNet of four blocks."""


@dataclass(frozen=True)
class Setup:
    """What sd-scripts has no option for; SETUP is a JSON file of it.

    unet_constants, vae_scale_factor, bucket_steps: the base model's ``Shape``. held_out, captions: the file and the
    captions of ``write_held_out``; held_out_every: 0 measures before and after training. state: the file by which a
    training's state comes and goes. goes_on: at the step that it holds when training begins; owes: what follows on that
    step was not done. draws_first: samples before the first step, if any at all.
    """

    unet_constants: Mapping[str, Any]
    vae_scale_factor: float | None
    bucket_steps: int
    held_out: str
    captions: Sequence[str]
    held_out_every: int
    state: str
    goes_on: bool
    owes: bool
    draws_first: bool


def main(argv: Sequence[str]) -> int:
    """Train; the exit code. Errors of ours are told as events, all others end with a traceback."""
    # The order to stop comes as SIGINT from this very process; SIGTERM ends it at once, for all that could be lost is
    # in a checkpoint by then.
    interrupts.listen()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    orders = Orders() if is_first() else None
    module_name, class_name = SCRIPTS[argv[0]]
    script = importlib.import_module(module_name)
    train_util = importlib.import_module("library.train_util")
    setup = Setup(**json.loads(Path(argv[1]).read_text(encoding="utf-8")))
    parser = script.setup_parser()
    args = parser.parse_args(argv[2:])
    train_util.verify_command_line_training_args(args)
    try:
        set_constants(importlib.import_module("library.original_unet"), setup.unet_constants)
        reporting(getattr(script, class_name), setup, orders)().train(args)
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


def reporting(trainer: type[Any], setup: Setup, orders: Orders | None) -> type[Any]:
    """``trainer``, a NetworkTrainer of sd-scripts, that says what it does, and is told what to do after each step.

    orders: None if another process asks for them.
    """

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
            self.weight_dtype, self.moving = weight_dtype, Moving(accelerator, args.seed)
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
            self.held = ExitStack()

        def sample_images(self, accelerator: Any, args: Any, epoch: int | None, global_step: int, *models: Any) -> None:
            # Called before the first step with epoch 0, after each step without an epoch, and at the end of each epoch.
            self.due = not epoch and self._sampling_is_due(args, global_step)
            self.scene = Scene(accelerator, args, *models)
            if global_step == 0:
                self.due &= setup.draws_first
                self._draw_if_due(global_step)
                self.held_out = HeldOutLoss(setup.held_out, setup.captions, self, self.scene)
                if not setup.goes_on:
                    self.held_out.measure(step=0)
                accelerator.wait_for_everyone()
                tell(Phase("train", f"Training {args.max_train_steps} steps"))
                self._ask(BEGIN)
                if setup.goes_on:
                    self.moving.go_on(read_state(Path(setup.state)))
                # From here on a signal waits for the end of a step.
                self.held.enter_context(interrupts.held())
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
            with drawing_apart():
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

        def process_batch(self, *args: Any, **named: Any) -> Any:
            return self.moving.noted_loss() if self.moving.passes_by else super().process_batch(*args, **named)

        def step_logging(self, accelerator: Any, logs: dict[str, Any], global_step: int, epoch: int) -> None:
            trained = not self.moving.passes_by
            self.moving.add(logs["loss/current"], epoch)
            ended = self.reporter.add(global_step, logs["loss/current"], logs["loss/average"], logs["lr"])
            if self.moving.arrives:
                self.moving.arrive()
                self.reporter.start()
                if global_step == self.reporter.steps:
                    # No step is made that would tell them.
                    self.reporter.tell_averages()
                if setup.owes:
                    self._follow_up(global_step)
            elif trained and ended:
                self.reporter.tell_if_due()
                self._follow_up(global_step)

        def _follow_up(self, global_step: int) -> None:
            """What follows on a step, and then what is to be done about checkpoints and signals."""
            whole, draws = True, self.due
            try:
                with interrupts.let_through():
                    self._draw_if_due(global_step)
                    self._measure_if_due(global_step)
            except KeyboardInterrupt:
                whole = False
            if draws:
                # Each process draws some, and all are looked at next.
                self.scene.accelerator.wait_for_everyone()
            started = time.perf_counter()
            if self._ask(STEP, step=global_step, whole=whole) == SAVE:
                self.reporter.tell()
                state = self.moving.state_dict(global_step)
                if is_first():
                    write_state(Path(setup.state), state)
                self._ask(SAVED)
                self.reporter.pause(time.perf_counter() - started)
            if global_step == self.reporter.steps:
                self.held.close()

        def _ask(self, asks: str, **about: Any) -> str:
            """What the process that started this one wants, the same for all that train together."""
            order = orders.ask(asks, **about) if orders else ""
            accelerator = self.scene.accelerator
            if accelerator.num_processes == 1:
                return order
            saves = torch.tensor(order == SAVE, dtype=torch.int64, device=accelerator.device)
            torch.distributed.broadcast(saves, 0)
            return SAVE if saves.item() else ""

        def accelerator_logging(self, *args: Any, **named: Any) -> None:
            """Not to sd-scripts' own trackers: step_logging tells the run."""

    return Reporting


def with_vae_scale(pipeline: type[Any], vae_scale_factor: float) -> type[Any]:
    """``pipeline``, that of sd-scripts' samples, for latents of another scale than Stable Diffusion's."""

    class Scaled(pipeline):  # type: ignore[misc]
        def decode_latents(self, latents: Any) -> Any:
            return super().decode_latents(latents * (SAMPLED_VAE_SCALE / vae_scale_factor))

    return Scaled


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
