"""The parts of the base model (tokenizer, text encoder, VAE, UNet), untrained, and how they become a pipeline folder.

Stable Diffusion 1.x in small: the same classes, scheduler and file layout, 128 px pictures and 16x16x4 latents.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

RESOLUTION = 128  # pixels
LATENT_SIZE = RESOLUTION // 8
TEXT_WIDTH = 128
MAX_TOKENS = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# Settings that tokenizers, text encoders and libraries of several years all read.
TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": BOS,
    "clean_up_tokenization_spaces": True,
    "do_lower_case": True,
    "eos_token": EOS,
    "errors": "replace",
    "model_max_length": MAX_TOKENS,
    "pad_token": EOS,
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": EOS,
}


def write_tokenizer(captions: Iterable[str], folder: Path, vocab_size: int = 800) -> None:
    """Train a byte-level BPE on captions and write it as CLIP does: vocab.json, merges.txt and two configs.

    All 256 bytes are in the vocabulary, inside a word and at its end (</w>), so any text has tokens.
    Source: Radford et al. 2021, arXiv:2103.00020, section 2.4; file form of openai/clip-vit-large-patch14.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {word: number for number, word in enumerate([*dict.fromkeys(words), BOS, EOS])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    special = {name: TOKENIZER_CONFIG[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Three CLIP layers of width 128; the last hidden state [batch, 77, 128] conditions the UNet."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=256,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    """Eight pixels a side to one latent of 4 channels; scaling_factor is set once the latents' spread is known."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=RESOLUTION,
    )


def build_unet() -> UNet2DConditionModel:
    """Two levels, 16x16 and 8x8, with attention at both and in the middle: seven transformer blocks for a LoRA."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(80, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(5, 6),  # diffusers' name for the number of heads: 16 channels each
        norm_num_groups=16,
        time_embedding_dim=256,
    )


def build_scheduler() -> DDPMScheduler:
    """Stable Diffusion 1.x's noise schedule; the network predicts the noise."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        clip_sample=False,
        steps_offset=1,
    )


def save_pipeline(
    folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Write the folder that StableDiffusionPipeline.from_pretrained opens: fp16 safetensors, no safety checker."""
    no_checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        **no_checker,
    )
    tokenizer_files = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    # transformers 5 writes one tokenizer.json; every version reads vocab.json and merges.txt.
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    for name, content in tokenizer_files.items():
        (folder / "tokenizer" / name).write_bytes(content)
    prefix_text_encoder(folder / "text_encoder" / "model.safetensors")


def prefix_text_encoder(path: Path) -> None:
    """Name the tensors text_model.*, as published checkpoints do: transformers >= 5.6 drops the prefix on saving."""
    tensors = load_file(path)
    named = {name if name.startswith("text_model.") else f"text_model.{name}": tensors[name] for name in tensors}
    save_file(named, path, metadata={"format": "pt"})
