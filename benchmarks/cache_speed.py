"""What the caches cost: encoding captions, drawing a batch, and a step whose captions travel with it.

    python benchmarks/cache_speed.py {sd1|sdxl} FILE [--captions N] [--entries N] [--steps N] [--models DIR] [--tiny]

Appends JSON objects to FILE, each with what was measured:

- encoding: seconds for N captions in batches of 1 and of what the product takes, and whether a caption is encoded alike
  alone, in another place of its batch and among others, bit for bit;
- drawing: milliseconds of a batch of 1, 4 and 16 from latents in memory, and from a file on disk that the system
  has in its memory, and the anonymous memory of the process in each;
- training: seconds per step and the loss of the last tenth, with all captions on the device (twice, for what a GPU
  changes by itself) and with captions that travel with their batch.

Models have random weights in the published shapes (--tiny: small ones, also for a CPU).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from accelerate.state import AcceleratorState
from random_models import make_model
from random_pictures import make_pictures

from sdtune import events
from sdtune.methods.text_to_image import TextToImageLora
from sdtune.training.__main__ import main as train
from sdtune.training.components import held_out, room, text
from sdtune.training.components.batches import Batches
from sdtune.training.components.data import CachedImages
from sdtune.training.components.dataset import Picture
from sdtune.training.components.models import load_parts
from sdtune.training.run import Run

ROOT = Path(__file__).parent.parent
PICTURES = 8
RESOLUTION = {"sd1": 512, "sdxl": 1024}


def encoding(method: TextToImageLora, run: Run, count: int) -> Iterator[dict[str, Any]]:
    """Of so many captions."""
    parts = load_parts(method, run)
    prompts = [f"a photo of {number} cats on a chair of {number % 7} colours" for number in range(count)]
    on_gpu = run.device.type == "cuda"

    def timed(prompts: list[str]) -> tuple[list[torch.Tensor], float]:
        text.encode(parts, method, prompts[: text.AT_ONCE])
        started = time.perf_counter()
        encoded = text.encode(parts, method, prompts).tensors
        if on_gpu:
            torch.cuda.synchronize()
        return encoded, round(time.perf_counter() - started, 3)

    with parts.at_work(*parts.text_encoders):
        together, seconds = timed(prompts)
        backwards, _ = timed(prompts[::-1])
        alone, _ = timed(prompts[5:6])
        with patch.object(text, "AT_ONCE", 1):
            one_by_one, seconds_alone = timed(prompts)
    pairs = list(zip(together, one_by_one, strict=True))
    yield {
        "captions": count, "at_once": text.AT_ONCE, "seconds": seconds, "seconds_one_by_one": seconds_alone,
        "bytes_each": sum(one[0].nbytes for one in together),
        "alike_in_another_place": all(torch.equal(a, b.flip(0)) for a, b in zip(together, backwards, strict=True)),
        "alike_alone": all(torch.equal(a[5:6], b) for a, b in zip(together, alone, strict=True)),
        "from_batches_of_one": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
    }  # fmt: skip


def drawing(run: Run, count: int, resolution: int) -> Iterator[dict[str, Any]]:
    """From the latents of so many pictures."""
    side = resolution // 8
    shape = (1, 2, 4, side, side)
    size = 2 * 4 * side * side
    for kept, share in (("on disk", 0.0), ("in memory", 1.0)):
        before = _anonymous_memory()
        with patch.object(room, "SHARE_OF_MEMORY", share):
            flat = room.room_for(f"latents of {count} pictures", count * size, torch.float32, run)
        entries = [one.view(shape) for one in flat.split(size)]
        for entry in entries:
            entry.normal_()
        images = CachedImages(
            pictures=[Picture(Path(f"{number}.png"), "", (resolution, resolution)) for number in range(count)],
            shapes=[(resolution, resolution)] * count, mean=[one[:, 0] for one in entries],
            std=[one[:, 1] for one in entries], captions=torch.zeros(count, dtype=torch.int64), scaling_factor=0.18,
        )  # fmt: skip
        milliseconds = {}
        for batch in (1, 4, 16):
            batches = Batches(images, batch, torch.Generator().manual_seed(0))
            next(batches)
            started = time.perf_counter()
            for _ in range(400 // batch):
                next(batches)
            milliseconds[batch] = round((time.perf_counter() - started) / (400 // batch) * 1e3, 3)
        taken = _anonymous_memory() - before
        yield {"latents": kept, "entries": count, "ms": milliseconds, "anonymous_mb": taken // 1_000_000}
        del flat, entries, images


def _anonymous_memory() -> int:
    """Bytes of this process that are in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def training(method: TextToImageLora, data: Path) -> Iterator[dict[str, Any]]:
    """With and without captions that travel."""
    for arm, on_device in (("on the device", 2**40), ("on the device, again", 2**40), ("travelling", 0)):
        told: list[events.Event] = []

        AcceleratorState._reset_state(reset_partial_state=True)
        with ExitStack() as stack:
            stack.enter_context(patch.object(text, "ON_DEVICE", on_device))
            stack.enter_context(patch.object(held_out, "DRAWS", held_out.AT_ONCE))
            stack.enter_context(patch.object(events, "emit", told.append))
            output = stack.enter_context(tempfile.TemporaryDirectory())
            places = [f"--dataset={data}", f"--output={output}/run", "--processes=1"]
            if code := train(["train", method.name, *places, *method.to_args()]):
                print(told[-1], file=sys.stderr)
                sys.exit(code)
        steps = [event for event in told if isinstance(event, events.Step)]
        (finished,) = (event for event in told if isinstance(event, events.Finished))
        # The first reports have the recording in them.
        paces = [method.train_batch_size / step.images_per_second for step in steps[2:] or steps]
        yield {
            "captions": arm, "batch": method.train_batch_size, "seconds_per_step": round(statistics.median(paces), 5),
            "loss": finished.loss,
        }  # fmt: skip


def main() -> None:
    """Measure, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=list(RESOLUTION))
    parser.add_argument("file", type=Path)
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--entries", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--models", type=Path, help="where the model is, or is made")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = (options.models or Path(folder)) / options.family
        if options.tiny and options.family == "sd1":
            model = ROOT / "examples" / "base-model"
        elif not (model / "model_index.json").is_file():
            make_model(options.family, model, tiny=options.tiny)
        data = Path(folder) / "data"
        make_pictures(data, PICTURES)
        captions = [{"file_name": one.name, "text": f"a photo of {one.stem}"} for one in sorted(data.iterdir())]
        (data / "metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in captions), encoding="utf-8")
        method = TextToImageLora.from_settings({
            "base_model": str(model), "train_batch_size": 4, "max_train_steps": options.steps, "num_samples": 0,
            "learning_rate": 1e-4, "mixed_precision": "bf16" if torch.cuda.is_available() else "no",
        })  # fmt: skip
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"

        def note(kind: str, found: dict[str, Any]) -> None:
            line = json.dumps({"what": kind, "family": options.family, "machine": machine, **found})
            print(line, flush=True)
            with options.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

        with Run.open(method, data, Path(folder) / "out") as run:
            for found in encoding(method, run, options.captions):
                note("encoding", found)
            resolution = 128 if options.tiny else RESOLUTION[options.family]
            for found in drawing(run, options.entries, resolution):
                note("drawing", found)
        for found in training(method, data):
            note("training", found)


if __name__ == "__main__":
    main()
