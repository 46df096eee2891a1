"""The names of one module in the LoRA formats: diffusers' path <-> kohya's name.

kohya joins a path with underscores: ``mid_block.attentions.0.proj_in`` -> ``lora_unet_mid_block_attentions_0_proj_in``.
For SDXL it trains Stability AI's own UNet, whose blocks are numbered through (``input_blocks.4.1`` is
``down_blocks.1.attentions.0``); programs expect SDXL files to use those names.
"""

from __future__ import annotations

import re
from enum import StrEnum

from sdtune.errors import TrainingError


class Family(StrEnum):
    """The families that differ in how a LoRA file names its modules."""

    SD1 = "sd1"
    SD2 = "sd2"
    SDXL = "sdxl"


class Form(StrEnum):
    """The forms that a LoRA is kept in."""

    DIFFUSERS = "diffusers"
    KOHYA = "kohya"
    PEFT = "peft"


COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""What a LoRA can sit on, by the names of the parts of a diffusers pipeline."""


class LoraPart(StrEnum):
    """What a module consists of, by the suffixes of kohya's form."""

    DOWN = "lora_down.weight"
    UP = "lora_up.weight"
    ALPHA = "alpha"
    MAGNITUDE = "dora_scale"


def classic_clip_path(path: str) -> str:
    """``encoder.layers.0...`` -> ``text_model.encoder.layers.0...``.

    transformers 5.6 dropped the level ``text_model`` from CLIPTextModel (not from CLIPTextModelWithProjection);
    every LoRA format and every loader keeps it.
    """
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def diffusers_layer(component: str, path: str) -> str:
    """The key in diffusers' form up to ``.down.weight``/``.up.weight``; export.write_diffusers_lora says why so."""
    if component != "unet":
        return f"{component}.{path}.lora_linear_layer"
    if attention := re.fullmatch(r"(.+\.attn[12])\.to_(q|k|v|out)(?:\.0)?", path):
        return f"unet.{attention[1]}.processor.to_{attention[2]}_lora"
    return f"unet.{path}.lora"


def kohya_layer(component: str, path: str, family: Family) -> str:
    """The name in kohya's form, up to the first dot of a key.

    ``lora_unet_``, ``lora_te_``; SDXL: ``lora_te1_``, ``lora_te2_``, and the block names of its original UNet.
    TrainingError: of a second text encoder, where the family has one.
    """
    sdxl = family is Family.SDXL
    if component == "text_encoder_2" and not sdxl:
        raise TrainingError(f"A LoRA of two text encoders cannot be written for {family}: only SDXL has two.")
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if sdxl else "lora_te", "text_encoder_2": "lora_te2"}
    return kohya_name(prefixes[component], path, sgm=sdxl and component == "unet")


def kohya_name(prefix: str, path: str, *, sgm: bool = False) -> str:
    """prefix: ``lora_unet``, ``lora_te``, ``lora_te1`` or ``lora_te2``; sgm: in the names of SDXL's original UNet."""
    return f"{prefix}_{(_renamed(path, _SGM) if sgm else path).replace('.', '_')}"


def path_of(flat: str) -> str:
    """diffusers' path of a kohya name without its prefix, whether in diffusers' block names or in SDXL's original.

    TrainingError: not the name of a module of Stable Diffusion's UNet or of a CLIP text encoder.
    """
    words = [match.group(1) for match in _WORD.finditer(flat)]
    if "_".join(words) != flat or words[0] not in _ROOTS | _SGM_ROOTS:
        raise TrainingError(f"{flat}: not the name of a Stable Diffusion module.")
    path = ".".join(words)
    return path if words[0] in _ROOTS else _renamed(path, _DIFFUSERS)


def _renamed(path: str, table: dict[str, str]) -> str:
    """path with the longest of its leading parts that the table knows replaced."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if (new := table.get(".".join(parts[:end]))) is not None:
            return ".".join([new, *parts[end:]])
    raise TrainingError(f"{path}: SDXL's UNet has no such module. Is this LoRA of another family?")


_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCKS, _LAYERS = 3, 2  # of SDXL: len(block_out_channels), layers_per_block


def _sgm_names() -> dict[str, str]:
    """diffusers' leading path -> that of SDXL's original UNet."""
    table = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for block in range(_BLOCKS):
        first = block * (_LAYERS + 1)
        for layer in range(_LAYERS):  # input_blocks.0 is conv_in
            resnets[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{first + layer + 1}.0"
            table[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{first + layer + 1}.1"
        table[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{first + _LAYERS + 1}.0.op"
        for layer in range(_LAYERS + 1):
            resnets[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            table[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        table[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{first + _LAYERS}.2.conv"
    for path, sgm in resnets.items():
        table |= {f"{path}.{part}": f"{sgm}.{sgm_part}" for part, sgm_part in _RESNET.items()}
    return table


_SGM = _sgm_names()
_DIFFUSERS = {sgm: path for path, sgm in _SGM.items()}
_ROOTS = {path.partition(".")[0] for path in _SGM} | {"text_model", "text_projection"}
_SGM_ROOTS = {sgm.partition(".")[0] for sgm in _DIFFUSERS}

# Words of a path that hold an underscore themselves: what makes kohya's names ambiguous to split.
_UNDERSCORED = (
    "down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block|transformer_blocks|"
    "to_q|to_k|to_v|to_out|proj_in|proj_out|time_emb_proj|conv_in|conv_out|conv_shortcut|"
    "time_embedding|add_embedding|linear_1|linear_2|in_layers|out_layers|emb_layers|skip_connection|"
    "time_embed|label_emb|text_model|self_attn|q_proj|k_proj|v_proj|out_proj|text_projection"
)
_WORD = re.compile(rf"({_UNDERSCORED}|[a-z0-9]+)(?:_|$)")
