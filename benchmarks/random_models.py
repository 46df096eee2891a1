"""Models of random weights in the published shapes: what speed and memory are measured on.

    python benchmarks/random_models.py FAMILY FOLDER [--dtype float32] [--tiny] [--sd-scripts FOLDER]

Neither depends on what is learned. A process of its own makes them where another one measures, so that the GPU is free
afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdtune.methods.kohya import KohyaDreamBoothLora
from sdtune.training.components import single_file
from sdtune.training.components.lora_weights import Family
from sdtune.training.kohya.base import prepare_base

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TINY_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "projection_dim": 32,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8, "block_out_channels": [32, 64, 64], "layers_per_block": 1, "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 1, 1], "cross_attention_dim": 64, "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "vae": {"sample_size": 64, "block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
    "text_encoder": TINY_TEXT,
    "text_encoder_2": TINY_TEXT,
}  # fmt: skip
"""What makes an SDXL small. A small Stable Diffusion 1 is examples/base-model."""


def make_model(family: str, folder: Path, dtype: torch.dtype = torch.float16, *, tiny: bool = False) -> None:
    """A diffusers folder of the family's published shapes with random weights, made on the GPU if there is one."""
    settings = single_file.config_folder(Family(family))
    smaller = TINY if tiny else {}
    scheduler = DDPMScheduler.from_pretrained(settings, subfolder="scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            model = kind.from_config({**kind.load_config(settings / part), **smaller.get(part, {})})
            model.to(dtype).save_pretrained(folder / part)
        for part, text in zip(TEXT_ENCODERS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True):
            if (settings / part).is_dir():
                model = text(CLIPTextConfig.from_pretrained(settings / part, **smaller.get(part, {})))
                model.to(dtype).save_pretrained(folder / part)
                tokenizer = part.replace("text_encoder", "tokenizer")
                single_file._tokenizer(settings, tokenizer).save_pretrained(folder / tokenizer)
    # Last: a folder that has it is whole.
    shutil.copyfile(settings / "model_index.json", folder / "model_index.json")


def prepare_for_sd_scripts(model: Path, work: Path) -> None:
    """The model as sd-scripts reads it, and its tokenizers; where they are is in ``work``/base.json."""
    method = KohyaDreamBoothLora.from_settings({"base_model": str(model)})
    base = prepare_base(method, work)
    places = {"model": str(base.path), "tokenizers": str(base.tokenizers)}
    (work / "base.json").write_text(json.dumps(places), encoding="utf-8")


def main() -> None:
    """Make what is asked for and not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=[family.value for family in Family])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the stored weights")
    parser.add_argument("--tiny", action="store_true", help="an SDXL that a CPU trains")
    parser.add_argument("--sd-scripts", type=Path, help="also write here what sd-scripts needs of it")
    options = parser.parse_args()
    if options.tiny and options.family != Family.SDXL.value:
        parser.error("--tiny is for sdxl; a small sd1 is examples/base-model")
    if not (options.folder / "model_index.json").is_file():
        make_model(options.family, options.folder, getattr(torch, options.dtype), tiny=options.tiny)
    if options.sd_scripts and not (options.sd_scripts / "base.json").is_file():
        options.sd_scripts.mkdir(parents=True)
        prepare_for_sd_scripts(options.folder, options.sd_scripts)


if __name__ == "__main__":
    main()
