"""Caches, buckets and spilling change nothing that is learned.

What the trainers train is held against a plain loop that has none of it: no cache, no bucket, no flat tensors, no
recording; every picture is opened, cut and encoded anew at every step, and so is every caption. Bit for bit.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from parity_runs import same_lora_weights
from peft import LoraConfig
from PIL import Image, ImageOps
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTokenizer

from sdtune import events
from sdtune.methods.catalog import find_method
from sdtune.methods.fields import TrainingFields
from sdtune.training.__main__ import main, run_training
from sdtune.training.components import data, room, text
from sdtune.training.components.batches import Batches, Draws, Noised
from sdtune.training.components.data import CachedImages, cache_images
from sdtune.training.components.dataset import Picture, read_dataset
from sdtune.training.components.models import Parts
from sdtune.training.components.processes import ALL
from sdtune.training.components.text import Captions
from sdtune.training.run import Run
from tests.conftest import BASE_MODEL

Weights = dict[str, torch.Tensor]

SQUARE, WIDE, HIGH = (64, 64), (80, 48), (48, 80)
"""Of the buckets at 64 px."""
SIZES = {SQUARE: (100, 100), WIDE: (170, 100), HIGH: (90, 150)}
"""Pictures that belong to them, of other sizes."""
COMMON = {
    "base_model": str(BASE_MODEL), "mixed_precision": "no", "resolution": 64, "max_train_steps": 4, "seed": 5,
    "train_batch_size": 2, "learning_rate": 1e-3, "num_samples": 0, "random_flip": True,
    # The norm of flat tensors differs in its last bit from that of their parts, and with it what is clipped.
    "max_grad_norm": 1e6,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """method, settings: of a run. shapes: of its pictures, each with its caption. classes: so many class pictures."""

    method: str
    settings: dict[str, Any]
    shapes: Sequence[tuple[int, int]]
    classes: int = 0


CASES = {
    "dreambooth-lora, prior": Case(
        "dreambooth-lora",
        {"instance_prompt": "a photo of sks cat", "with_prior_preservation": True, "class_prompt": "a photo of a cat",
         "num_class_images": 3, "prior_loss_weight": 0.4, "rank": 4},
        [SQUARE] * 4, classes=3,
    ),
    "text-to-image-lora, buckets and dropped captions": Case(
        "text-to-image-lora", {"rank": 4, "proportion_empty_prompts": 0.4, "noise_offset": 0.1},
        [SQUARE, WIDE, HIGH, WIDE, SQUARE, HIGH, WIDE],
    ),
    "text-to-image": Case("text-to-image", {"max_train_steps": 3}, [WIDE, SQUARE, WIDE, SQUARE]),
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A run and the weights that it trained."""

    case: Case
    method: Any
    dataset: Path
    weights: Weights


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))


def make_pictures(folder: Path, shapes: Sequence[tuple[int, int]], seed: int = 0) -> Path:
    """Noise, of which every part differs, in files 0.png, 1.png ..., with captions in metadata.jsonl."""
    folder.mkdir(parents=True)
    random = numpy.random.default_rng(seed)
    rows = []
    for number, shape in enumerate(shapes):
        width, height = SIZES[shape]
        small = random.integers(0, 255, (height // 10, width // 10, 3), dtype=numpy.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"picture {number} of many colours"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def dataset_of(case: Case, folder: Path) -> Path:
    pictures = make_pictures(folder / "pictures", case.shapes)
    if case.method.startswith("dreambooth"):
        (pictures / "metadata.jsonl").unlink()
    return pictures


def method_of(case: Case, folder: Path, **settings: Any) -> Any:
    wanted = {**COMMON, **case.settings, **settings}
    if case.classes:
        classes = folder / "classes"
        if not classes.exists():
            make_pictures(classes, [SQUARE] * case.classes, seed=1)
            (classes / "metadata.jsonl").unlink()
        wanted["class_data_dir"] = str(classes)
    return find_method(case.method).from_settings(wanted)


# --- the product ------------------------------------------------------------------------------------------------------


def trained(method: TrainingFields, dataset: Path, output: Path) -> Weights:
    """What the trainer has made of the UNet's trained weights."""
    trainer = importlib.import_module(f"sdtune.training.trainers.{method.trainer}")
    found: Weights = {}
    real = trainer.fit

    def fit(loss_of: Any, parts: Any, *more: Any, **options: Any) -> float:
        loss: float = real(loss_of, parts, *more, **options)
        found.update(_trained_of(parts.unet))
        return loss

    with patch.object(trainer, "fit", fit), same_lora_weights():
        run_training(method, dataset, output)
    return found


def _trained_of(unet: torch.nn.Module) -> Weights:
    return {name: weight.detach().clone() for name, weight in unet.named_parameters() if weight.requires_grad}


@contextmanager
def everything_spilled() -> Iterator[None]:
    """Nothing fits into memory, and no caption onto the device."""
    with patch.object(room, "SHARE_OF_MEMORY", 0.0), patch.object(text, "ON_DEVICE", 0):
        yield


@contextmanager
def each_alone() -> Iterator[None]:
    """Every picture and caption is encoded alone. Of several together encoders add up in another order, and the last
    bits differ: how far, is in test_data.py and test_text.py."""
    real = data._encode

    def encode(parts: Any, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([real(parts, one) for one in pixels.split(1)])

    with patch.object(data, "_encode", encode), patch.object(text, "AT_ONCE", 1):
        yield


# --- the plain loop ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """One picture in a batch. dropped: its caption. noise: that of the VAE."""

    number: int
    mirrored: bool
    dropped: bool
    noise: torch.Tensor


def draws_of(method: TrainingFields, shapes: Sequence[tuple[int, int]], classes: int) -> Iterator[tuple[Noised, list]]:
    """What `Draws` draws for such pictures: the batch as it is, and of each of its pictures which one it is.

    Pictures that tell their number take the place of the real ones, and then such as are nothing but the VAE's noise.
    """

    def stand_ins(of: Sequence[tuple[int, int]], noise: float) -> CachedImages:
        variants = 2 if method.random_flip else 1
        sizes = [(4, height // 8, width // 8) for width, height in of]
        marks = [torch.arange(variants).view(-1, 1, 1, 1) + 2.0 * number for number in range(len(of))]
        mean = [mark.expand(variants, *size) * (1 - noise) for mark, size in zip(marks, sizes, strict=True)]
        return CachedImages(
            pictures=[Picture(Path("x"), "x", shape) for shape in of], shapes=of, mean=mean,
            std=[torch.full_like(one, noise) for one in mean], captions=torch.arange(1, len(of) + 1),
            scaling_factor=1.0, proportion_empty_prompts=getattr(method, "proportion_empty_prompts", 0.0),
        )  # fmt: skip

    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    parts: Any = SimpleNamespace(noise_scheduler=scheduler)
    captions: Any = SimpleNamespace(travelling=lambda rows: None)
    marked, noise = (
        Draws(stand_ins(shapes, of_noise), captions, parts, method, ALL,
              stand_ins([SQUARE] * classes, of_noise) if classes else None)
        for of_noise in (0.0, 1.0)
    )  # fmt: skip
    for which, hidden in zip(marked, noise, strict=True):
        marks = which.batch.latents[:, 0, 0, 0].long().tolist()
        rows = zip(marks, which.batch.captions.tolist(), hidden.batch.latents, strict=True)
        yield which, [Drawn(mark // 2, mark % 2 == 1, caption == 0, of_vae) for mark, caption, of_vae in rows]


def trained_plainly(method: Any, case: Case, dataset: Path) -> Weights:
    """Every picture and every caption encoded at every step, by the libraries alone."""
    vae, text_encoder, unet = (
        kind.from_pretrained(BASE_MODEL, subfolder=part, dtype=torch.float32)
        for kind, part in ((AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder"), (UNet2DConditionModel, "unet"))
    )
    tokenizer = CLIPTokenizer.from_pretrained(BASE_MODEL, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(BASE_MODEL, subfolder="scheduler")
    if "rank" in case.settings:
        unet.requires_grad_(False)
        targets = list(method.target_modules)
        options = {"r": method.rank, "lora_alpha": method.rank, "init_lora_weights": "gaussian"}
        with same_lora_weights():
            unet.add_adapter(LoraConfig(**options, target_modules=targets))
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=method.learning_rate, weight_decay=method.adam_weight_decay)

    def latents_of(path: Path, drawn: Drawn) -> torch.Tensor:
        height, width = (side * 8 for side in drawn.noise.shape[-2:])
        picture = ImageOps.fit(Image.open(path).convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        if drawn.mirrored:
            picture = ImageOps.mirror(picture)
        pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        posterior = vae.encode(pixels).latent_dist
        return (posterior.mean + posterior.std * drawn.noise) * vae.config.scaling_factor

    def states_of(caption: str) -> torch.Tensor:
        ids = tokenizer(caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return text_encoder(ids).last_hidden_state

    for noised, pictures in islice(draws_of(method, case.shapes, case.classes), method.max_train_steps):
        subject = len(pictures) - noised.batch.prior
        latents, states = [], []
        with torch.no_grad():
            for place, drawn in enumerate(pictures):
                folder = dataset if place < subject else Path(method.class_data_dir)
                caption = f"picture {drawn.number} of many colours"
                if case.classes:
                    caption = method.instance_prompt if place < subject else method.class_prompt
                latents.append(latents_of(folder / f"{drawn.number}.png", drawn))
                states.append(states_of("" if drawn.dropped else caption))
        noisy = scheduler.add_noise(torch.cat(latents), noised.noise, noised.timesteps)
        noise_pred = unet(noisy, noised.timesteps, torch.cat(states)).sample
        error = mse_loss(noise_pred, noised.noise, reduction="none").mean(dim=(1, 2, 3))
        loss = error[:subject].mean()
        if case.classes:
            loss = loss + method.prior_loss_weight * error[subject:].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return _trained_of(unet)


# --- the proofs -------------------------------------------------------------------------------------------------------


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def notes(printed: str) -> list[str]:
    told = [events.parse(line) for line in printed.splitlines()]
    return [event.text for event in told if isinstance(event, events.Note)]


@pytest.fixture(scope="module", params=CASES)
def in_memory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run as users have it where there is memory enough."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("in-memory")
    method, dataset = method_of(case, folder), dataset_of(case, folder)
    with each_alone():
        return Trained(case, method, dataset, trained(method, dataset, folder / "out"))


def test_with_caches_the_same_is_learned_as_without(in_memory: Trained) -> None:
    case, method = in_memory.case, in_memory.method
    assert same(in_memory.weights, trained_plainly(method, case, in_memory.dataset))
    drawn = [one for _, batch in islice(draws_of(method, case.shapes, case.classes), 6) for one in batch]
    assert {one.mirrored for one in drawn} == {True, False}
    assert torch.cat([one.noise.flatten() for one in drawn]).std().item() == pytest.approx(1, abs=0.1)
    assert any(one.dropped for one in drawn) == ("proportion_empty_prompts" in case.settings)


def test_on_disk_the_same_is_learned_as_in_memory(
    in_memory: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = in_memory.case
    with everything_spilled(), each_alone():
        spilled = trained(in_memory.method, in_memory.dataset, tmp_path / "out")
    assert same(spilled, in_memory.weights)
    kept = [note.split(" take ")[0] for note in notes(capsys.readouterr().out) if "on disk" in note]
    captions = 2 if case.classes else len(case.shapes)
    classes = [f"The latents of {case.classes} pictures"] if case.classes else []
    assert kept == [f"The embeddings of {captions} captions", f"The latents of {len(case.shapes)} pictures", *classes]
    assert list((tmp_path / "cache" / "spilled").iterdir()) == []


def test_a_run_goes_on_wherever_its_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["text-to-image-lora, buckets and dropped captions"]
    method, dataset = method_of(case, tmp_path, checkpointing_steps=2), dataset_of(case, tmp_path)

    def run(output: str) -> int:
        arguments = [f"--dataset={dataset}", f"--output={tmp_path / output}", *method.to_args()]
        return main(["train", method.name, *arguments])

    def result(output: str) -> bytes:
        return (tmp_path / output / "pytorch_lora_weights.safetensors").read_bytes()

    monkeypatch.setattr("sdtune.training.interrupts.listen", lambda: None)
    assert run("undisturbed/cat") == 0
    trainer = importlib.import_module(f"sdtune.training.trainers.{method.trainer}")
    steps, real = iter(range(100)), trainer.diffusion_loss

    def stopped(*arguments: Any) -> torch.Tensor:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with everything_spilled(), patch.object(trainer, "diffusion_loss", stopped):
        assert run("stopped/cat") == 130
    assert run("stopped/cat") == 0
    assert result("stopped/cat") == result("undisturbed/cat")


def test_buckets_change_nothing_for_pictures_of_one_shape(tmp_path: Path) -> None:
    case = replace(CASES["text-to-image"], shapes=[SQUARE] * 3)
    dataset = dataset_of(case, tmp_path)
    with_buckets, without = (
        trained(method_of(case, tmp_path, enable_bucket=enabled), dataset, tmp_path / f"out-{enabled}")
        for enabled in (True, False)
    )
    assert same(with_buckets, without)


def test_batches_of_a_bucket_are_those_of_its_pictures_alone(tmp_path: Path, run: Run, parts: Parts) -> None:
    case = CASES["text-to-image-lora, buckets and dropped captions"]
    dataset, method = dataset_of(case, tmp_path), method_of(case, tmp_path)
    run.dataset = dataset
    pictures, _ = read_dataset(method, run)
    captions = Captions(parts, method, pictures, run)
    mixed = cache_images(pictures, captions, parts, method, run)
    assert list(mixed.shapes) == list(case.shapes)
    for (height, width), bucket in mixed.by_shape().items():
        mine = [
            picture for picture, shape in zip(pictures, case.shapes, strict=True) if shape == (8 * width, 8 * height)
        ]
        alone = cache_images(mine, captions, parts, method, run)
        assert set(alone.shapes) == {(8 * width, 8 * height)}
        batches = [Batches(images, 2, torch.Generator().manual_seed(3)) for images in (bucket, alone)]
        for one, other in islice(zip(*batches, strict=True), 8):
            assert one.names == other.names
            assert torch.equal(one.latents, other.latents)
            assert torch.equal(one.captions, other.captions)
