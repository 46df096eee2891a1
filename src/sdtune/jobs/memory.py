"""How much memory of each GPU a run will take at its peak, told before it is paid for.

A run has phases, and its peak is that of the largest: pictures are encoded by the VAE, then trained on, and samples are
drawn before and after; what a phase does not need is not on the GPU. The numbers below were measured with
``benchmarks/gpu_memory.py`` (torch 2.11, diffusers 0.42 on an H100); ``tests/jobs/test_memory.py`` holds the formula
against what was measured. Not measured, but computed in the same way: fp16 (as bf16), SD 2.x (as 1.x), optimizers other
than AdamW, and adapters other than plain LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from sdtune.jobs.machine_table import GPUS, Gpu
from sdtune.methods.base_models import BaseModel
from sdtune.methods.catalog import find_method
from sdtune.methods.fields import CommonFields

Family = Literal["sd1", "sd2", "sdxl"]
GIB = 2**30
MEGAPIXEL = 2**20
FLOAT, HALF = 4, 2
"""Bytes of a number. What is trained is float32; what is frozen, and what is computed, in half where that is mixed."""


@dataclass(frozen=True)
class Model:
    """What is known of a family of base models.

    resolution: side in pixels of its pictures. unet, text, vae: parameters. adafactor: numbers that Adafactor keeps of
    the UNet, which are fewer than its parameters, but not for convolutions. lora, text_lora, conv: parameters of a LoRA
    for each rank: of the UNet's attention, the text encoders' and the UNet's convolutions.
    activations: GiB that the backward pass needs of one picture of 1024 x 1024 pixels, by what is computed in: in
    half, in float32, without the fused kernels; checkpointed: the same with gradient checkpointing.
    text_activations: GiB of one caption.
    """

    resolution: int
    unet: int
    text: int
    adafactor: int
    lora: int
    text_lora: int
    conv: int
    activations: dict[int, float]
    checkpointed: dict[int, float]
    text_activations: float
    vae: int = 83_653_863
    vae_in_float: bool = False


# Of SDXL in float32 nothing was measured; it is taken for as much more as with SD 1.x.
_SD1 = {"activations": {HALF: 4.34, FLOAT: 6.2}, "checkpointed": {HALF: 1.02, FLOAT: 1.74}, "text_activations": 0.04}
_SDXL = {"activations": {HALF: 7.2, FLOAT: 10.3}, "checkpointed": {HALF: 0.69, FLOAT: 1.2}, "text_activations": 0.2}
MODELS: dict[str, Model] = {
    "sd1": Model(512, 859_520_964, 123_060_480, 457_589_700, 199_296, 73_728, 544_000, **cast(Any, _SD1)),
    "sd2": Model(768, 865_910_724, 340_387_840, 408_086_212, 207_488, 188_416, 544_000, **cast(Any, _SD1)),
    "sdxl": Model(
        1024, 2_567_463_684, 817_720_320, 244_330_500, 1_451_520, 401_408, 355_840, **cast(Any, _SDXL),
        vae_in_float=True,
    ),
}  # fmt: skip

STATE = {"adamw": 8.0, "adamw8bit": 2.06, "prodigy": 16.0, "adafactor": 1.0, "lion": 4.0, "lion8bit": 1.03}
"""Bytes that an optimizer keeps of each trained parameter; of Adafactor see Model."""
ENCODER_TENSORS = 6 * 128
"""Numbers for each pixel that the VAE holds at once while it encodes: six tensors of 128 channels."""
DECODED = {HALF: 3.5, FLOAT: 4.8}
"""GiB that the VAE takes to draw one picture of 1024 x 1024 pixels, by what it computes in."""
FUSED = 0.57
"""The fused kernels keep so much of the activations: what is cheap they compute again."""
WHOLE_MODEL = 1.25
"""All weights are trained: so much more is kept for the backward pass than beside a LoRA."""
WORKSPACE = 2.0
"""GiB that cuDNN takes at least for the gradients of a whole model's convolutions, however few pictures."""
LATE = 0.6
"""In sd-scripts gradients are complete when most of the activations are gone: so much of a checkpointed picture is
left."""
OTHER_ADAPTERS = 1.5
"""DoRA, and PEFT's adapters that are no LoRA, for the activations of a LoRA."""
KOHYA = 1.6
"""sd-scripts' activations for those of ours."""
BASE = 0.3
"""GiB of captions, latents and workspace."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak GiB of one GPU, and what they are made of.

    frozen: weights that are on the GPU while it trains and are not trained. trained: those that are, with their copies
    in half, gradients, the optimizer's state and the moving average. step: what a step needs besides. encoding,
    drawing: the whole of these phases. family, resolution: what it is for.
    """

    family: Family
    resolution: int
    frozen: float
    trained: float
    step: float
    encoding: float
    drawing: float

    @property
    def training(self) -> float:
        return BASE + self.frozen + self.trained + self.step

    @property
    def gib(self) -> float:
        """The largest of the phases."""
        return max(self.training, self.encoding, self.drawing)


def estimate(method: CommonFields, family: Family, resolution: int, *, fused: bool = True) -> MemoryEstimate:
    """The peak of a run of ``method``, at the settings that it has. fused: the GPU has the fused kernels."""
    told, model = _Told(method, fused=fused), MODELS[family]
    pixels = resolution * resolution / MEGAPIXEL
    vae = model.vae * (FLOAT if model.vae_in_float else told.compute)
    text_trained = told.text_encoder and told.whole
    unet = 0 if told.whole else told.compute * model.unet
    text = 0 if text_trained else told.compute * model.text
    parameters = _trained(told, model)
    state = FLOAT * model.adafactor * (parameters / model.unet if told.whole else 0)
    if told.optimizer != "adafactor":
        state = STATE[told.optimizer] * parameters
    trained = state + parameters * (FLOAT + (FLOAT if told.ema else 0))

    pictures = told.pictures * pixels
    checkpointed = model.checkpointed[told.compute] * told.activations
    kept = checkpointed if told.checkpointing else model.activations[told.compute] * told.activations
    kept = kept * pictures + (model.text_activations * told.pictures if told.text_encoder else 0)
    copies, gradients = (HALF * parameters if told.compute == HALF else 0), FLOAT * parameters
    if told.kohya:
        # All stays on the GPU. Copies in half are made before the gradients, which come as the activations go.
        frozen = vae + unet + text
        step = max(copies / GIB + kept, gradients / GIB + LATE * checkpointed * pictures)
    else:
        frozen = unet + (text if told.text_encoder else 0)
        trained += 2 * copies + (0 if told.half_gradients else gradients)
        step = max(kept, WORKSPACE) if told.whole else kept

    of_vae = FLOAT if model.vae_in_float else told.compute
    encoded = ENCODER_TENSORS * of_vae * MEGAPIXEL / GIB
    decoded = DECODED[of_vae] * pixels
    loaded = (vae + unet + FLOAT * (parameters if told.whole else 0) + (text if told.kohya else 0)) / GIB
    return MemoryEstimate(
        family, resolution, frozen / GIB, trained / GIB, step,
        encoding=BASE + loaded + encoded * pixels * told.encoded_at_once(resolution),
        drawing=max(
            BASE + loaded + text / GIB + decoded * told.drawn_before,
            BASE + (vae + unet + text + trained) / GIB + decoded * told.drawn,
        ),
    )  # fmt: skip


def fits(needed: MemoryEstimate, gpu: Gpu) -> bool:
    """Whether the GPU has so much."""
    return needed.gib <= usable(gpu)


def usable(gpu: Gpu) -> float:
    """GiB that torch can fill: a tenth is counted by the maker alone or lost in gaps, and CUDA itself takes some."""
    return 0.9 * gpu.memory_gib - 1


def memory_advice(method: CommonFields, base_model: BaseModel, gpu: Gpu) -> str | None:
    """A warning if the run will not fit the GPU; None if it will, or if the base model is of no family known here."""
    family = family_of(base_model)
    if family is None:
        return None
    resolution = method.resolution or base_model.resolution or MODELS[family].resolution
    return advice(method, estimate(method, family, resolution, fused=gpu.bf16), gpu)


def advice(method: CommonFields, needed: MemoryEstimate, gpu: Gpu) -> str | None:
    """One sentence: what is missing, and which options would help, most first; None if it fits."""
    if fits(needed, gpu):
        return None
    others = [
        (estimate(other, needed.family, side, fused=gpu.bf16), words) for other, side, words in _others(method, needed)
    ]
    helping = sorted((one for one in others if one[0].gib < 0.97 * needed.gib), key=lambda one: one[0].gib)
    # What is not enough by itself is told only where nothing is.
    helping = [one for one in helping if fits(one[0], gpu)] or helping
    options = [
        estimate(method.model_copy(update=changes), needed.family, needed.resolution, fused=gpu.bf16)
        for changes, _ in _changes(method)
    ]
    if len(options) > 1 and not any(fits(one, gpu) for one in options):
        helping.append(_together(method, needed, fused=gpu.bf16))
    told = [f"{words} (about {other.gib:.0f} GiB)" for other, words in helping]
    larger = [other for other in GPUS if fits(needed, other) and not other.refused]
    if larger:
        told.append(f"--gpu {larger[0].name}, which has {larger[0].memory_gib}")
    kind = {needed.encoding: " to encode its pictures", needed.drawing: " to draw its samples"}.get(needed.gib, "")
    what_helps = f" What helps, most first: {'; '.join(told)}." if told else ""
    return (
        f"memory: {method.name} at {needed.resolution} px with {method.train_batch_size} at once will need about "
        f"{needed.gib:.0f} GiB{kind}, and the {gpu.memory_gib} GiB of {gpu.name} leave {usable(gpu):.0f}.{what_helps}"
    )


def largest_batch(method: CommonFields, family: Family, resolution: int, gpu: Gpu, most: int = 256) -> int:
    """The largest ``train_batch_size`` that fits; 0: none does."""
    low, high = 0, most
    while low < high:
        batch = (low + high + 1) // 2
        sized = method.model_copy(update={"train_batch_size": batch})
        needed = estimate(sized, family, resolution, fused=gpu.bf16)
        low, high = (batch, high) if fits(needed, gpu) else (low, batch - 1)
    return low


def family_of(base_model: BaseModel) -> Family | None:
    """By the resolution of a folder, or by the name; None if neither tells."""
    name = base_model.name.lower()
    # An id is told by its own part: an owner's name may be anything.
    name = name if base_model.path else name.rpartition("/")[2]
    by_resolution: dict[int | None, Family] = {512: "sd1", 768: "sd2", 1024: "sdxl"}
    if base_model.resolution:
        return by_resolution.get(base_model.resolution)
    by_name: tuple[tuple[Family, tuple[str, ...]], ...] = (
        ("sdxl", ("xl",)),
        ("sd2", ("stable-diffusion-2", "sd-2", "sd2", "v2-1", "v2-base")),
        ("sd1", ("stable-diffusion-v1", "stable-diffusion-1", "sd-v1", "sd1", "v1-4", "v1-5", "sd-1")),
    )
    return next((family for family, parts in by_name if any(part in name for part in parts)), None)


class _Told:
    """What a method's settings mean for memory, whichever library does the work."""

    def __init__(self, method: CommonFields, *, fused: bool = True) -> None:
        def setting(name: str, otherwise: Any = None) -> Any:
            return getattr(method, name, otherwise)

        kohya = method.container == "kohya"
        self.kohya = kohya
        self.whole = not kohya and "rank" not in type(method).model_fields
        self.compute = FLOAT if method.mixed_precision == "no" else HALF
        self.text_encoder = bool(setting("train_text_encoder", False))
        self.optimizer = str(setting("optimizer") or setting("optimizer_type")).lower()
        self.ema = bool(setting("use_ema", False))
        self.checkpointing = method.gradient_checkpointing
        prior = bool(setting("with_prior_preservation", False))
        self.pictures = method.train_batch_size * (2 if prior else 1)
        self.rank = int(setting("rank") or setting("network_dim") or 0)
        self.text_rank = int(setting("text_encoder_rank") or self.rank)
        self.conv_rank = int(setting("conv_rank") or setting("conv_dim") or 0)
        plain = setting("adapter", "lora") == "lora" and not setting("use_dora", False)
        self.activations = KOHYA if kohya else WHOLE_MODEL if self.whole else 1.0 if plain else OTHER_ADAPTERS
        fused = fused and self.compute == HALF and not kohya and not setting("torch_compile", False)
        self.activations *= FUSED if fused else 1.0
        # As ``FlatAdamW`` does it: gradients are added up in float32 elsewhere.
        once = method.gradient_accumulation_steps == 1 and method.mixed_precision != "fp16"
        self.half_gradients = fused and once and self.optimizer == "adamw"
        self.drawn = int(method.num_samples > 0 and bool(method.sample_prompts()))
        drawn_classes = prior and not setting("class_data_dir")
        self.drawn_before = max(self.drawn, int(drawn_classes))

    def encoded_at_once(self, resolution: int) -> int:
        """Pictures in a batch of the VAE."""
        return 1 if self.kohya else max(1, 4 * 512 * 512 // resolution**2)


def _trained(told: _Told, model: Model) -> int:
    """Parameters that are trained."""
    if told.whole:
        return model.unet + (model.text if told.text_encoder else 0)
    text = model.text_lora * told.text_rank if told.text_encoder else 0
    return model.lora * told.rank + model.conv * told.conv_rank + text


def _others(method: CommonFields, needed: MemoryEstimate) -> Iterator[tuple[CommonFields, int, str]]:
    """Each change of one setting that takes less memory: the method with it, the resolution, how to ask for it."""
    for changes, words in _changes(method):
        yield method.model_copy(update=changes), needed.resolution, words
    smaller = [side for side in (512, 768) if side < needed.resolution]
    if smaller:
        yield method, smaller[-1], f"--resolution {smaller[-1]}"
    lora = find_method(f"{method.name}-lora") if method.name in ("dreambooth", "text-to-image") else None
    if lora:
        same = {name: value for name, value in method.settings().items() if name in lora.model_fields}
        yield lora.model_construct(**same), needed.resolution, f"the method {lora.name}"


def _changes(method: CommonFields) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes that leave what is learned nearly as it was."""
    told = _Told(method)
    if not told.checkpointing:
        yield {"gradient_checkpointing": True}, "--gradient-checkpointing"
    batch = method.train_batch_size
    if batch > 1:
        steps = batch * method.gradient_accumulation_steps
        smaller = {"train_batch_size": 1, "gradient_accumulation_steps": steps}
        yield smaller, f"--train-batch-size 1 --gradient-accumulation-steps {steps}"
    if told.compute == FLOAT:
        yield {"mixed_precision": "auto"}, "--mixed-precision auto"
    if told.whole and told.optimizer in ("adamw", "prodigy"):
        yield {"optimizer": "adafactor"}, "--optimizer adafactor"
    if told.text_encoder:
        yield {"train_text_encoder": False}, "--no-train-text-encoder"
    if told.ema:
        yield {"use_ema": False}, "--no-use-ema"
    if told.drawn:
        yield {"num_samples": 0}, "--num-samples 0"


def _together(method: CommonFields, needed: MemoryEstimate, *, fused: bool) -> tuple[MemoryEstimate, str]:
    """All of these changes at once, and how to ask for them."""
    words = []
    for changes, word in _changes(method):
        method = method.model_copy(update=changes)
        words.append(word)
    return estimate(method, needed.family, needed.resolution, fused=fused), f"{' '.join(words)} together"
