"""DreamBooth: all weights of the UNet, and the text encoder's if asked, learn one subject."""

from __future__ import annotations

from functools import partial

import torch

from sdtune.methods.dreambooth import DreamBooth
from sdtune.training.components.batches import Draws
from sdtune.training.components.data import cache_classes, cache_images
from sdtune.training.components.dataset import read_dataset
from sdtune.training.components.held_out import HeldOutLoss
from sdtune.training.components.loop import Training, fit
from sdtune.training.components.loss import diffusion_loss
from sdtune.training.components.models import load_parts
from sdtune.training.components.prior import class_pictures
from sdtune.training.components.rehearsal import rehearse
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
    priors = cache_classes(classes, images, captions, parts, method, run) if classes else None
    draws = Draws(images, captions, parts, method, run.share, priors)
    measured = cache_images(apart, captions, parts, method, run) if apart else images
    held_out = HeldOutLoss(parts, measured, captions, method, run)

    whole = WholeModel(parts, method, trained, run)
    training = Training(whole.weights, draws, method, run, whole.average)
    loss_of = partial(diffusion_loss, parts, captions, method)
    rehearse(loss_of, held_out, parts, training, method, run)
    run.begin(method)
    samples = Samples(parts, method, run)
    samples.draw(step=0)
    held_out.measure(step=0)
    loss = fit(loss_of, parts, training, method, run, after_step=[samples.draw_if_due, held_out.measure_if_due])
    if not run.is_first:
        return
    change = whole.save(run)
    samples.draw(step=method.max_train_steps)
    samples.save_contact_sheet(images)
    run.finish(method, loss, change)
