"""What train_speed.py trains, and the command lines of sdtune and its peers, each as its users run it.

All do the same: the same pictures, bf16, LoRA of rank 4 on the UNet's attention, AdamW at a constant rate, no gradient
checkpointing, TensorBoard on, no samples. The peers' scripts are run as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROMPT = "a photo of sks dog"
RANK = 4
PICTURES = 5
NEVER = 10**9
"""Steps between checkpoints of a peer, which so writes none."""
TERAFLOP_PER_IMAGE = 1.78
"""Of the UNet of Stable Diffusion 1.5 at 512 px with LoRA, forward and backward."""


@dataclass(frozen=True)
class Work:
    """What is trained in one row of the table.

    family: sd1 or sdxl. batch: pictures a step on each GPU. ours, theirs: steps to measure after the warm-up, of sdtune
    and of a peer. whole: the process is let go to its own end, and how long a job takes is told as well.
    """

    name: str
    family: str
    resolution: int
    batch: int
    ours: int
    theirs: int
    whole_model: bool = False
    whole: bool = False
    gpus: int = 1

    @property
    def title(self) -> str:
        model = {"sd1": "SD 1.5", "sdxl": "SDXL"}[self.family]
        on = f" on each of {self.gpus} GPUs" if self.gpus > 1 else ""
        kind = "full UNet" if self.whole_model else "LoRA"
        return f"{model} {kind}, {self.resolution} px, batch {self.batch}{on}"

    @property
    def teraflop(self) -> float | None:
        """Of one picture, where it is known."""
        known = self.family == "sd1" and self.resolution == 512 and not self.whole_model
        return TERAFLOP_PER_IMAGE if known else None


WORKS = (
    Work("lora-1", "sd1", 512, 1, ours=480, theirs=60, whole=True),
    Work("lora-4", "sd1", 512, 4, ours=200, theirs=40),
    Work("full-4", "sd1", 512, 4, ours=100, theirs=40, whole_model=True),
    Work("sdxl-1", "sdxl", 1024, 1, ours=100, theirs=30),
    Work("lora-16", "sd1", 512, 16, ours=100, theirs=30),
    Work("sdxl-4", "sdxl", 1024, 4, ours=50, theirs=20),
)
"""Most telling first: a run whose time is up has told most."""
TINY_SIDES = {"sd1": 128, "sdxl": 64}


def on_gpus(count: int) -> list[Work]:
    """SD 1.5 LoRA at batch 4 on 2, 4, 8 ... GPUs, up to ``count``; one GPU is the row lora-4."""
    one = next(work for work in WORKS if work.name == "lora-4")
    return [replace(one, name=f"gpus-{2**power}", gpus=2**power) for power in range(1, count.bit_length())]


def tiny(work: Work) -> Work:
    """The same for the small models, in seconds on a CPU."""
    return replace(work, resolution=TINY_SIDES[work.family], ours=4, theirs=4)


@dataclass(frozen=True)
class Places:
    """Folders of one run. pictures: images alone. kohya_pictures: in sd-scripts' layout. base: what
    ``prepare_for_sd_scripts`` wrote of the model."""

    model: Path
    pictures: Path
    kohya_pictures: Path
    base: Path
    output: Path


@dataclass(frozen=True)
class Command:
    """One process. curve: the name of the loss in TensorBoard's files; None: steps are told as events of sdtune.

    result: a pattern of the file in the output that holds what was trained.
    """

    words: list[str]
    environment: dict[str, str]
    steps: int
    curve: str | None
    result: str
    folder: Path = ROOT


class Sdtune:
    """Ours, by the entry point of its containers."""

    name = "sdtune"

    def command(self, work: Work, places: Places, warm_up: int) -> Command:
        steps = warm_up + work.ours
        settings = {
            "base_model": str(places.model), "instance_prompt": PROMPT, "resolution": work.resolution,
            "train_batch_size": work.batch, "max_train_steps": steps, "learning_rate": _rate(work),
            "lr_scheduler": "constant", "lr_warmup_steps": 0, "mixed_precision": "bf16", "num_samples": 0,
            **({} if work.whole_model else {"rank": RANK, "lora_alpha": RANK}),
            # A process that is ended after its last step would first have to write one. A whole job keeps its own.
            **({} if work.whole else {"checkpointing_minutes": 0}),
        }  # fmt: skip
        method = "dreambooth" if work.whole_model else "dreambooth-lora"
        words = [
            sys.executable, "-m", "sdtune.training", "train", method, f"--dataset={places.pictures}",
            f"--output={places.output}", f"--processes={work.gpus}", f"--recipe={json.dumps(settings)}",
        ]  # fmt: skip
        # An empty cache: what an earlier run left there would be work that this one has not done.
        environment = {
            "PYTHONPATH": _joined(ROOT / "src", os.environ.get("PYTHONPATH")),
            "SDTUNE_CACHE": str(places.output.with_name(f"{places.output.name}-cache")),
        }
        return Command(words, environment, steps, None, "*.safetensors")


@dataclass(frozen=True)
class Diffusers:
    """diffusers' example scripts for DreamBooth. workers: of their data loaders, of which their guides use none."""

    examples: Path
    workers: int = 0
    name = "diffusers"

    def script(self, work: Work) -> Path | None:
        names = {"sd1": "train_dreambooth_lora.py", "sdxl": "train_dreambooth_lora_sdxl.py"}
        if work.whole_model and work.family != "sd1":
            return None
        return self.examples / "dreambooth" / ("train_dreambooth.py" if work.whole_model else names[work.family])

    def command(self, work: Work, places: Places, warm_up: int) -> Command:
        steps = warm_up + work.theirs
        settings = {
            "pretrained_model_name_or_path": places.model, "instance_data_dir": places.pictures,
            "instance_prompt": PROMPT, "output_dir": places.output, "resolution": work.resolution,
            "train_batch_size": work.batch, "max_train_steps": steps, "learning_rate": _rate(work),
            "lr_scheduler": "constant", "lr_warmup_steps": 0, "mixed_precision": "bf16", "seed": 42,
            "report_to": "tensorboard", "checkpointing_steps": NEVER, "dataloader_num_workers": self.workers,
            **({} if work.whole_model else {"rank": RANK}),
        }  # fmt: skip
        words = [sys.executable, str(self.script(work)), *_options(settings)]
        return Command(words, {}, steps, "loss", "*.safetensors")


@dataclass(frozen=True)
class Kohya:
    """sd-scripts' LoRA trainers, in the Python that has what they want."""

    scripts: Path
    python: str
    name = "kohya"

    def script(self, work: Work) -> Path | None:
        names = {"sd1": "train_network.py", "sdxl": "sdxl_train_network.py"}
        return None if work.whole_model else self.scripts / names[work.family]

    def command(self, work: Work, places: Places, warm_up: int) -> Command:
        steps = warm_up + work.theirs
        base = json.loads((places.base / "base.json").read_text(encoding="utf-8"))
        settings = {
            "pretrained_model_name_or_path": base["model"], "tokenizer_cache_dir": base["tokenizers"],
            "train_data_dir": places.kohya_pictures, "resolution": work.resolution, "train_batch_size": work.batch,
            "max_train_steps": steps, "network_module": "networks.lora", "network_dim": RANK, "network_alpha": RANK,
            "optimizer_type": "AdamW", "learning_rate": _rate(work), "lr_scheduler": "constant",
            "mixed_precision": "bf16", "seed": 42, "output_dir": places.output, "save_model_as": "safetensors",
            "log_with": "tensorboard", "logging_dir": places.output / "logs", "max_data_loader_n_workers": 2,
        }  # fmt: skip
        # SDXL's VAE overflows in half precision; its guide says so.
        switches = ["cache_latents", "sdpa", "network_train_unet_only", "persistent_data_loader_workers"]
        switches += ["no_half_vae"] if work.family == "sdxl" else []
        words = [self.python, str(self.script(work)), *_options(settings), *(f"--{switch}" for switch in switches)]
        # Its own libraries are older than those that PYTHONPATH may hold for the others.
        return Command(words, {"PYTHONPATH": ""}, steps, "loss/current", "*.safetensors", self.scripts)


Trainer = Sdtune | Diffusers | Kohya


def git_blob(script: Path) -> str:
    """The name of the file's content in git: which version was run, and that nobody changed it."""
    content = script.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _rate(work: Work) -> float:
    return 1e-6 if work.whole_model else 1e-4


def _options(settings: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def _joined(*paths: object) -> str:
    return os.pathsep.join(str(path) for path in paths if path)
