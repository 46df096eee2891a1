"""Sample pictures: the same prompts and the same noise before, during and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from sdtune import events
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.contact_sheet import MOST_TRAINING_PICTURES, contact_sheet
from sdtune.training.components.data import CachedImages
from sdtune.training.components.dataset import open_cut
from sdtune.training.components.models import Parts, pipeline_of
from sdtune.training.components.text import encode
from sdtune.training.run import Run


class Samples:
    """The samples of one run, kept by the step they were drawn after."""

    def __init__(self, parts: Parts, method: TrainingFields, run: Run) -> None:
        self.parts, self.method, self.run = parts, method, run
        self.prompts = method.sample_prompts() if method.num_samples and run.is_first else ()
        self.drawn: dict[int, list[list[Image.Image]]] = {}
        self._recall()

    def _recall(self) -> None:
        """Those that were drawn before the run was stopped, as far as the same are wanted now."""
        for step, rows in list(self.run.record.samples.items()):
            if list(rows) == list(self.prompts) and {len(row) for row in rows.values()} == {self.method.num_samples}:
                self.drawn[step] = [[_opened(self.run.output / name) for name in row] for row in rows.values()]
            else:
                del self.run.record.samples[step]

    def draw(self, step: int) -> None:
        """Draw every prompt, unless there is none or that was done, and write the pictures."""
        if not self.prompts or step in self.drawn:
            return
        count = len(self.prompts) * self.method.num_samples
        when = "before training" if step == 0 else f"after step {step}"
        self.run.tell(events.Phase("sample", f"Drawing {count} pictures {when}"))
        total = len(self.prompts) * self.method.sample_steps
        done = 0

        def report() -> None:
            nonlocal done
            done += 1
            self.run.tell(events.Progress("sample", done, total))

        seeds = [self.method.seed + i for i in range(self.method.num_samples)]
        self.drawn[step] = [draw(self.parts, prompt, seeds, self.method, self.run, report) for prompt in self.prompts]
        self.run.save_samples(step, self.prompts, self.drawn[step])

    def draw_if_due(self, step: int) -> None:
        """Draw every ``sample_every`` steps; the last step's samples are drawn when the result is safe."""
        every = self.method.sample_every
        if every and step % every == 0 and step < self.method.max_train_steps:
            self.draw(step)

    def save_contact_sheet(self, images: CachedImages) -> None:
        """Write the training pictures and all samples as one picture."""
        if not self.prompts:
            return
        steps = sorted(self.drawn)
        labels = {steps[0]: "before", steps[-1]: "after"}
        shown = list(zip(images.pictures, images.shapes, strict=True))[:MOST_TRAINING_PICTURES]
        sheet = contact_sheet(
            f"{self.run.output.name}: {self.method.name}, {steps[-1]} steps",
            [open_cut(picture.path, shape) for picture, shape in shown],
            [
                (f"“{prompt}”", [(labels.get(step, f"step {step}"), self.drawn[step][number]) for step in steps])
                for number, prompt in enumerate(self.prompts)
            ],
        )
        self.run.save_picture("contact_sheet", "contact_sheet.png", sheet)


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


@torch.no_grad()
def draw(
    parts: Parts,
    prompt: str,
    seeds: Sequence[int],
    method: TrainingFields,
    run: Run,
    report: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """One picture of ``prompt`` per seed, in one batch. The same seed is the same noise at every call.

    report: called after each denoising step.
    """
    side = method.resolution or parts.resolution

    def after_step(pipe: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        report()
        return tensors

    pipeline = pipeline_of(parts, scheduler=DPMSolverMultistepScheduler.from_config(parts.noise_scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    with parts.evaluating(), parts.at_work(parts.vae, *parts.text_encoders):
        with parts.computing(run):
            wanted, unwanted = encode(parts, method, [prompt]), encode(parts, method, [""])
            embeddings = {
                name: tensor.expand(len(seeds), *tensor.shape[1:])
                for conditioning, prefix in ((wanted, ""), (unwanted, "negative_"))
                for name, tensor in ((prefix + key, value) for key, value in conditioning.pipeline_arguments.items())
            }
            latents: torch.Tensor = pipeline(
                **embeddings,
                height=side,
                width=side,
                num_inference_steps=method.sample_steps,
                guidance_scale=method.guidance_scale,
                latents=torch.cat([_noise(parts, side, seed) for seed in seeds]),
                callback_on_step_end=after_step,
                output_type="latent",
            ).images
        # One by one: each takes 3.5 GiB at 1024 px. Without autocast: half precision overflows in SDXL's VAE.
        return [_decode(parts, pipeline.image_processor, one) for one in torch.split(latents, 1)]


def _decode(parts: Parts, image_processor: Any, latents: torch.Tensor) -> Image.Image:
    """The picture of ``latents`` [1, 4, height / 8, width / 8], scaled as the UNet has them."""
    pixels = parts.vae.decode(latents.to(parts.vae.dtype) / parts.vae.config.scaling_factor).sample
    picture: Image.Image = image_processor.postprocess(pixels, output_type="pil")[0]
    return picture


def _noise(parts: Parts, side: int, seed: int) -> torch.Tensor:
    """[1, 4, height / 8, width / 8]. Drawn on the CPU in float32: the same for every device and precision."""
    shape = (1, parts.unet.config.in_channels, side // parts.vae_scale, side // parts.vae_scale)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(parts.unet.device, parts.unet.dtype)
