"""Run: what surrounds one training: its folders, its device, its voice."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from sdtune import __version__, events
from sdtune.errors import TrainingError
from sdtune.methods.base import MARK, RECIPE_FILE
from sdtune.methods.fields import CommonFields
from sdtune.training import interrupts
from sdtune.training.components.files import publish
from sdtune.training.components.processes import Share

LOGS = "logs"
SAMPLES = "samples"
MOST_WAITING = timedelta(hours=2)
"""The other processes wait while the first draws samples or class pictures."""


@dataclass
class Run:
    """One training run: where it reads and writes, what it computes on, how it tells."""

    dataset: Path
    output: Path
    accelerator: Any
    tensorboard: SummaryWriter | None
    started: float = field(default_factory=time.time)

    @classmethod
    @contextmanager
    def open(cls, method: CommonFields, dataset: Path, output: Path) -> Iterator[Run]:
        """A run that writes to ``output``; what an earlier run left there of samples and curves is replaced."""
        interrupts.listen()
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        # split_batches: a step of the schedule is a step of all processes together.
        accelerator = Accelerator(
            mixed_precision=mixed_precision(method.mixed_precision),
            cpu=not torch.cuda.is_available(),
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=MOST_WAITING)],
        )
        with ExitStack() as opened:
            tensorboard = None
            if accelerator.is_main_process:
                try:
                    _make_ready(output)
                    tensorboard = opened.enter_context(SummaryWriter(output / LOGS))
                except OSError as error:
                    raise TrainingError(
                        f"output: {output} cannot be written ({error}); choose another --output."
                    ) from None
            yield cls(dataset, output, accelerator, tensorboard)
            # Not after an error: the others may hang in an exchange that will not come.
            accelerator.end_training()

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def share(self) -> Share:
        """Which of the processes that train together this is; the first alone tells, draws and writes."""
        return Share(self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def is_first(self) -> bool:
        return self.share.number == 0

    @property
    def mixed_precision(self) -> str:
        """What ``auto`` became: no, fp16 or bf16."""
        return str(self.accelerator.mixed_precision)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of the frozen weights. Trainable ones are float32 always."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.mixed_precision, torch.float32)

    def tell(self, event: events.Event) -> None:
        """Say it on standard output, and draw it in TensorBoard where it is a number."""
        if not self.is_first:
            return
        events.emit(event)
        if isinstance(event, events.Step):
            self.draw_scalar("train/loss", event.loss, event.step)
            self.draw_scalar("train/learning_rate", event.learning_rate, event.step)
            self.draw_scalar("train/images_per_second", event.images_per_second, event.step)
        elif isinstance(event, events.Measure):
            self.draw_scalar(event.name, event.value, event.step)

    def draw_scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve in TensorBoard."""
        if self.tensorboard:
            with interrupts.held():
                self.tensorboard.add_scalar(name, value, step)

    def save_samples(self, step: int, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> None:
        """Write the pictures of each prompt, drawn after ``step`` steps, as PNG files and into TensorBoard."""
        for number, (prompt, row) in enumerate(zip(prompts, pictures, strict=True)):
            for sample, picture in enumerate(row):
                path = self.output / SAMPLES / f"step-{step:06d}" / f"prompt-{number}-sample-{sample}.png"
                with publish(path) as temporary:
                    picture.save(temporary, format="PNG")
                if self.tensorboard:
                    with interrupts.held():
                        self.tensorboard.add_image(
                            f"samples/{number}-{sample} {prompt}", _pixels(picture), step, dataformats="HWC"
                        )

    def save_picture(self, kind: str, name: str, picture: Image.Image) -> None:
        """Write one picture of the result."""
        with publish(self.output / name) as temporary:
            picture.save(temporary, format="PNG")
        self.tell(events.Artifact(kind, str(self.output / name)))

    def finish(self, method: CommonFields, loss: float, change: float) -> None:
        """Write the recipe, which comes last (an output folder that has one holds a finished run), and say so."""
        self.tell(events.Artifact("tensorboard", str(self.output / LOGS)))
        self._save_recipe(method)
        seconds = round(time.time() - self.started, 1)
        self.tell(events.Finished(seconds=seconds, steps=method.max_train_steps, loss=loss, change=change))

    def _save_recipe(self, method: CommonFields) -> None:
        used = {"method": method.name, **method.settings()}
        text = (
            f"# What sdtune {__version__} trained {self.output.name!r} with. Train the same again with\n"
            f"#   sdtune train {method.name} --config recipe.yaml --dataset DIR --output DIR\n"
            + yaml.safe_dump(used, sort_keys=False, allow_unicode=True)
        )
        with publish(self.output / RECIPE_FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self.tell(events.Artifact("recipe", str(self.output / RECIPE_FILE)))


def mixed_precision(setting: str) -> str:
    """``auto`` resolved for this machine; anything else as it is."""
    if setting != "auto":
        return setting
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _make_ready(output: Path) -> None:
    """The folder made and marked as ours, and what an earlier run left of samples and curves removed."""
    output.mkdir(parents=True, exist_ok=True)
    # Until this run has ended, the folder holds no finished one.
    (output / RECIPE_FILE).unlink(missing_ok=True)
    (output / MARK).write_text(f"The output of a run of sdtune {__version__}.\n", encoding="utf-8")
    _remove_what_was_drawn(output)


def _remove_what_was_drawn(output: Path) -> None:
    """The curves and samples of an earlier run, and nothing else that may lie there."""
    for curve in (output / LOGS).glob("events.out.tfevents.*"):
        curve.unlink()
    for drawn in (output / SAMPLES).glob("step-*"):
        shutil.rmtree(drawn)


def _pixels(picture: Image.Image) -> Any:
    import numpy

    return numpy.asarray(picture)
