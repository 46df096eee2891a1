"""LoRA on a model: attach it, and write it so that it loads everywhere."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from safetensors.torch import load_file

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.methods.method_fields import DreamBoothFields, LoraFields, TextEncoderFields
from sdtune.methods.peft import PeftDreamBoothLora
from sdtune.methods.text_to_image import TextToImageLora
from sdtune.training.components.data import CachedImages
from sdtune.training.components.export import kohya_metadata, write_diffusers_lora, write_kohya_lora
from sdtune.training.components.files import publish
from sdtune.training.components.import_lora import read_lora
from sdtune.training.components.lora_weights import collect_lora, lora_change
from sdtune.training.components.models import Parts
from sdtune.training.components.weights import Group, Weights
from sdtune.training.run import Run

LoraMethod: TypeAlias = DreamBoothLora | TextToImageLora | PeftDreamBoothLora

SMALLEST_CHANGE = 6e-8
"""Of a weight, in float16, the type of files for drawing: what is smaller is zero there."""
TEXT_ENCODER_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
CONVOLUTIONS = ("conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv")
"""The UNet's 3x3 convolutions, by the end of their names; those of its input and output are left as they are."""
BIN_FILE = "pytorch_lora_weights.bin"


def attach_lora(parts: Parts, method: LoraMethod, run: Run) -> Weights:
    """Put a LoRA on the UNet's target modules, and on the text encoders' attention if they are trained.

    The up matrices start at zero, so the model draws as before until the first step.
    """
    options: dict[str, Any] = {
        "r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": method.lora_dropout,
        "use_dora": method.use_dora,
        "init_lora_weights": "gaussian",
    }
    targets, patterns = unet_targets(method)
    try:
        parts.unet.add_adapter(LoraConfig(**options, **patterns, target_modules=targets))
    except ValueError as error:
        raise TrainingError(
            f"target_modules: {', '.join(method.target_modules)} match no layer of the UNet that can have a LoRA; "
            f"to_q, to_k, to_v and to_out.0 are its attention. PEFT said: {error}"
        ) from None
    groups = [trainable(parts.unet, method.learning_rate)]
    if isinstance(method, TextEncoderFields) and method.train_text_encoder:
        for encoder in parts.text_encoders:
            encoder.to(parts.unet.device)
            encoder.add_adapter(LoraConfig(**options, target_modules=list(TEXT_ENCODER_MODULES)))
            groups.append(trainable(encoder, method.text_encoder_lr or method.learning_rate))
    return Weights(groups, torch.float32 if method.use_dora else run.weight_dtype)


def unet_targets(method: LoraFields) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Layers of the UNet that get an adapter, and PEFT's patterns for those that have another rank and alpha."""
    if method.conv_rank is None:
        return list(method.target_modules), {}
    alpha = float(method.conv_rank) if method.conv_alpha is None else method.conv_alpha
    patterns: dict[str, dict[str, float]] = {
        "rank_pattern": dict.fromkeys(CONVOLUTIONS, method.conv_rank),
        "alpha_pattern": dict.fromkeys(CONVOLUTIONS, alpha),
    }
    return [*method.target_modules, *CONVOLUTIONS], patterns


def trainable(model: Any, learning_rate: float) -> Group:
    """What is trained of ``model``, in float32, as a group for the optimizer."""
    # Adapters are created in the type of the layer they sit on; updates smaller than bfloat16 resolves would be lost.
    cast_training_params(model, dtype=torch.float32)
    return {"params": [one for one in model.parameters() if one.requires_grad], "lr": learning_rate}


def save_lora(parts: Parts, method: LoraMethod, run: Run, images: CachedImages) -> float:
    """Write the LoRA in both forms; the largest entry of its weight deltas, as read back from the file.

    TrainingError if the file would change nothing: a run that learned nothing has not succeeded.
    """
    trained = [encoder for encoder in parts.text_encoders if getattr(encoder, "peft_config", None)]
    weights = collect_lora(parts.unet, *trained)
    if lora_change(weights) < SMALLEST_CHANGE:
        raise TrainingError(
            "the LoRA is zero: nothing was learned, so nothing was saved. "
            f"Train longer than {method.max_train_steps} steps or raise --learning-rate {method.learning_rate}."
        )
    run.begin_saving("the LoRA")
    metadata = lora_metadata(parts, method, run, images)
    lora = write_diffusers_lora(weights, run.output, metadata=metadata)
    kohya_lora = run.output / f"{run.output.name}.safetensors"
    write_kohya_lora(weights, kohya_lora, parts.family, metadata)
    run.tell(events.Artifact("lora", str(lora)))
    run.tell(events.Artifact("kohya_lora", str(kohya_lora)))
    if method.save_bin:
        with publish(run.output / BIN_FILE) as temporary:
            torch.save(load_file(lora), temporary)
        run.tell(events.Artifact("bin", str(run.output / BIN_FILE)))
    return lora_change(read_lora(lora))


def _network_args(method: LoraMethod) -> str:
    """What goes beyond rank and alpha, as sd-scripts tells it: JSON of texts."""
    told = {"conv_dim": method.conv_rank, "conv_alpha": method.conv_alpha or method.conv_rank}
    return json.dumps({name: str(value) for name, value in told.items() if value is not None})


def lora_metadata(parts: Parts, method: LoraMethod, run: Run, images: CachedImages) -> dict[str, str]:
    """What the headers of the files tell of the run."""
    shown = sum(picture.repeats for picture in images.pictures)
    pictures_per_step = method.train_batch_size * method.gradient_accumulation_steps
    return kohya_metadata(
        family=parts.family,
        v_prediction=parts.v_prediction,
        title=run.output.name,
        base_model=method.base_model,
        rank=method.rank,
        alpha=method.alpha,
        resolution=method.resolution or parts.resolution,
        steps=method.max_train_steps,
        epochs=max(1, method.max_train_steps * pictures_per_step // shown),
        learning_rate=method.learning_rate,
        optimizer=method.optimizer,
        batch_size=method.train_batch_size,
        num_train_images=shown,
        seed=method.seed,
        captions=[picture.caption for picture in images.pictures],
        trigger_words=[method.instance_prompt] if isinstance(method, DreamBoothFields) else [],
        more={
            "clip_skip": method.clip_skip + 1 if method.clip_skip else None,
            "enable_bucket": method.enable_bucket,
            "gradient_accumulation_steps": method.gradient_accumulation_steps,
            "lr_scheduler": method.lr_scheduler,
            "lr_warmup_steps": method.lr_warmup_steps,
            "max_grad_norm": method.max_grad_norm,
            "max_token_length": method.max_token_length,
            "min_snr_gamma": method.snr_gamma,
            "mixed_precision": run.mixed_precision,
            "network_args": _network_args(method),
            "network_dropout": method.lora_dropout,
            "noise_offset": method.noise_offset,
            "zero_terminal_snr": method.rescale_betas_zero_snr,
        },
    )
