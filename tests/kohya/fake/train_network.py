"""FAKE: learn, nothing, zero, gone, diverge, crash, memory or hang."""

import argparse
import contextlib
import json
import os
import random
import sys
import time
import types
from pathlib import Path

import numpy
import torch
from library import original_unet
from PIL import Image
from safetensors.numpy import save_file

FAKE = os.environ.get("FAKE", "learn")


def setup_parser():
    parser = argparse.ArgumentParser()
    options = Path(__file__).parent.parent / "options.txt"
    for row in options.read_text(encoding="utf-8").splitlines():
        name, kind, *rest = row.partition("  #")[0].split()
        if name in ("-h", "--help"):
            continue
        if kind == "switch":
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(
                name, type={"int": int, "float": float}.get(kind, str), nargs="*" if rest[:1] == ["*"] else None
            )
    return parser


class OutOfMemoryError(RuntimeError):
    """Named like that of torch, which no CPU raises."""


class Network:
    training = True

    def train(self, mode=True):
        self.training = mode

    def eval(self):
        self.train(False)


class Vae:
    """Every picture is its own mean brightness, so that what it is given can be told."""

    device, dtype = torch.device("cpu"), torch.float32

    def to(self, device):
        self.device = torch.device(device)

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels, 8).mean(1, keepdim=True).expand(-1, 4, -1, -1)
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=small))


class Scheduler:
    def add_noise(self, latents, noise, timesteps):
        assert (timesteps >= 0).all()
        return latents + noise


class Strategy:
    """Of tokens and of text alike: a caption is as long as it is."""

    def tokenize(self, captions):
        return [torch.tensor([[len(caption)] for caption in captions])]

    def encode_tokens(self, tokenize_strategy, models, tokens):
        return [tokens[0].float()]


class NetworkTrainer:
    def __init__(self):
        self.vae_scale_factor = 0.18215

    def assert_extra_args(self, args, train_dataset_group, val_dataset_group):
        assert args.bucket_reso_steps % 64 == 0

    def get_tokenize_strategy(self, args):
        return Strategy()

    def get_text_encoding_strategy(self, args):
        return Strategy()

    def get_models_for_text_encoding(self, args, accelerator, text_encoders):
        return text_encoders

    def get_noise_scheduler(self, args, device):
        return Scheduler()

    def shift_scale_latents(self, args, latents):
        return latents * self.vae_scale_factor

    def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype):
        """At first nothing is predicted, later a tenth more of what is seen with every step."""
        assert not unet.training
        assert len(text_conds[0]) == len(noisy_latents) == len(batch["original_sizes_hw"])
        return noisy_latents * self.steps / 10

    def load_target_model(self, args, weight_dtype, accelerator):
        channels = list(original_unet.BLOCK_OUT_CHANNELS)
        sys.stdout.write(f"a UNet of {channels} and latents times {self.vae_scale_factor}\n")
        return "sd_v1", None, None, None

    def post_process_network(self, args, accelerator, network, text_encoders, unet):
        pass

    def generate_step_logs(self, args, current_loss, avr_loss, lr_scheduler, lr_descriptions, optimizer=None):
        return {"loss/current": current_loss, "loss/average": avr_loss, "lr/unet": lr_scheduler.get_last_lr()[-1]}

    def step_logging(self, accelerator, logs, global_step, epoch):
        raise AssertionError("to the trackers of sd-scripts")

    def sample_images(self, accelerator, args, epoch, global_step, device, vae, tokenizers, text_encoder, unet):
        if global_step == 0 and not args.sample_at_first:
            return
        if global_step and (epoch is not None or global_step % args.sample_every_n_steps):
            return
        assert not unet.training
        folder = Path(args.output_dir) / "sample"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(len(json.loads(Path(args.sample_prompts).read_text(encoding="utf-8")))):
            name = f"{args.output_name}_{global_step:06d}_{number:02d}_20260101000000_42.png"
            Image.new("RGB", (64, 64), (global_step * 10, 0, 0)).save(folder / name)

    def train(self, args):
        if FAKE == "nothing":
            return
        accelerator = types.SimpleNamespace(num_processes=1, autocast=contextlib.nullcontext)
        network, vae = Network(), Vae()
        self.steps = 0
        self.assert_extra_args(args, None, None)
        schedule = types.SimpleNamespace(get_last_lr=lambda: [1e-9, args.learning_rate])
        self.load_target_model(args, None, accelerator)
        self.post_process_network(args, accelerator, network, [], None)
        self.sample_images(accelerator, args, 0, 0, "cpu", vae, [None], network, network)
        micro = [
            (step, part) for step in range(args.max_train_steps) for part in range(args.gradient_accumulation_steps)
        ]
        for step, part in micro:
            last = part == args.gradient_accumulation_steps - 1
            sys.stderr.write(f"\rsteps: {step}%|####      | {step}/{args.max_train_steps} [00:01, avr_loss=1]")
            sys.stderr.flush()
            if last:
                self.steps = step + 1
                self.sample_images(accelerator, args, None, step + 1, "cpu", vae, [None], network, network)
            if FAKE == "crash" and step == 2:
                raise ValueError("something inside sd-scripts")
            if FAKE == "memory" and step == 2:
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            if FAKE == "hang":
                time.sleep(0.05)
            loss = float("nan") if FAKE == "diverge" and step == 2 else 0.5 + part
            logs = self.generate_step_logs(args, loss, 0.75, schedule, None)
            self.step_logging(accelerator, logs, step + last, 1)
        self.sample_images(accelerator, args, 1, args.max_train_steps, "cpu", vae, [None], network, network)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        up = numpy.full((8, 2), FAKE != "zero", numpy.float32)
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors = {
            "lora_down.weight": numpy.ones((2, 8), numpy.float32),
            "lora_up.weight": up,
            "alpha": numpy.float32([2]),
        }
        metadata = {
            "ss_output_name": args.output_name,
            "ss_sd_model_name": "5d41402abc4b",
            "ss_sd_model_hash": "IsADirectory",
            "ss_session_id": str(random.random()),
            "ss_training_started_at": str(time.time()),
            "ss_training_finished_at": str(time.time()),
            "modelspec.date": str(time.time()),
            "modelspec.title": args.output_name,
            "sshs_model_hash": "stale",
        }
        if FAKE != "gone":
            save_file(
                {f"{name}.{part}": tensor for part, tensor in tensors.items()},
                Path(args.output_dir) / f"{args.output_name}.safetensors",
                metadata,
            )


class SdxlNetworkTrainer(NetworkTrainer):
    pass
