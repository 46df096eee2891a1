"""Sample pictures: the same prompts and the same noise before, during and after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from sdtune import events
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.contact_sheet import contact_sheet
from sdtune.training.components.data import CachedImages, open_square
from sdtune.training.components.models import Parts
from sdtune.training.run import Run


class Samples:
    """The samples of one run, kept by the step they were drawn after."""

    def __init__(self, parts: Parts, method: TrainingFields, run: Run) -> None:
        self.parts, self.method, self.run = parts, method, run
        self.prompts = method.sample_prompts() if method.num_samples else ()
        self.drawn: dict[int, list[list[Image.Image]]] = {}

    def draw(self, step: int) -> None:
        """Draw every prompt, unless there is none, and write the pictures."""
        if not self.prompts:
            return
        count = len(self.prompts) * self.method.num_samples
        when = "before training" if step == 0 else f"after step {step}"
        self.run.tell(events.Phase("sample", f"Drawing {count} pictures {when}"))
        self.drawn[step] = draw(self.parts, self.prompts, self.method, self.run)
        self.run.save_samples(step, self.prompts, self.drawn[step])

    def draw_if_due(self, step: int) -> None:
        """Draw every ``sample_every`` steps; the last step's samples are drawn when the result is safe."""
        every = self.method.sample_every
        if every and step % every == 0 and step < self.method.max_train_steps:
            self.draw(step)

    def save_contact_sheet(self, images: CachedImages) -> None:
        """Write the training pictures and the first and last samples as one picture."""
        if not self.prompts:
            return
        steps = sorted(self.drawn)
        labels = {steps[0]: "before", steps[-1]: "after"}
        sheet = contact_sheet(
            f"{self.run.output.name}: {self.method.name}, {steps[-1]} steps",
            [open_square(path, images.resolution) for path in images.paths],
            [
                (f"“{prompt}”", [(labels.get(step, f"step {step}"), self.drawn[step][number]) for step in steps])
                for number, prompt in enumerate(self.prompts)
            ],
        )
        self.run.save_picture("contact_sheet", "contact_sheet.png", sheet)


@torch.no_grad()
def draw(parts: Parts, prompts: Sequence[str], method: TrainingFields, run: Run) -> list[list[Image.Image]]:
    """``num_samples`` pictures of each prompt. Picture i of a prompt starts from the same noise at every call."""
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=DPMSolverMultistepScheduler.from_config(parts.noise_scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    side = method.resolution or parts.resolution
    total = len(prompts) * method.sample_steps
    done = 0

    def report(pipeline: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        run.tell(events.Progress("sample", done, total))
        return tensors

    training = parts.unet.training
    parts.unet.eval()
    rows = []
    for prompt in prompts:
        with run.accelerator.autocast():
            drawn = pipeline(
                [prompt] * method.num_samples,
                height=side,
                width=side,
                num_inference_steps=method.sample_steps,
                guidance_scale=method.guidance_scale,
                # Noise from the CPU: the same picture on every device.
                generator=[torch.Generator().manual_seed(method.seed + i) for i in range(method.num_samples)],
                callback_on_step_end=report,
            )
        rows.append(drawn.images)
    parts.unet.train(training)
    return rows
