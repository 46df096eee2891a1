"""A base model's own shape in the words of sd-scripts, which otherwise takes that of its family for granted.

Of Stable Diffusion 1 and 2, library/original_unet.py builds the UNet from constants of its own, and the VAE's scale is
an attribute of NetworkTrainer: the launcher sets both. What no constant says is refused, and so is every other SDXL.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdtune.errors import TrainingError

BLOCKS = {
    "down_block_types": {"CrossAttnDownBlock2D", "DownBlock2D"},
    "up_block_types": {"CrossAttnUpBlock2D", "UpBlock2D"},
}
SD_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
DEFAULTS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
"""Of diffusers' UNet2DConditionModel: what it is where its configuration does not say."""
SDXL_UNET = {
    "in_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
}
LATENT_CHANNELS = 4
VAE = {"latent_channels": LATENT_CHANNELS, "shift_factor": None, "latents_mean": None, "latents_std": None}
VAE_BLOCKS = 4
VAE_SCALE = 2 ** (VAE_BLOCKS - 1)
"""Pixels per latent."""
SDXL_VAE_SCALE = 0.13025
SDXL_TEXT_ENCODER = {"num_hidden_layers": 12}
"""Of the first: its layer 11 is read, which is to be the last but one."""
TIMESTEPS = 1000
SCHEDULE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": TIMESTEPS,
}  # fmt: skip
"""What NetworkTrainer.get_noise_scheduler and the samplers of train_util build."""
BUCKET_STEPS = 64


@dataclass(frozen=True)
class Shape:
    """unet_constants: for library/original_unet.py. vae_scale_factor: None if it is sd-scripts' own.

    bucket_steps: sides of buckets are multiples of so many pixels, which the UNet can halve down to its middle.
    """

    unet_constants: Mapping[str, Any] = field(default_factory=dict)
    vae_scale_factor: float | None = None
    bucket_steps: int = BUCKET_STEPS


def shape_of(
    name: str, sdxl: bool, unet: Mapping[str, Any], vae: Mapping[str, Any], text_encoder: Mapping[str, Any]
) -> Shape:
    """The shape of a diffusers folder, from its configurations. TrainingError: sd-scripts cannot build it.

    name: what the user calls the model.
    """
    scale = vae.get("scaling_factor", 0.18215)
    _refuse_other(f"VAE of {name}", vae, VAE)
    if len(vae.get("block_out_channels", [0] * VAE_BLOCKS)) != VAE_BLOCKS:
        raise _other(f"VAE of {name}", "block_out_channels", vae["block_out_channels"], f"{VAE_BLOCKS} of them")
    if sdxl:
        _refuse_other(f"UNet of {name}", unet, SDXL_UNET)
        _refuse_other(f"VAE of {name}", {"scaling_factor": scale}, {"scaling_factor": SDXL_VAE_SCALE})
        _refuse_other(f"text encoder of {name}", text_encoder, SDXL_TEXT_ENCODER)
        return Shape()
    unet = {**DEFAULTS, **unet}
    _refuse_other(f"UNet of {name}", unet, SD_UNET)
    _refuse_other_blocks(f"UNet of {name}", unet)
    channels = unet["block_out_channels"]
    return Shape(_constants(unet), float(scale), VAE_SCALE * 2 ** (len(channels) - 1))


def refuse_other_schedule(name: str, scheduler: Mapping[str, Any]) -> None:
    """TrainingError: sd-scripts would train on another noise schedule than the model's."""
    _refuse_other(f"noise schedule of {name}", scheduler, SCHEDULE)


def _constants(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Those of library/original_unet.py that a UNet2DConditionModel of diffusers has a word for."""
    channels = unet["block_out_channels"]
    return {
        "BLOCK_OUT_CHANNELS": channels,
        "TIMESTEP_INPUT_DIM": channels[0],
        "TIME_EMBED_DIM": unet.get("time_embedding_dim") or channels[0] * 4,
        "TIME_EMBED_FLIP_SIN_TO_COS": unet.get("flip_sin_to_cos", True),
        "TIME_EMBED_FREQ_SHIFT": unet.get("freq_shift", 0),
        "LAYERS_PER_BLOCK": unet["layers_per_block"],
        "LAYERS_PER_BLOCK_UP": unet["layers_per_block"] + 1,
        "NORM_GROUPS": unet.get("norm_num_groups", 32),
        "NORM_EPS": unet.get("norm_eps", 1e-5),
        "TRANSFORMER_NORM_NUM_GROUPS": unet.get("norm_num_groups", 32),
        "DOWN_BLOCK_TYPES": unet["down_block_types"],
        "UP_BLOCK_TYPES": unet["up_block_types"],
    }


def _refuse_other_blocks(what: str, unet: Mapping[str, Any]) -> None:
    """What sd-scripts has one number for, or one for each block."""
    for key, kinds in BLOCKS.items():
        if other := [kind for kind in unet[key] if kind not in kinds]:
            raise _other(what, key, other[0], _either(kinds))
    for key in ("layers_per_block", "cross_attention_dim"):
        if not isinstance(unet[key], int):
            raise _other(what, key, unet[key], "one number for all blocks")
    heads, blocks = unet.get("attention_head_dim", 8), len(unet["block_out_channels"])
    if isinstance(heads, int) and blocks > 4:  # it is repeated for four
        raise _other(what, "block_out_channels", unet["block_out_channels"], "at most 4, unless each has its heads")


def _refuse_other(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        if found.get(key, value) != value:
            raise _other(what, key, found[key], value)


def _other(what: str, key: str, found: object, wanted: object) -> TrainingError:
    return TrainingError(
        f"base_model: the {what} has {key} {found}; sd-scripts builds {wanted}, whatever the model says. Use a model "
        "of the family's own shape, or another method such as dreambooth-lora, which reads it from the model."
    )


def _either(words: Collection[str]) -> str:
    return " or ".join(sorted(words))
