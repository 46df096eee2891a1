"""Text-to-image: all weights of the UNet learn from captioned pictures."""

from __future__ import annotations

from functools import partial

import torch

from sdtune.methods.text_to_image import TextToImage
from sdtune.training.components.batches import Draws
from sdtune.training.components.data import cache_images
from sdtune.training.components.dataset import first_captions, read_dataset
from sdtune.training.components.held_out import HeldOutLoss
from sdtune.training.components.loop import Training, fit
from sdtune.training.components.loss import diffusion_loss
from sdtune.training.components.models import load_parts
from sdtune.training.components.rehearsal import rehearse
from sdtune.training.components.sampling import Samples
from sdtune.training.components.text import Captions
from sdtune.training.components.whole_model import WholeModel
from sdtune.training.run import Run


def train(method: TextToImage, run: Run) -> None:
    """Train the model and leave it in ``run.output`` as a diffusers folder, with samples and the recipe."""
    torch.manual_seed(method.seed)
    parts = load_parts(method, run, trained=["unet"])
    pictures, apart = read_dataset(method, run)
    prompts = first_captions(pictures)
    method = method.resolved(resolution=parts.resolution, mixed_precision=run.mixed_precision, prompts=prompts)

    captions = Captions(parts, method, [*pictures, *apart], run)
    images = cache_images(pictures, captions, parts, method, run, method.proportion_empty_prompts)
    draws = Draws(images, captions, parts, method, run.share)
    measured = cache_images(apart, captions, parts, method, run) if apart else images
    held_out = HeldOutLoss(parts, measured, captions, method, run)

    whole = WholeModel(parts, method, ["unet"], run)
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
