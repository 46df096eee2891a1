"""DreamBooth with LoRA: the UNet's attention learns one subject beside its frozen weights."""

from __future__ import annotations

import torch

from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.data import cache_images
from sdtune.training.components.loop import fit
from sdtune.training.components.lora import attach_lora, save_lora
from sdtune.training.components.loss import diffusion_loss
from sdtune.training.components.models import load_parts
from sdtune.training.components.optim import build_optimizer
from sdtune.training.components.sampling import Samples
from sdtune.training.run import Run


def train(method: DreamBoothLora, run: Run) -> None:
    """Train the adapter and leave it in ``run.output``, in both forms, with samples and the recipe."""
    torch.manual_seed(method.seed)
    parts = load_parts(method, run)
    method = method.resolved(resolution=method.resolution or parts.resolution, mixed_precision=run.mixed_precision)
    images = cache_images(method, run, parts, prompt=method.instance_prompt)

    adapters = attach_lora(parts, method)
    optimizer, schedule = build_optimizer(adapters, method)
    batches = images.batches(method.train_batch_size, torch.Generator().manual_seed(method.seed))
    noise = torch.Generator().manual_seed(method.seed + 1)

    samples = Samples(parts, method, run)
    samples.draw(step=0)
    parts.unet.train()
    fitted = fit(
        lambda batch: diffusion_loss(parts, batch, method, noise),
        adapters, optimizer, schedule, batches, method, run,
        after_step=samples.draw_if_due,
    )  # fmt: skip
    change = save_lora(parts, method, run, images)
    samples.draw(step=method.max_train_steps)
    samples.save_contact_sheet(images)
    run.finish(method, fitted.loss, change)
