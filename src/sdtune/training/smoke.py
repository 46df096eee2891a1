"""``python -m sdtune.training.smoke --base-model FOLDER``: proves an image, or the wheels of a lock, before it is used.

Imports every module and library that jobs of this image may come to, trains one step of each of its methods by the
entry point that jobs start, and reads the files that were left. It needs neither a GPU nor the network, so it is a
step of the image's build: a broken pin fails that, and not the first job. Exit code 1: something did not work, and the
rest was tried all the same.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdtune import events
from sdtune.methods.catalog import METHODS
from sdtune.methods.fields import CommonFields
from sdtune.methods.layouts import Layout
from sdtune.training.kernels import driver
from sdtune.training.kohya.process import FOLDER as SD_SCRIPTS

PICTURES = 2
SIDE = 128
"""Pixels of the pictures, and of the smallest model that is at hand."""
LAST_LINES = 40


MODULES = ("sdtune.methods", "sdtune.training")
"""With all that is in them."""
LIBRARIES = (
    "bitsandbytes", "google.cloud.storage", "ipykernel.kernelapp", "lion_pytorch", "prodigyopt", "pyarrow.parquet",
    "torch.utils.tensorboard", "wandb",
)  # fmt: skip
"""What those import late. What sd-scripts imports, it imports when it trains."""
CONTAINERS = tuple(dict.fromkeys(method.container for method in METHODS.values()))

SETTINGS: Mapping[str, dict[str, Any]] = {
    "dreambooth": {"instance_prompt": "a photo of sks cat", "optimizer": "adafactor", "train_text_encoder": True},
    "dreambooth-lora": {
        "instance_prompt": "a photo of sks cat",
        "optimizer": "prodigy",
        "learning_rate": 1.0,
        "with_prior_preservation": True,
        "class_prompt": "a cat",
        "num_class_images": 1,
    },
    "text-to-image": {"optimizer": "adamw", "use_ema": True},
    "text-to-image-lora": {"optimizer": "lion", "learning_rate": 1e-2},
    "peft-dreambooth-lora": {
        "instance_prompt": "a photo of sks cat",
        "learning_rate": 1e-2,
        "adapter": "lokr",
        "train_text_encoder": True,
    },
    "kohya-dreambooth-lora": {"optimizer_type": "Prodigy", "learning_rate": 1.0, "clip_skip": 2},
    "kohya-native-lora": {"optimizer_type": "Lion", "learning_rate": 1e-2, "conv_dim": 2},
}
"""Between them, every optimizer that a CPU can run."""


class BrokenError(Exception):
    """Something of the image does not work; the message says what."""


def main(argv: Sequence[str] | None = None) -> int:
    """Try all; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdtune.training.smoke", allow_abbrev=False)
    parser.add_argument(
        "--container", choices=CONTAINERS, help=f"not given: kohya where {SD_SCRIPTS} is set, else diffusers"
    )
    parser.add_argument("--base-model", type=Path, required=True, help="a small model, such as examples/base-model")
    asked = parser.parse_args(argv)
    container = asked.container or ("kohya" if os.environ.get(SD_SCRIPTS) else "diffusers")
    started = time.perf_counter()
    tell(f"{container}: Python {platform.python_version()}, {versions()}")
    with tempfile.TemporaryDirectory(prefix="sdtune-smoke-") as folder:
        checks = [*import_checks(), *training_checks(container, asked.base_model, Path(folder))]
        broken = [name for name, check in checks if not passes(name, check)]
    seconds = time.perf_counter() - started
    tell(f"{len(checks) - len(broken)} of {len(checks)} in {seconds:.0f} s" + "".join(f"; broken: {b}" for b in broken))
    return 1 if broken else 0


Check = tuple[str, Callable[[], str]]
"""What is tried, and what tries it: says what it found, or raises."""


def passes(name: str, check: Callable[[], str]) -> bool:
    """Tell how it went."""
    started = time.perf_counter()
    try:
        found = check()
    except Exception as error:  # noqa: BLE001
        # Also errors of libraries' own: all that is broken is to be told at once.
        tell(f"BROKEN {name}: {error if isinstance(error, BrokenError) else f'{type(error).__name__}: {error}'}")
        return False
    tell(f"ok     {name} ({time.perf_counter() - started:.1f} s){found}")
    return True


def tell(line: str) -> None:
    """One line of output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def versions() -> str:
    """Of the libraries that conflicts are about."""
    named = ("torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "safetensors", "numpy")
    return ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in named)


def import_checks() -> Iterator[Check]:
    """Every module and every library."""
    for package in MODULES:
        yield f"import {package} and all in it", lambda package=package: import_all(package)  # type: ignore[misc]
    for name in LIBRARIES:
        yield f"import {name}", lambda name=name: importlib.import_module(name) and ""  # type: ignore[misc]
    if os.environ.get("TRITON_CACHE_DIR"):
        yield "what Triton starts kernels by", triton_check


def triton_check() -> str:
    """Where it lies. BrokenError: a GPU's first kernel would need a compiler."""
    made = driver.library()
    if made is None:
        raise BrokenError(f"it is not in TRITON_CACHE_DIR={os.environ['TRITON_CACHE_DIR']}")
    return f", {made}"


def import_all(package: str) -> str:
    """How many modules these are. BrokenError: one cannot be imported."""
    names = modules_of(package)
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise BrokenError(f"{name}: {error}") from error
    return f": {len(names)} modules"


def modules_of(name: str) -> list[str]:
    """A module, and all that are in it, less those that run when imported."""
    module = importlib.import_module(name)
    inside = pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}.")
    return [name, *(one.name for one in inside if not one.name.endswith(".__main__"))]


def training_checks(container: str, base_model: Path, folder: Path) -> Iterator[Check]:
    """One step of every method of the image."""
    for name, method in METHODS.items():
        if method.container == container:
            yield f"train {name}", lambda method=method: train(method, base_model, folder / method.name)  # type: ignore[misc]


def train(method: type[CommonFields], base_model: Path, folder: Path) -> str:
    """Train one step as a job does; what was left. BrokenError: it did not end well, or left something else."""
    settings = SETTINGS[method.name] | {
        "base_model": str(base_model.resolve()), "resolution": SIDE, "max_train_steps": 1,
        "num_samples": 1, "sample_steps": 1, "sample_prompt": ["a cat"],
    }  # fmt: skip
    lay_out(method.layout, folder / "dataset")
    words = [f"--dataset={folder / 'dataset'}", f"--output={folder / 'out'}", *method.from_settings(settings).to_args()]
    ran = subprocess.run(
        [sys.executable, "-m", "sdtune.training", "train", method.name, *words],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    said = [event for line in ran.stdout.splitlines() if (event := events.parse(line))]
    if ran.returncode or not said or not isinstance(said[-1], events.Finished):
        lines = [*ran.stdout.splitlines(), *ran.stderr.splitlines()][-LAST_LINES:]
        raise BrokenError(f"exit code {ran.returncode}" + "".join(f"\n  | {line}" for line in lines))
    return check_result(said, folder / "out")


def lay_out(layout: Layout, folder: Path) -> None:
    """The smallest dataset of its kind."""
    pictures = folder / "1_sks cat" if layout is Layout.KOHYA else folder
    pictures.mkdir(parents=True)
    for number in range(PICTURES):
        Image.linear_gradient("L").rotate(90 * number).resize((SIDE, SIDE)).convert("RGB").save(
            pictures / f"{number}.png"
        )
    if layout is Layout.CAPTIONED:
        rows = [json.dumps({"file_name": f"{number}.png", "text": "a cat"}) for number in range(PICTURES)]
        (pictures / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


def check_result(said: Sequence[events.Event], output: Path) -> str:
    """Which files of weights there are. BrokenError: none, one with nothing in it, or no picture."""
    places = [Path(event.path) for event in said if isinstance(event, events.Artifact)]
    missing = [place for place in places if not place.exists()]
    if missing:
        raise BrokenError(f"told of {missing[0].name}, which is not there")
    weights = sorted(output.rglob("*.safetensors"))
    if not weights:
        raise BrokenError("left no .safetensors")
    if not list((output / "samples").rglob("*.png")):
        raise BrokenError("drew no sample")
    for file in weights:
        check_weights(file)
    return ": " + ", ".join(file.relative_to(output).as_posix() for file in weights)


def check_weights(file: Path) -> None:
    """BrokenError: a number in it is not finite, or nothing was learned."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(file)
    if not tensors or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise BrokenError(f"{file.name}: {len(tensors)} tensors, and not all numbers in them are finite")
    if not any(bool(tensor.any()) for tensor in tensors.values()):
        raise BrokenError(f"{file.name}: all zero")


if __name__ == "__main__":
    sys.exit(main())
