"""One value, five hops, one name: what is typed arrives in the trainer as it was typed."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sdtune.jobs.spec import plan_training
from sdtune.methods.catalog import METHODS
from sdtune.methods.fields import CommonFields

AWKWARD = [
    "1",
    "null",
    "true",
    "-1",
    "--help",
    "--output=x",
    "a, b",
    'it\'s "quoted"',
    "$(rm -rf /)",
    "🐈 naïve",
    "a\nb",
    "x" * 10_000,
]

# A value that no field has by default, by the field's type and bounds.
VALUES: dict[str, Any] = {
    "base_model": "someone/some-model",
    "revision": "v2.1",
    "resolution": 768,
    "gradient_accumulation_steps": 3,
    "max_train_steps": 77,
    "train_batch_size": 5,
    "mixed_precision": "fp16",
    "learning_rate": 5e-5,
    "lr_scheduler": "cosine",
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_weight_decay": 0.5,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.25,
    "snr_gamma": 5.5,
    "noise_offset": 0.0357,
    "sample_prompt": ("a photo of sks cat", "a drawing"),
    "num_samples": 2,
    "sample_every": 9,
    "checkpointing_minutes": 2.5,
    "checkpointing_steps": 40,
    "checkpoints_total_limit": 3,
    "sample_steps": 11,
    "guidance_scale": 3.5,
    "seed": 7,
    "instance_prompt": "a photo of sks dog",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "conv_rank": 4,
    "save_bin": True,
    "use_dora": True,
    "adapter": "loha",
    "bias": "adapter_only",
    "text_encoder_rank": 6,
    "text_encoder_alpha": 3.0,
    "text_encoder_dropout": 0.25,
    "text_encoder_bias": "all",
    "rank": 8,
    "lora_alpha": 4.0,
    "lora_dropout": 0.125,
    "target_modules": ("to_q", "proj_in"),
    "network_dim": 24,
    "network_alpha": 12.0,
    "network_dropout": 0.25,
    "conv_dim": 6,
    "conv_alpha": 3.0,
    "train_text_encoder": False,
    "unet_lr": 2e-5,
    "text_encoder_lr": 3e-6,
    "optimizer_type": "Lion",
    "optimizer_args": ("weight_decay=0.5", "betas=0.8,0.95"),
    "lr_scheduler_num_cycles": 4,
    "v_parameterization": True,
    "zero_terminal_snr": True,
    "min_snr_gamma": 4.5,
    "clip_skip": 2,
    "max_token_length": 150,
    "shuffle_caption": True,
    "keep_tokens": 2,
    "caption_dropout_rate": 0.125,
    "enable_bucket": False,
    "min_bucket_reso": 128,
    "max_bucket_reso": 1536,
    "bucket_no_upscale": True,
    "flip_aug": True,
    "cache_latents": False,
    "random_crop": True,
    "save_precision": "float",
    "class_data_dir": "my class",
    "prior_loss_weight": 0.75,
    "random_flip": True,
    "gradient_checkpointing": True,
    "torch_compile": True,
    "optimizer": "lion",
    "lr_num_cycles": 3,
    "held_out_images": 3,
    "held_out_every": 50,
    "with_prior_preservation": True,
    "class_prompt": "a photo of a cat",
    "num_class_images": 12,
    "use_ema": True,
    "ema_decay": 0.99,
    "proportion_empty_prompts": 0.1,
    "hub_model_id": "someone/a-cat.v2",
    "wandb_project": "my cats",
}
# What a field only makes sense beside, as far as the method has it.
PRIOR = {"with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": "my class"}
TEXT_ENCODER = {"train_text_encoder": True}
BESIDE: dict[str, dict[str, Any]] = {
    "lr_warmup_steps": {"lr_scheduler": "linear"},
    "lr_scheduler_num_cycles": {"lr_scheduler": "cosine_with_restarts"},
    "lr_num_cycles": {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
    "conv_alpha": {"conv_dim": 6, "conv_rank": 6},
    "keep_tokens": {"shuffle_caption": True},
    "random_crop": {"cache_latents": False},
    **dict.fromkeys([f"text_encoder_{name}" for name in ("lr", "rank", "alpha", "dropout", "bias")], TEXT_ENCODER),
    "ema_decay": {"use_ema": True},
    "hub_model_id": {"push_to_hub": True},
    "hub_private": {"push_to_hub": True},
    **dict.fromkeys([*PRIOR, "num_class_images", "prior_loss_weight"], PRIOR),
}
VALUES["lr_warmup_steps"] = 13

CASES = [(name, field) for name, method in METHODS.items() for field in method.model_fields]


def required(method: type[CommonFields]) -> dict[str, Any]:
    return {name: VALUES[name] for name, info in method.model_fields.items() if info.is_required()}


def value_of(method: type[CommonFields], field: str) -> Any:
    """Not the default: of a switch, the other position."""
    default = method.model_fields[field].default
    return not default if isinstance(default, bool) else VALUES[field]


def settings_for(method: type[CommonFields], field: str) -> dict[str, Any]:
    """What a run needs so that ``field`` may be set."""
    beside = {name: value for name, value in BESIDE.get(field, {}).items() if name in method.model_fields}
    return {**required(method), **beside}


def as_options(settings: dict[str, Any], method: type[CommonFields]) -> list[str]:
    """What a user types for ``settings``."""
    words: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [word for one in (value if isinstance(value, tuple) else (value,)) for word in (flag, str(one))]
    return words


def parse_typed(method: type[CommonFields], words: list[str]) -> CommonFields:
    """What the command line makes of ``words``."""
    import inspect

    import typer

    from sdtune.cli.options import parameters_of
    from sdtune.commands.gathering import typed_settings

    got: list[CommonFields] = []

    def command(**arguments: Any) -> None:
        got.append(method.from_settings(typed_settings(method, arguments)))

    command.__signature__ = inspect.Signature(parameters_of(method, taken=set()))  # type: ignore[attr-defined]
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return got[0]


@pytest.mark.parametrize(("name", "field"), CASES)
def test_a_typed_value_arrives_in_the_trainer(name: str, field: str) -> None:
    method = METHODS[name]
    value = value_of(method, field)
    settings = {**settings_for(method, field), field: value}
    typed = parse_typed(method, as_options(settings, method))
    job = plan_training(typed, "/data", "/out")
    arrived = method.from_args(job.args[4:])
    assert getattr(arrived, field) == value
    assert getattr(arrived, field) != method.model_fields[field].default
    assert arrived == typed


@pytest.mark.parametrize(("name", "field"), [case for case in CASES if not isinstance(VALUES.get(case[1]), tuple)])
def test_a_search_lays_its_value_over_the_recipe(name: str, field: str) -> None:
    method = METHODS[name]
    sent = method.from_settings(settings_for(method, field))
    arrived = method.from_args([*sent.to_args(), f"--{field}={value_of(method, field)}"])
    assert getattr(arrived, field) == value_of(method, field)


@pytest.mark.parametrize("prompt", AWKWARD)
def test_awkward_prompts_arrive_unchanged(prompt: str) -> None:
    method = METHODS["dreambooth-lora"]
    typed = parse_typed(method, [f"--instance-prompt={prompt}"])
    assert method.from_args(typed.to_args()) == typed
    assert typed.instance_prompt == prompt  # type: ignore[attr-defined]


@pytest.mark.parametrize("prompt", ["$(PATH)", "$$", "costs $5", "$(sks) $$(x)"])
def test_no_argument_has_what_a_container_would_replace(prompt: str) -> None:
    method = METHODS["dreambooth-lora"]
    sent = method.from_settings({"instance_prompt": prompt})
    assert not any("$" in arg for arg in sent.to_args())
    assert method.from_args(sent.to_args()) == sent


@given(st.text(min_size=1, max_size=200))
def test_any_prompt_survives_the_arguments(prompt: str) -> None:
    method = METHODS["dreambooth-lora"]
    sent = method.from_settings({"instance_prompt": prompt, "sample_prompt": [prompt, prompt]})
    assert method.from_args(sent.to_args()) == sent


def test_every_field_has_a_help_text_and_a_type_that_a_user_can_type() -> None:
    assert CASES
    for name, field in CASES:
        info = METHODS[name].model_fields[field]
        assert info.description, field
        assert info.description[0].isupper(), field
        assert _leaf(info.annotation) in (int, float, bool, str) or typing.get_origin(_leaf(info.annotation)), field


def _leaf(annotation: Any) -> Any:
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return next(_leaf(part) for part in typing.get_args(annotation) if part is not type(None))
    return _leaf(typing.get_args(annotation)[0]) if origin is Annotated else annotation
