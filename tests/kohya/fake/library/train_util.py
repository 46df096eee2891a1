import json
import os
import time
from pathlib import Path

import torch
from PIL import Image


class StableDiffusionLongPromptWeightingPipeline:
    def decode_latents(self, latents):
        return latents / 0.18215


def verify_command_line_training_args(args):
    pass


def sample_images_common(
    pipe_class, accelerator, args, epoch, steps, device, vae, tokenizer, text_encoder, unet_wrapped
):
    """A picture's green says how the pipeline decodes latents that the VAE's own scale of 0.4357 makes 100."""
    assert not unet_wrapped.training
    green = round(pipe_class().decode_latents(0.4357 * 100))
    folder = Path(args.output_dir) / "sample"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = len(json.loads(Path(args.sample_prompts).read_text(encoding="utf-8")))
    for number in range(accelerator.process_index, prompts, accelerator.num_processes):
        name = f"{args.output_name}_{steps:06d}_{number:02d}_20260101000000_42.png"
        Image.new("RGB", (64, 64), (steps * 10, green, 0)).save(folder / name)
    # As sd-scripts': each picture from a seed of its own.
    torch.manual_seed(42)
    if os.environ["FAKE"] == "draws" and steps == 5:
        time.sleep(60)
