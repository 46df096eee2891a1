"""Where each weight of a model lies in a single-file checkpoint: the layout of CompVis' and Stability AI's own code.

The file numbers the UNet's blocks through and the VAE's decoder backwards, keeps the VAE's attention as 1x1
convolutions, and OpenCLIP's text encoders with q, k and v in one matrix. One table serves both directions: the writer
follows it, the reader follows it back.
Source: the keys of the published checkpoints of SD 1.5, 2.1 and SDXL 1.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sdtune.errors import TrainingError
from sdtune.training.components.lora_names import classic_clip_path
from sdtune.training.components.lora_weights import Family

UNET = "model.diffusion_model."
VAE = "first_stage_model."
PREFIXES: dict[Family, dict[str, str]] = {
    Family.SD1: {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.transformer."},
    Family.SD2: {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.model."},
    Family.SDXL: {
        "unet": UNET,
        "vae": VAE,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
"""What the names of a part begin with; the parts of a family in the order of this table."""
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"
"""CLIP's temperature, of no use for drawing: transformers' text encoder has none, SDXL files do."""


@dataclass(frozen=True)
class Place:
    """Where one weight lies in the file.

    third: 0, 1 or 2 where the file's tensor is q, k and v, one below the other.
    conv1x1: [out, in] is [out, in, 1, 1] in the file. transposed: [out, in] is [in, out] there.
    """

    name: str
    third: int | None = None
    conv1x1: bool = False
    transposed: bool = False


def places(family: Family, component: str, weights: Iterable[str], config: Any) -> dict[str, Place]:
    """Key of the part's state dict -> its place in the file.

    component: ``unet``, ``vae``, ``text_encoder`` or ``text_encoder_2``; config: the part's. Text encoders may have
    ``text_model.`` before their keys or not. TrainingError: a weight for which the file has no place.
    """
    prefix = PREFIXES[family][component]
    if component == "unet":
        table = _unet_table(config)
        return {key: Place(prefix + _renamed(key, table, component)) for key in weights}
    if component == "vae":
        table = _vae_table(config)
        return {
            key: Place(prefix + _renamed(key, table, component), conv1x1=bool(_VAE_LINEAR.search(key)))
            for key in weights
        }
    if prefix.endswith(".transformer."):  # OpenAI's CLIP, as transformers names it
        return {key: Place(prefix + classic_clip_path(key)) for key in weights}
    return {key: _open_clip_place(prefix, classic_clip_path(key)) for key in weights}


def other_names(name: str) -> list[str]:
    """Names that a weight has in files of some other programs."""
    return [name.replace(usual, other, 1) for usual, other in _OTHER_PREFIXES.items() if name.startswith(usual)]


_OTHER_PREFIXES = {
    "cond_stage_model.transformer.text_model.": "cond_stage_model.transformer.",  # of transformers before 4.13
    "cond_stage_model.model.": "conditioner.embedders.0.model.",  # SD 2.x trained with Stability AI's newer code
}


def _renamed(key: str, table: Mapping[str, str], component: str) -> str:
    """key with the longest of its leading parts that the table knows replaced."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (new := table.get(".".join(parts[:end]))) is not None:
            return ".".join([new, *parts[end:]])
    raise TrainingError(
        f"{component}: {key} has no place in a single-file checkpoint. Save this model as a diffusers folder."
    )


# --- UNet ------------------------------------------------------------------------------------------------------------

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _unet_table(config: Any) -> dict[str, str]:
    """diffusers' leading path -> the file's. Inside of an attention block both have the same names."""
    layers = config.layers_per_block
    if not isinstance(layers, int):
        raise TrainingError(f"unet: layers_per_block is {layers}; a single-file checkpoint wants one number.")
    table = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for block in range(len(config.down_block_types)):
        first = 1 + block * (layers + 1)  # input_blocks.0 is conv_in
        for layer in range(layers):
            resnets[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{first + layer}.0"
            table[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
        table[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
    for block, kind in enumerate(config.up_block_types):
        first = block * (layers + 1)
        for layer in range(layers + 1):
            resnets[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            table[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        last = 2 if kind.startswith("CrossAttn") else 1  # the upsampler follows the attention, where there is any
        table[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{last}.conv"
    return table | _with_parts(resnets, _UNET_RESNET)


def _with_parts(blocks: Mapping[str, str], parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{path}.{part}": f"{new}.{new_part}" for path, new in blocks.items() for part, new_part in parts.items()}


# --- VAE -------------------------------------------------------------------------------------------------------------

_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_LINEAR = re.compile(r"\.attentions\.0\.to_(?:q|k|v|out\.0)\.weight$")


def _vae_table(config: Any) -> dict[str, str]:
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    resnets: dict[str, str] = {}
    blocks, layers = len(config.block_out_channels), config.layers_per_block
    for half in ("encoder", "decoder"):
        ends = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
        table |= _with_parts({half: half}, ends)
        table |= _with_parts({f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1"}, _VAE_ATTENTION)
        resnets |= {f"{half}.mid_block.resnets.{number}": f"{half}.mid.block_{number + 1}" for number in range(2)}
    for block in range(blocks):
        up = blocks - 1 - block  # the file counts the decoder's blocks by size, diffusers in their order
        for layer in range(layers + 1):  # the encoder has one fewer
            resnets[f"encoder.down_blocks.{block}.resnets.{layer}"] = f"encoder.down.{block}.block.{layer}"
            resnets[f"decoder.up_blocks.{block}.resnets.{layer}"] = f"decoder.up.{up}.block.{layer}"
        table[f"encoder.down_blocks.{block}.downsamplers.0.conv"] = f"encoder.down.{block}.downsample.conv"
        table[f"decoder.up_blocks.{block}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    return table | _with_parts(resnets, _VAE_RESNET)


# --- OpenCLIP: SD 2.x, and SDXL's second text encoder ----------------------------------------------------------------

_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": Place("token_embedding.weight"),
    "text_model.embeddings.position_embedding.weight": Place("positional_embedding"),
    "text_model.final_layer_norm.weight": Place("ln_final.weight"),
    "text_model.final_layer_norm.bias": Place("ln_final.bias"),
    "text_projection.weight": Place("text_projection", transposed=True),
}
_OPEN_CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_OPEN_CLIP_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}


def _open_clip_place(prefix: str, key: str) -> Place:
    if (place := _OPEN_CLIP.get(key)) is not None:
        return Place(prefix + place.name, transposed=place.transposed)
    if match := _OPEN_CLIP_LAYER.fullmatch(key):
        number, part, kind = match.groups()
        layer = f"{prefix}transformer.resblocks.{number}"
        if part in _OPEN_CLIP_THIRDS:
            return Place(f"{layer}.attn.in_proj_{kind}", third=_OPEN_CLIP_THIRDS[part])
        if part in _OPEN_CLIP_PARTS:
            return Place(f"{layer}.{_OPEN_CLIP_PARTS[part]}.{kind}")
    raise TrainingError(f"text encoder: {key} has no place in a single-file checkpoint.")
