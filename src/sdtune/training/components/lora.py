"""LoRA on a UNet: attach it, and write it so that it loads everywhere."""

from __future__ import annotations

import time

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.methods.fields import LoraFields
from sdtune.training.components.data import CachedImages
from sdtune.training.components.export import kohya_metadata, write_diffusers_lora, write_kohya_lora
from sdtune.training.components.import_lora import read_lora
from sdtune.training.components.lora_weights import collect_lora, lora_change
from sdtune.training.components.models import Parts
from sdtune.training.run import Run

SMALLEST_CHANGE = 6e-8
"""Of a weight, in float16, the type of files for drawing: what is smaller is zero there."""


def attach_lora(parts: Parts, method: LoraFields) -> list[torch.nn.Parameter]:
    """Put a LoRA on the UNet's target modules; its parameters, in float32.

    The up matrices start at zero, so the model draws as before until the first step.
    """
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=list(method.target_modules),
    )
    try:
        parts.unet.add_adapter(config)
    except ValueError as error:
        raise TrainingError(
            f"target_modules: {', '.join(method.target_modules)} match no layer of the UNet that can have a LoRA; "
            f"to_q, to_k, to_v and to_out.0 are its attention. PEFT said: {error}"
        ) from None
    # Adapters are created in the type of the layer they sit on; updates smaller than bfloat16 resolves would be lost.
    cast_training_params(parts.unet, dtype=torch.float32)
    return [parameter for parameter in parts.unet.parameters() if parameter.requires_grad]


def save_lora(parts: Parts, method: DreamBoothLora, run: Run, images: CachedImages) -> float:
    """Write the LoRA in both forms; the largest entry of its weight deltas, as read back from the file.

    TrainingError if the file would change nothing: a run that learned nothing has not succeeded.
    """
    run.tell(events.Phase("save", "Saving the LoRA"))
    weights = collect_lora(parts.unet)
    pictures_per_step = method.train_batch_size * method.gradient_accumulation_steps
    metadata = kohya_metadata(
        family=parts.family,
        v_prediction=parts.v_prediction,
        title=run.output.name,
        base_model=method.base_model,
        rank=method.rank,
        alpha=method.alpha,
        resolution=images.resolution,
        steps=method.max_train_steps,
        epochs=max(1, method.max_train_steps * pictures_per_step // sum(images.repeats)),
        learning_rate=method.learning_rate,
        optimizer="AdamW",
        batch_size=method.train_batch_size,
        num_train_images=sum(images.repeats),
        started_at=run.started,
        finished_at=time.time(),
        seed=method.seed,
        captions=images.captions,
        trigger_words=[method.instance_prompt],
        more={
            "gradient_accumulation_steps": method.gradient_accumulation_steps,
            "lr_scheduler": method.lr_scheduler,
            "lr_warmup_steps": method.lr_warmup_steps,
            "max_grad_norm": method.max_grad_norm,
            "min_snr_gamma": method.snr_gamma,
            "mixed_precision": run.mixed_precision,
            "network_dropout": method.lora_dropout,
            "noise_offset": method.noise_offset,
        },
    )
    change = lora_change(weights)
    if change < SMALLEST_CHANGE:
        raise TrainingError(
            "the LoRA is zero: nothing was learned, so nothing was saved. "
            f"Train longer than {method.max_train_steps} steps or raise --learning-rate {method.learning_rate}."
        )
    lora = write_diffusers_lora(weights, run.output)
    kohya_lora = write_kohya_lora(weights, run.output / f"{run.output.name}.safetensors", parts.family, metadata)
    run.tell(events.Artifact("lora", str(lora)))
    run.tell(events.Artifact("kohya_lora", str(kohya_lora)))
    return lora_change(read_lora(lora))
