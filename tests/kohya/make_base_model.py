"""Writes a diffusers folder of random weights with the UNet that sd-scripts builds: make_base_model.py OUT.

sd-scripts knows only the UNets of the families themselves, so the small shipped model is not for it. Everything else
here is small: two layers of the text encoder, a narrow VAE, the shipped model's tokenizer.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

TOKENIZER = Path(__file__).parents[2] / "examples" / "base-model" / "tokenizer"
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


def make(folder: Path) -> None:
    """Needs 4 GB of disk and of memory."""
    torch.manual_seed(0)
    narrow = (32, 32, 32, 32)
    AutoencoderKL(
        block_out_channels=narrow,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    ).save_pretrained(folder / "unet")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=2, vocab_size=49408
        )
    )
    # sd-scripts divides by the mean of a prompt's states, which is 0 as long as this is.
    for name, parameter in text_encoder.named_parameters():
        if name.endswith("final_layer_norm.bias"):
            torch.nn.init.normal_(parameter)
    text_encoder.save_pretrained(folder / "text_encoder")
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, clip_sample=False
    ).save_pretrained(folder / "scheduler")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(INDEX), encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
