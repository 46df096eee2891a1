"""How much memory of the GPU each method takes, by the training that users run: ``sdtune.jobs.memory`` is fitted to it.

    python benchmarks/gpu_memory.py FILE [--only REGEX] [--limit GIB] [--models DIR]

Appends one JSON object per case to FILE: the most that torch had allocated in each phase of the run, and what it had
reserved. The models have random weights in the published shapes and are made anew in DIR; memory does not depend on
what is learned. Cases are runs of a few steps in one process, so that libraries are imported once. --limit lets torch
have so much of the GPU and no more, as a smaller one would.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from accelerate.state import AcceleratorState
from random_models import make_model
from random_pictures import make_pictures

from sdtune import events
from sdtune.errors import INTERRUPTED
from sdtune.training.__main__ import main as train
from sdtune.training.components import held_out

PICTURES = 8
STEPS = 6
GIB = 2**30
MEASURE = held_out.HeldOutLoss.measure
LORA, FULL = ("text-to-image-lora", "dreambooth-lora"), ("text-to-image", "dreambooth")
CHECKPOINTING = {"gradient_checkpointing": True}
TEXT = {"train_text_encoder": True}
PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of a cat", "num_class_images": PICTURES}


@dataclass(frozen=True)
class Case:
    """One run. samples: how many pictures are drawn per prompt; whole: to its end, files and last samples included."""

    family: str
    method: str
    resolution: int
    batch: int
    more: dict[str, Any] = field(default_factory=dict)
    samples: int = 0
    whole: bool = False

    @property
    def name(self) -> str:
        more = [f"{name}={value}" for name, value in self.more.items()]
        drawn = [f"samples={self.samples}"] if self.samples else []
        return " ".join([self.family, self.method, f"{self.resolution}px", f"batch={self.batch}", *more, *drawn])

    def settings(self, models: Path) -> dict[str, Any]:
        prompt = {"instance_prompt": "a photo of sks cat"} if "dreambooth" in self.method else {}
        drawn = {"sample_prompt": ["a photo of a cat"]} if self.samples else {}
        return {
            "base_model": str(models / self.family), "resolution": self.resolution, "train_batch_size": self.batch,
            "max_train_steps": STEPS, "num_samples": self.samples, "sample_steps": 2, "mixed_precision": "bf16",
            "learning_rate": 1e-4 if "lora" in self.method else 1e-6, **prompt, **drawn, **self.more,
        }  # fmt: skip


class EnoughError(BaseException):
    """Training is over, and what it leaves need not be written."""


class Meter:
    """The peak of each phase, read off whenever the run says something."""

    def __init__(self, case: Case) -> None:
        self.case, self.phase, self.peaks, self.said = case, "load", dict[str, float](), dict[str, Any]()

    def __call__(self, event: events.Event) -> None:
        self.read()
        match event:
            case events.Phase():
                self.phase = event.name
                if event.name == "save" and not self.case.whole:
                    raise EnoughError
            case events.Step():
                self.said["seconds_per_step"] = round(self.case.batch / event.images_per_second, 4)
            case events.Failed():
                self.said["failed"] = f"{self.phase}: {event.text[-300:]}"

    def read(self, phase: str | None = None) -> None:
        """What was allocated at most since the last reading is a part of the phase."""
        phase = phase or self.phase
        self.peaks[phase] = round(max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated() / GIB), 3)
        torch.cuda.reset_peak_memory_stats()

    def around_measures(self) -> None:
        """The held-out loss as a phase of its own, on as many draws as are made at once: more take no more memory."""
        held_out.DRAWS = held_out.AT_ONCE

        def measured(of: held_out.HeldOutLoss, step: int) -> float:
            self.read()
            value = MEASURE(of, step)
            self.read("measure")
            return value

        held_out.HeldOutLoss.measure = measured  # type: ignore[method-assign]


def cases() -> Iterator[Case]:
    """Most telling first of each family, so that a run that is cut short has told most."""
    lora, dream_lora = LORA
    full, dream = FULL
    for batch in (1, 4, 8, 16, 2):
        yield Case("sd1", lora, 512, batch)
    for batch in (1, 16, 4):
        yield Case("sd1", lora, 512, batch, CHECKPOINTING)
    yield Case("sd1", dream, 512, 1)
    yield Case("sd1", dream, 512, 4)
    yield Case("sd1", full, 512, 8)
    yield Case("sd1", dream, 512, 1, CHECKPOINTING)
    yield Case("sd1", dream, 512, 8, CHECKPOINTING)
    yield Case("sd1", dream_lora, 512, 1, TEXT)
    yield Case("sd1", dream_lora, 512, 4, TEXT)
    yield Case("sd1", dream_lora, 512, 4, TEXT | CHECKPOINTING)
    yield Case("sd1", dream, 512, 1, TEXT)
    yield Case("sd1", dream, 512, 4, TEXT)
    yield Case("sd1", dream, 512, 4, TEXT | CHECKPOINTING)
    for optimizer in ("adamw8bit", "adafactor", "lion"):
        yield Case("sd1", dream, 512, 1, {"optimizer": optimizer})
    yield Case("sd1", dream, 512, 1, {"optimizer": "prodigy", "learning_rate": 1})
    yield Case("sd1", dream, 512, 1, {"use_ema": True})
    yield Case("sd1", full, 512, 4, {"use_ema": True})
    yield Case("sd1", lora, 512, 1, samples=4, whole=True)
    yield Case("sd1", lora, 512, 1, samples=1)
    yield Case("sd1", lora, 768, 1, samples=4)
    yield Case("sd1", dream, 512, 1, samples=4, whole=True)
    yield Case("sd1", dream_lora, 512, 2, PRIOR, samples=1)
    for batch in (1, 4):
        yield Case("sd1", lora, 768, batch)
    yield Case("sd1", lora, 768, 4, CHECKPOINTING)
    yield Case("sd1", full, 768, 4, CHECKPOINTING)
    yield Case("sd1", lora, 512, 4, {"mixed_precision": "fp16"})
    yield Case("sd1", dream, 512, 4, {"mixed_precision": "fp16"})
    for batch in (1, 4):
        yield Case("sd1", lora, 512, batch, {"mixed_precision": "no"})
    yield Case("sd1", lora, 512, 4, {"mixed_precision": "no"} | CHECKPOINTING)
    yield Case("sd1", dream, 512, 1, {"mixed_precision": "no"})
    yield Case("sd1", dream, 512, 4, {"mixed_precision": "no"})
    yield Case("sd1", lora, 512, 4, {"rank": 128})
    yield Case("sd1", lora, 512, 4, {"use_dora": True})
    yield Case("sd1", lora, 512, 4, {"conv_rank": 16})
    for adapter in ("oft", "loha", "hra"):
        yield Case("sd1", "peft-dreambooth-lora", 512, 4, {"adapter": adapter})
    yield Case("sd2", lora, 768, 1)
    yield Case("sd2", lora, 768, 4, CHECKPOINTING)
    yield Case("sd2", dream, 768, 1, CHECKPOINTING)

    for batch in (1, 2, 4):
        yield Case("sdxl", lora, 1024, batch)
    for batch in (1, 4, 8):
        yield Case("sdxl", lora, 1024, batch, CHECKPOINTING)
    yield Case("sdxl", lora, 1024, 1, CHECKPOINTING, samples=4, whole=True)
    yield Case("sdxl", lora, 1024, 1, CHECKPOINTING, samples=1)
    yield Case("sdxl", dream_lora, 1024, 1, TEXT)
    yield Case("sdxl", dream_lora, 1024, 1, TEXT | CHECKPOINTING)
    yield Case("sdxl", dream_lora, 1024, 1, CHECKPOINTING | PRIOR, samples=1)
    yield Case("sdxl", lora, 1024, 1, {"mixed_precision": "fp16"})
    yield Case("sdxl", lora, 1024, 1, {"mixed_precision": "no"} | CHECKPOINTING)
    yield Case("sdxl", lora, 768, 2)
    yield Case("sdxl", lora, 512, 4)
    yield Case("sdxl", lora, 1024, 1, {"rank": 128} | CHECKPOINTING)
    yield Case("sdxl", lora, 1024, 1, {"use_dora": True})

    yield Case("sdxl", dream, 1024, 1, CHECKPOINTING)
    yield Case("sdxl", dream, 1024, 1, CHECKPOINTING | {"optimizer": "adafactor"})
    yield Case("sdxl", full, 1024, 1)
    yield Case("sdxl", full, 1024, 4, CHECKPOINTING)
    yield Case("sdxl", full, 1024, 2, {"optimizer": "adafactor"})
    yield Case("sdxl", dream, 1024, 1, CHECKPOINTING | TEXT | {"optimizer": "adafactor"})
    yield Case("sdxl", full, 1024, 1, CHECKPOINTING | {"optimizer": "adamw8bit"})
    yield Case("sdxl", full, 1024, 1, CHECKPOINTING | {"optimizer": "adafactor", "use_ema": True})
    yield Case("sdxl", full, 1024, 1, {"optimizer": "adafactor", "mixed_precision": "no"} | CHECKPOINTING)


def measure(case: Case, models: Path, data: Path) -> dict[str, Any]:
    """Run the case; what it took."""
    meter = Meter(case)
    events.emit = meter
    meter.around_measures()
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    layout = data / ("images" if "dreambooth" in case.method else "captioned")
    with tempfile.TemporaryDirectory() as output:
        recipe = json.dumps(case.settings(models))
        words = [f"--dataset={layout}", f"--output={output}/run", "--processes=1", f"--recipe={recipe}"]
        with contextlib.suppress(EnoughError):
            if train(["train", case.method, *words]) == INTERRUPTED:
                sys.exit(INTERRUPTED)
    free, total = torch.cuda.mem_get_info()
    return {
        "case": case.name, **asdict(case), "peaks": meter.peaks, **meter.said,
        "reserved": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "before": round(before / GIB, 3), "driver": round((total - free) / GIB, 3),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def make_data(folder: Path) -> None:
    """Square pictures, with captions and without."""
    for layout in ("images", "captioned"):
        make_pictures(folder / layout, PICTURES)
    captions = [{"file_name": path.name, "text": "a photo of sks cat"} for path in (folder / "captioned").iterdir()]
    lines = [json.dumps(caption) + "\n" for caption in captions]
    (folder / "captioned" / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Make what is missing, run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="cases whose name this regular expression is found in")
    parser.add_argument("--limit", type=float, help="GiB of the GPU that torch may have")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case is begun after so many")
    parser.add_argument("--models", type=Path, help="where the models are kept; not given: a temporary folder")
    options = parser.parse_args()
    started = time.perf_counter()
    chosen = [case for case in cases() if re.search(options.only, case.name)]
    if options.limit:
        torch.cuda.set_per_process_memory_fraction(options.limit * GIB / torch.cuda.mem_get_info()[1])
    with tempfile.TemporaryDirectory() as scratch:
        models = options.models or Path(scratch) / "models"
        for family in dict.fromkeys(case.family for case in chosen):
            if not (models / family / "model_index.json").is_file():
                make_model(family, models / family)
        make_data(Path(scratch) / "data")
        for case in chosen:
            if time.perf_counter() - started > options.seconds:
                break
            found = {"limit": options.limit, "gpu": torch.cuda.get_device_name()}
            found |= measure(case, models, Path(scratch) / "data")
            with options.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(
                case.name, found["peaks"], found.get("failed", ""), f"{found['seconds']} s", file=sys.stderr, flush=True
            )


if __name__ == "__main__":
    main()
