"""The argument list of sd-scripts: every setting of the method, and the folders of the run. No shell reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdtune.methods.kohya import KohyaDreamBoothLora, KohyaFields
from sdtune.training.components.lora_weights import Family
from sdtune.training.kohya.base import KohyaBase
from sdtune.training.kohya.dataset import StagedDataset

CAPTION_EXTENSION = ".txt"
SHORTEST_SIDE = 64
"""Of a bucket, as of a resolution."""


@dataclass(frozen=True)
class Places:
    """Where sd-scripts writes, all of it for this run alone. sample_prompts: None draws nothing."""

    output_dir: Path
    logging_dir: Path
    output_name: str
    sample_prompts: Path | None


def kohya_args(method: KohyaFields, base: KohyaBase, dataset: StagedDataset, places: Places) -> list[str]:
    """What train_network.py (sdxl_train_network.py for SDXL) is started with.

    method: with its resolution and mixed_precision resolved.
    """
    return [
        *_model(method, base),
        *_dataset(method, base, dataset),
        *_network(method),
        *_optimizer(method),
        *_training(method, base),
        *_output(method, places),
        *_value("metadata_trigger_phrase", ", ".join(dataset.trigger_words) or None),
    ]


def _model(method: KohyaFields, base: KohyaBase) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={base.path}",
        *_switch("v2", base.family is Family.SD2),
        *_switch("v_parameterization", base.v_parameterization),
        f"--tokenizer_cache_dir={base.tokenizers}",
        *_value("clip_skip", method.clip_skip),
        # 75 is the default, and not among the choices.
        *_value("max_token_length", method.max_token_length if method.max_token_length > 75 else None),
    ]


def _dataset(method: KohyaFields, base: KohyaBase, dataset: StagedDataset) -> list[str]:
    arguments = [
        *_value("dataset_config", dataset.dataset_config),
        *_value("train_data_dir", dataset.train_data_dir),
        *_value("in_json", dataset.in_json),
        f"--caption_extension={CAPTION_EXTENSION}",
        f"--resolution={method.resolution}",
        *_switch("shuffle_caption", method.shuffle_caption),
        *_value("keep_tokens", method.keep_tokens or None),
        *_value("caption_dropout_rate", method.caption_dropout_rate or None),
        *_switch("flip_aug", method.flip_aug),
        *_switch("random_crop", method.random_crop),
        *_switch("cache_latents", method.cache_latents),
        # With the latents cached a batch costs next to nothing, and processes would only cost their start.
        f"--max_data_loader_n_workers={0 if method.cache_latents else 2}",
        *_switch("persistent_data_loader_workers", not method.cache_latents),
        *_switch("enable_bucket", method.enable_bucket),
    ]
    if method.enable_bucket:
        buckets = method.buckets(method.resolution or 0, base.shape.bucket_steps)
        arguments += [
            f"--min_bucket_reso={max(SHORTEST_SIDE, buckets.shortest)}",
            f"--max_bucket_reso={buckets.longest}",
            f"--bucket_reso_steps={buckets.step}",
            *_switch("bucket_no_upscale", method.bucket_no_upscale),
        ]
    if isinstance(method, KohyaDreamBoothLora) and dataset.regularisation:
        arguments.append(f"--prior_loss_weight={method.prior_loss_weight}")
    return arguments


def _network(method: KohyaFields) -> list[str]:
    convolutions = []
    if method.conv_dim is not None:
        alpha = method.conv_dim if method.conv_alpha is None else method.conv_alpha
        convolutions = ["--network_args", f"conv_dim={method.conv_dim}", f"conv_alpha={float(alpha)}"]
    return [
        "--network_module=networks.lora",
        f"--network_dim={method.network_dim}",
        f"--network_alpha={method.alpha}",
        *_value("network_dropout", method.network_dropout or None),
        *_switch("network_train_unet_only", not method.train_text_encoder),
        *convolutions,
    ]


def _optimizer(method: KohyaFields) -> list[str]:
    # Left alone, AdaFactor finds its own rate and ours would be ignored.
    own = ["relative_step=False", "scale_parameter=False", "warmup_init=False"]
    arguments = [*(own if method.optimizer_type == "AdaFactor" else []), *method.optimizer_args]
    return [
        f"--optimizer_type={method.optimizer_type}",
        *(["--optimizer_args", *arguments] if arguments else []),
        f"--learning_rate={method.learning_rate}",
        *_value("unet_lr", method.unet_lr),
        *_value("text_encoder_lr", method.text_encoder_lr),
        f"--lr_scheduler={method.lr_scheduler}",
        f"--lr_warmup_steps={method.lr_warmup_steps}",
        f"--lr_scheduler_num_cycles={method.lr_scheduler_num_cycles}",
        f"--max_grad_norm={method.max_grad_norm}",
    ]


def _training(method: KohyaFields, base: KohyaBase) -> list[str]:
    return [
        f"--max_train_steps={method.max_train_steps}",
        f"--train_batch_size={method.train_batch_size}",
        f"--gradient_accumulation_steps={method.gradient_accumulation_steps}",
        *_switch("gradient_checkpointing", method.gradient_checkpointing),
        f"--mixed_precision={method.mixed_precision}",
        # SDXL's VAE overflows in half precision.
        *_switch("no_half_vae", base.family is Family.SDXL),
        "--sdpa",
        f"--seed={method.seed}",
        *_value("noise_offset", method.noise_offset or None),
        *_value("min_snr_gamma", method.min_snr_gamma),
        *_switch("zero_terminal_snr", method.zero_terminal_snr),
    ]


def _output(method: KohyaFields, places: Places) -> list[str]:
    samples = []
    if places.sample_prompts is not None:
        samples = [
            f"--sample_prompts={places.sample_prompts}",
            # The solver that the other methods draw with.
            "--sample_sampler=dpmsolver++",
            "--sample_at_first",
            # The launcher adds the last step, whatever the number.
            f"--sample_every_n_steps={method.sample_every or method.max_train_steps}",
        ]
    return [
        f"--output_dir={places.output_dir}",
        f"--output_name={places.output_name}",
        "--save_model_as=safetensors",
        f"--save_precision={method.save_precision}",
        # Its reports go the way of its trackers; what it writes there itself is thrown away with the folder.
        "--log_with=tensorboard",
        f"--logging_dir={places.logging_dir}",
        "--console_log_level=WARNING",
        "--console_log_simple",
        *samples,
    ]


def _switch(name: str, on: bool) -> list[str]:
    return [f"--{name}"] if on else []


def _value(name: str, value: object | None) -> list[str]:
    return [] if value is None else [f"--{name}={value}"]
