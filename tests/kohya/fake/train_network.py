"""FAKE: learn, train, draws, nothing, zero, gone, diverge, crash, memory or hang.

``train`` and ``draws`` (which takes a minute to draw after step 5) train a few numbers on what the pictures are called,
with everything random that sd-scripts has: the order of each epoch, captions, latents, noise, dropout. The others
pretend. FAKE_PAUSE: at this step it says so, and waits for the file FAKE_GO.
"""

import argparse
import json
import math
import os
import random
import sys
import time
import types
from multiprocessing import Value
from pathlib import Path

import torch
from accelerate import Accelerator
from library import original_unet
from PIL import Image
from safetensors.torch import save_file

FAKE = os.environ.get("FAKE", "learn")
TRAINS = FAKE in ("train", "draws")
PAUSE = int(os.environ.get("FAKE_PAUSE", "0"))


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


class Network(torch.nn.Module):
    """``up`` is the LoRA's, ``text`` has a rate of its own, as sd-scripts' text encoder."""

    def __init__(self, args):
        super().__init__()
        self.up, self.text = torch.nn.Parameter(torch.randn(8, 2)), torch.nn.Parameter(torch.zeros(1))
        self.down = torch.nn.Parameter(torch.ones(2, 8), requires_grad=False)
        self.dropout = torch.nn.Dropout(args.network_dropout or 0)

    def forward(self, seen):
        return self.up @ self.dropout(self.down @ seen) + self.text


class Dataset(torch.utils.data.Dataset):
    """As sd-scripts' DatasetGroup: shuffled by the seed and the number of the epoch, captions by Python's chance."""

    def __init__(self, args):
        if args.dataset_config:
            config = json.loads(Path(args.dataset_config).read_text(encoding="utf-8"))
            subsets = [subset for dataset in config["datasets"] for subset in dataset["subsets"]]
            pictures = [
                path.name
                for subset in subsets
                for path in sorted(Path(subset["image_dir"]).iterdir())
                if path.suffix != ".txt"
                for _ in range(subset["num_repeats"])
            ]
        else:
            pictures = [Path(name).name for name in json.loads(Path(args.in_json).read_text(encoding="utf-8"))]
        self.indices, self.batch_size = pictures, args.train_batch_size
        self.seed, self.current_epoch, self.dropout = args.seed, 0, args.caption_dropout_rate or 0
        self.shuffle()

    def cache_latents(self):
        # Encoded once, at random.
        self.latents = {name: torch.randn(8) + len(name) for name in dict.fromkeys(sorted(self.indices))}

    def shuffle(self):
        random.seed(self.seed + self.current_epoch)
        random.shuffle(self.indices)

    def set_current_epoch(self, epoch):
        while self.current_epoch < epoch:
            self.current_epoch += 1
            self.shuffle()

    def set_current_step(self, step):
        pass

    def __len__(self):
        return math.ceil(len(self.indices) / self.batch_size)

    def __getitem__(self, index):
        names = self.indices[index * self.batch_size :][: self.batch_size]
        kept = [random.random() >= self.dropout for _ in names]
        return {"latents": torch.stack([self.latents[name] * keep for name, keep in zip(names, kept, strict=True)])}


class Collator:
    """As sd-scripts': a dataset learns after its first batch that an epoch has begun."""

    def __init__(self, epoch, step, dataset):
        self.current_epoch, self.current_step, self.dataset = epoch, step, dataset

    def __call__(self, examples):
        worker = torch.utils.data.get_worker_info()
        dataset = worker.dataset if worker else self.dataset
        dataset.set_current_epoch(self.current_epoch.value)
        dataset.set_current_step(self.current_step.value)
        return examples[0]


class LossRecorder:
    def __init__(self):
        self.losses, self.total = [], 0.0

    def add(self, *, epoch, step, loss):
        if epoch == 0:
            self.losses.append(loss)
        else:
            self.losses += [0.0] * (step + 1 - len(self.losses))
            self.total -= self.losses[step]
            self.losses[step] = loss
        self.total += loss

    @property
    def moving_average(self):
        return self.total / len(self.losses) if TRAINS else 0.75


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
        prompts = len(json.loads(Path(args.sample_prompts).read_text(encoding="utf-8")))
        for number in range(accelerator.process_index, prompts, accelerator.num_processes):
            name = f"{args.output_name}_{global_step:06d}_{number:02d}_20260101000000_42.png"
            Image.new("RGB", (64, 64), (global_step * 10, 0, 0)).save(folder / name)
        # As sd-scripts': each picture from a seed of its own.
        torch.manual_seed(42)
        if FAKE == "draws" and global_step == 5:
            time.sleep(60)

    def all_reduce_network(self, accelerator, network):
        for weight in network.parameters():
            if weight.grad is not None:
                weight.grad = accelerator.reduce(weight.grad, reduction="mean")

    def process_batch(self, batch, network, part):
        if not TRAINS:
            return 0.5 + part + 0 * (network.up.sum() + network.text.sum())
        seen = batch["latents"].T
        noise, timestep = torch.randn_like(seen), torch.randint(1, 1000, (1,))
        return ((network(seen + noise * timestep / 1000) - noise) ** 2).mean()

    def train(self, args):
        if FAKE == "nothing":
            return
        torch.manual_seed(args.seed)
        random.seed(args.seed)
        dataset = Dataset(args)
        current_epoch, current_step = Value("i", 0), Value("i", 0)
        workers = args.max_data_loader_n_workers
        self.assert_extra_args(args, None, None)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
        self.load_target_model(args, None, accelerator)
        dataset.cache_latents()
        network, vae = Network(args), Vae()
        self.steps = global_step = 0
        self.post_process_network(args, accelerator, network, [], None)
        groups = [{"params": [network.text], "lr": 1e-9}, {"params": [network.up], "lr": args.learning_rate}]
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step) if TRAINS else 1)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=1, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
            collate_fn=Collator(current_epoch, current_step, None if workers else dataset),
        )  # fmt: skip
        validation = torch.utils.data.DataLoader([], shuffle=False, batch_size=1)
        network, optimizer, loader, validation, schedule = accelerator.prepare(
            network, optimizer, loader, validation, schedule
        )
        recorder, unwrapped = LossRecorder(), accelerator.unwrap_model(network)
        network.eval()
        self.sample_images(accelerator, args, 0, 0, "cpu", vae, [None], unwrapped, unwrapped)
        steps_in_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
        for epoch in range(math.ceil(args.max_train_steps / steps_in_epoch)):
            accelerator.print(f"\nepoch {epoch + 1}\n")
            current_epoch.value = epoch + 1
            network.train()
            for step, batch in enumerate(loader):
                current_step.value = global_step
                with accelerator.accumulate(network):
                    loss = self.process_batch(batch, unwrapped, step % args.gradient_accumulation_steps)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        self.all_reduce_network(accelerator, network)
                        accelerator.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad(set_to_none=True)
                shown = f"{global_step}%|####      | {global_step}/{args.max_train_steps} [00:01, avr_loss=1]"
                sys.stderr.write(f"\rsteps: {shown}")
                sys.stderr.flush()
                if accelerator.sync_gradients:
                    global_step += 1
                    self.steps = global_step
                    self.sample_images(accelerator, args, None, global_step, "cpu", vae, [None], unwrapped, unwrapped)
                current_loss = loss.detach().item()
                recorder.add(epoch=epoch, step=step, loss=current_loss)
                if FAKE == "crash" and global_step == 3:
                    raise ValueError("something inside sd-scripts")
                if FAKE == "memory" and global_step == 3:
                    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
                if FAKE == "hang":
                    time.sleep(0.05)
                if global_step == PAUSE and accelerator.is_main_process and accelerator.sync_gradients:
                    sys.stdout.write(f"\npaused at step {PAUSE}\n")
                    sys.stdout.flush()
                    while not Path(os.environ["FAKE_GO"]).exists():
                        time.sleep(0.01)
                if FAKE == "diverge" and global_step == 3:
                    current_loss = float("nan")
                logs = self.generate_step_logs(args, current_loss, recorder.moving_average, schedule, None)
                self.step_logging(accelerator, logs, global_step, epoch + 1)
                if global_step >= args.max_train_steps:
                    break
            self.sample_images(accelerator, args, epoch + 1, global_step, "cpu", vae, [None], unwrapped, unwrapped)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        if not accelerator.is_main_process:
            return
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        up = unwrapped.up.detach() if TRAINS else torch.full((8, 2), float(FAKE != "zero"))
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": up, "alpha": torch.tensor([2.0])}
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
