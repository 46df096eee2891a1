"""DreamBooth: all weights of the UNet, and the text encoder's if asked, learn one subject."""

from __future__ import annotations

import torch

from sdtune.methods.dreambooth import DreamBooth
from sdtune.training.components.data import cache_classes, cache_images, with_prior
from sdtune.training.components.dataset import read_dataset
from sdtune.training.components.held_out import HeldOutLoss
from sdtune.training.components.loop import fit
from sdtune.training.components.loss import diffusion_loss
from sdtune.training.components.models import load_parts
from sdtune.training.components.optim import build_optimizer
from sdtune.training.components.prior import class_pictures
from sdtune.training.components.sampling import Samples
from sdtune.training.components.text import Captions
from sdtune.training.components.whole_model import WholeModel
from sdtune.training.run import Run


def train(method: DreamBooth, run: Run) -> None:
    """Train the model and leave it in ``run.output`` as a diffusers folder, with samples and the recipe."""
    torch.manual_seed(method.seed)
    trained = ("unet", "text_encoder") if method.train_text_encoder else ("unet",)
    parts = load_parts(method, run, trained)
    pictures, apart = read_dataset(method, run, method.instance_prompt)
    method = method.resolved(resolution=parts.resolution, mixed_precision=run.mixed_precision)
    classes = class_pictures(method, parts, run)

    captions = Captions(parts, method, [*pictures, *apart, *classes], run, trained=method.train_text_encoder)
    images = cache_images(pictures, captions, parts, method, run)
    batches = images.batches(method.train_batch_size, torch.Generator().manual_seed(method.seed), run.share)
    if classes:
        priors = cache_classes(classes, images, captions, parts, method, run)
        order = torch.Generator().manual_seed(method.seed)
        batches = with_prior(batches, priors, method.train_batch_size, order, run.share)
    measured = cache_images(apart, captions, parts, method, run) if apart else images
    held_out = HeldOutLoss(parts, measured, captions, method, run)

    run.begin(method)
    samples = Samples(parts, method, run)
    samples.draw(step=0)
    held_out.measure(step=0)
    weights = WholeModel(parts, method, trained)
    optimizer, schedule = build_optimizer(weights.groups, method)
    noise = torch.Generator().manual_seed(method.seed + 1)
    loss = fit(
        lambda batch: diffusion_loss(parts, batch, captions, method, noise),
        parts, optimizer, schedule, batches, method, run,
        after_step=[weights.average, samples.draw_if_due, held_out.measure_if_due],
    )  # fmt: skip
    if not run.is_first:
        return
    change = weights.save(run)
    samples.draw(step=method.max_train_steps)
    samples.save_contact_sheet(images)
    run.finish(method, loss, change)
