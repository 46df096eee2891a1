"""FAKE: learn, nothing, zero, gone, diverge, crash, memory or hang."""

import argparse
import os
import sys
import time
import types
from pathlib import Path

import numpy
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
    """Named like that of torch, which is too slow to import here."""


class Network:
    training = True

    def train(self, mode=True):
        self.training = mode

    def eval(self):
        self.train(False)


class NetworkTrainer:
    def load_target_model(self, args, weight_dtype, accelerator):
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
        for number in range(len(__import__("json").loads(Path(args.sample_prompts).read_text(encoding="utf-8")))):
            name = f"{args.output_name}_{global_step:06d}_{number:02d}_20260101000000_42.png"
            Image.new("RGB", (64, 64), (global_step * 10, 0, 0)).save(folder / name)

    def train(self, args):
        if FAKE == "nothing":
            return
        accelerator = types.SimpleNamespace(num_processes=1, is_main_process=True)
        network = Network()
        schedule = types.SimpleNamespace(get_last_lr=lambda: [1e-9, args.learning_rate])
        self.load_target_model(args, None, accelerator)
        self.post_process_network(args, accelerator, network, [], None)
        self.sample_images(accelerator, args, 0, 0, "cpu", None, [], None, network)
        micro = [
            (step, part) for step in range(args.max_train_steps) for part in range(args.gradient_accumulation_steps)
        ]
        for step, part in micro:
            last = part == args.gradient_accumulation_steps - 1
            sys.stderr.write(f"\rsteps: {step}%|####      | {step}/{args.max_train_steps} [00:01, avr_loss=1]")
            sys.stderr.flush()
            if last:
                self.sample_images(accelerator, args, None, step + 1, "cpu", None, [], None, network)
            if FAKE == "crash" and step == 2:
                raise ValueError("something inside sd-scripts")
            if FAKE == "memory" and step == 2:
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            if FAKE == "hang":
                time.sleep(0.05)
            loss = float("nan") if FAKE == "diverge" and step == 2 else 0.5 + part
            logs = self.generate_step_logs(args, loss, 0.75, schedule, None)
            self.step_logging(accelerator, logs, step + last, 1)
        self.sample_images(accelerator, args, 1, args.max_train_steps, "cpu", None, [], None, network)
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
            "ss_session_id": "1",
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
