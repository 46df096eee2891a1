"""The parts of a Stable Diffusion model, loaded for training."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdtune import events
from sdtune.errors import RecipeError, TrainingError
from sdtune.methods.base_models import BaseModel
from sdtune.methods.buckets import bucket_step
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.base_model_copy import base_model_here
from sdtune.training.components.compiled import compile_blocks, note_change
from sdtune.training.components.fused import fuse
from sdtune.training.components.lora_weights import Family
from sdtune.training.components.single_file import read_single_file
from sdtune.training.run import Run

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PARTS = {
    "tokenizer": (CLIPTokenizer, False),
    "text_encoder": (CLIPTextModel, True),
    "vae": (AutoencoderKL, True),
    "unet": (UNet2DConditionModel, True),
    "scheduler": (DDPMScheduler, False),
}
"""The parts of a pipeline: their classes, and whether they have weights."""
XL_PARTS = {"tokenizer_2": (CLIPTokenizer, False), "text_encoder_2": (CLIPTextModelWithProjection, True)}


@dataclass
class Parts:
    """The model in its parts; frozen but for what a trainer trains.

    tokenizers, text_encoders: one of each, two for SDXL. Frozen parts compute in the run's weight type; SDXL's VAE is
    float32 always, because half precision overflows in it. The UNet is on the run's device, and so is what is trained;
    the others are there while they are ``at_work``, so that their memory is free for training. fused: the UNet computes
    with the fused kernels.
    """

    tokenizers: list[Any]
    text_encoders: list[Any]
    vae: Any
    unet: Any
    noise_scheduler: Any
    family: Family
    fused: bool = False

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures the model was made for."""
        return int(self.unet.config.sample_size * self.vae_scale)

    @property
    def v_prediction(self) -> bool:
        """The UNet predicts the velocity instead of the noise."""
        return bool(self.noise_scheduler.config.prediction_type == "v_prediction")

    @property
    def vae_scale(self) -> int:
        """Pixels per latent: 8 for Stable Diffusion."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def bucket_step(self) -> int:
        """What sides of pictures are multiples of, in pixels."""
        return bucket_step(self.resolution, self.vae_scale * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def by_name(self) -> dict[str, Any]:
        """The parts under their names in a diffusers pipeline."""
        named = {"vae": self.vae, "unet": self.unet, "scheduler": self.noise_scheduler}
        for suffix, tokenizer, encoder in zip(("", "_2"), self.tokenizers, self.text_encoders, strict=False):
            named |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
        return named

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The parts without dropout inside the block; afterwards as they were."""
        training = [module.training for module in self.modules]
        try:
            for module in self.modules:
                module.eval()
            yield
        finally:
            for module, was in zip(self.modules, training, strict=True):
                module.train(was)

    @contextmanager
    def at_work(self, *modules: Any) -> Iterator[None]:
        """The modules on the UNet's device inside the block; frozen ones leave it afterwards."""
        try:
            for module in modules:
                module.to(self.unet.device)
            yield
        finally:
            for module in modules:
                if not any(weight.requires_grad for weight in module.parameters()):
                    module.to("cpu")

    def is_mixed(self, dtype: torch.dtype) -> bool:
        """Whether the UNet and text encoders have weights of other types than ``dtype``, the compute type."""
        computing = (self.unet, *self.text_encoders)
        return any(weight.dtype is not dtype for module in computing for weight in module.parameters())

    def computing(self, run: Run) -> AbstractContextManager[Any]:
        """The context to call UNet and text encoders in: autocast, where float32 weights are to compute in half."""
        context: AbstractContextManager[Any] = nullcontext()
        if self.is_mixed(run.weight_dtype):
            context = run.accelerator.autocast()
        return context

    @property
    def modules(self) -> list[Any]:
        """Everything with weights."""
        return [*self.text_encoders, self.vae, self.unet]


def load_parts(method: TrainingFields, run: Run, trained: Collection[str] = ()) -> Parts:
    """Load the base model. TrainingError says what is missing or of which family sdtune has no trainer.

    trained: ``unet``, ``text_encoder`` where all of its weights are to be trained, which must be float32 then.
    """
    # The first process of a machine fetches it, the others find it there.
    with run.accelerator.local_main_process_first():
        base = base_model_here(method)
    if base.path and base.path.is_file():
        loaded = read_single_file(base.path, torch.float32, prediction_type=method.prediction_type)
    else:
        loaded = _from_pretrained(base, method, run.weight_dtype, trained)
    suffixes = ("", "_2") if "text_encoder_2" in loaded else ("",)
    parts = Parts(
        tokenizers=[loaded[f"tokenizer{suffix}"] for suffix in suffixes],
        text_encoders=[loaded[f"text_encoder{suffix}"] for suffix in suffixes],
        vae=loaded["vae"],
        unet=loaded["unet"],
        noise_scheduler=_noise_scheduler(loaded["scheduler"].config, method),
        family=_family(loaded),
    )
    _check_clip_skip(parts, method)
    run.record.sdxl = parts.family is Family.SDXL
    full = [
        *(parts.text_encoders if "text_encoder" in trained else []),
        *([parts.unet] if "unet" in trained else []),
        *([parts.vae] if parts.family is Family.SDXL else []),
    ]
    for module in parts.modules:
        module.requires_grad_(False)
        module.eval()
        # What came from a folder is so already. Not by diffusers' own to(), which warns of every cast.
        torch.nn.Module.to(module, torch.float32 if module in full else run.weight_dtype)
    parts.unet.to(run.device)
    note_change(method, run)
    if method.torch_compile:
        compile_blocks(parts.unet, run, instead=lambda: _fuse(parts, run))
    else:
        _fuse(parts, run)
    if method.gradient_checkpointing:
        _recompute_activations(parts.unet, dropout=bool(getattr(method, "lora_dropout", 0.0)))
    return parts


def _fuse(parts: Parts, run: Run) -> None:
    if run.weight_dtype is not torch.float32:
        parts.fused = fuse(parts.unet, lambda text: run.tell(events.Note(text, "warning")))


def _recompute_activations(unet: Any, *, dropout: bool) -> None:
    """Gradient checkpointing. Random states are kept for dropout alone: reading them cannot be recorded in a graph."""

    def recomputed(module: Any, *arguments: Any) -> Any:
        return checkpoint(module, *arguments, use_reentrant=False, preserve_rng_state=dropout)

    unet.enable_gradient_checkpointing(recomputed)


def _from_pretrained(
    base: BaseModel, method: TrainingFields, dtype: torch.dtype, trained: Collection[str]
) -> dict[str, Any]:
    """The parts of a diffusers folder or a Hugging Face id, by their names in a pipeline.

    Frozen weights are of ``dtype`` as they are read, so that they never take the memory of float32; trained ones, and
    SDXL's VAE, are float32. Pickled weights (.bin) are opened by torch's reader of tensors alone.
    """
    place, revision = base.path or base.name, {"revision": method.revision} if method.revision else {}
    try:
        config = DiffusionPipeline.load_config(place, **revision)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"base_model: {base.name} cannot be loaded ({error}). Check the name; a gated model needs a Hugging Face "
            "token, and a machine without the network a diffusers folder."
        ) from None
    pipeline = config.get("_class_name")
    if pipeline not in PIPELINES:
        raise TrainingError(
            f"base_model: {base.name} is a {pipeline}; {method.name} trains Stable Diffusion 1.x, 2.x and XL "
            f"({' or '.join(PIPELINES)})."
        )
    kinds = {**PARTS, **XL_PARTS} if pipeline == "StableDiffusionXLPipeline" else PARTS
    loaded: dict[str, Any] = {}
    try:
        for part, (kind, weights) in kinds.items():
            full = (part == "vae" and kinds is not PARTS) or part.removesuffix("_2") in trained
            options = {"dtype": torch.float32 if full else dtype} if weights else {}
            loaded[part] = kind.from_pretrained(place, subfolder=part, **options, **revision)
    except pickle.UnpicklingError:
        raise TrainingError(
            f"base_model: the .bin file of the {part} in {base.name} does not hold weights alone, or is damaged. "
            "Pickled files can run code, and sdtune opens only their tensors; convert the model to .safetensors with a "
            "tool you trust."
        ) from None
    except (OSError, ValueError) as error:
        raise TrainingError(f"base_model: {base.name} is not whole: {error}") from None
    return loaded


def _noise_scheduler(config: Mapping[str, Any], method: TrainingFields) -> DDPMScheduler:
    """The base model's noise schedule with what the method changes of it, which is saved with a whole model."""
    changes: dict[str, Any] = {}
    if method.prediction_type is not None:
        changes["prediction_type"] = method.prediction_type
    if method.rescale_betas_zero_snr:
        # A picture must be drawn from the last step, the pure noise, which "leading" leaves out.
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDPMScheduler.from_config({**config, **changes})
    if method.rescale_betas_zero_snr and scheduler.config.prediction_type != "v_prediction":
        raise RecipeError(
            f"rescale_betas_zero_snr: {method.base_model} predicts the noise, from which nothing is learned at pure "
            "noise; it is for models of the velocity, or give --prediction-type v_prediction to teach it that."
        )
    return scheduler


def _check_clip_skip(parts: Parts, method: TrainingFields) -> None:
    layers = min(encoder.config.num_hidden_layers for encoder in parts.text_encoders)
    most = layers - (2 if parts.family is Family.SDXL else 1)
    if method.clip_skip > most:
        raise TrainingError(
            f"clip_skip: found {method.clip_skip}, but this text encoder has {layers} layers; "
            f"at most {most} can be left out."
        )


def pipeline_of(parts: Parts, **others: Any) -> Any:
    """The parts as a diffusers pipeline that draws; ``others`` take the place of parts."""
    if parts.family is Family.SDXL:
        return StableDiffusionXLPipeline(**{**parts.by_name, **others})
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**{**parts.by_name, **checker, **others})


def _family(loaded: Mapping[str, Any]) -> Family:
    """SD 2.x reads OpenCLIP's text encoder, 1024 wide; 1.x reads CLIP's."""
    if "text_encoder_2" in loaded:
        return Family.SDXL
    return Family.SD2 if loaded["unet"].config.cross_attention_dim == 1024 else Family.SD1
