"""LoRA by kohya-ss sd-scripts. A setting bears the name of the option of sd-scripts that it becomes."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from sdtune.methods.base import AVERAGE_LOSS, HELD_OUT_LOSS, Tunable
from sdtune.methods.fields import CheckpointFields, CommonFields
from sdtune.methods.ledger import Layout


class KohyaFields(CheckpointFields, CommonFields):
    """What sd-scripts' train_network.py is told, whatever the layout of the dataset."""

    metrics = (HELD_OUT_LOSS, AVERAGE_LOSS)

    network_dim: Annotated[
        int, Field(ge=1, le=512, description="Rank of the LoRA."), Tunable(4, 128, log=True, by_default=True)
    ] = 16
    network_alpha: Annotated[
        float | None,
        Field(gt=0, description="The LoRA is scaled by network_alpha / network_dim. Not given: equal to network_dim."),
        Tunable(1.0, 128.0, log=True),
    ] = None
    network_dropout: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of the LoRA's inner values that each step leaves out."),
        Tunable(0.0, 0.3),
    ] = 0.0
    conv_dim: Annotated[
        int | None,
        Field(ge=1, le=512, description="Also train the UNet's 3x3 convolutions, with this rank."),
        Tunable(4, 64, log=True),
    ] = None
    conv_alpha: Annotated[
        float | None,
        Field(gt=0, description="The same as network_alpha for convolutions. Not given: equal to conv_dim."),
    ] = None

    train_text_encoder: Annotated[
        bool, Field(description="Train a LoRA on the text encoder too."), Tunable(values=("true", "false"))
    ] = True
    unet_lr: Annotated[
        float | None,
        Field(gt=0, le=1, description="Learning rate of the UNet. Not given: learning_rate."),
        Tunable(1e-6, 1e-3, log=True),
    ] = None
    text_encoder_lr: Annotated[
        float | None,
        Field(gt=0, le=1, description="Learning rate of the text encoder. Not given: learning_rate."),
        Tunable(1e-7, 1e-3, log=True, when=("train_text_encoder", (True,))),
    ] = None
    optimizer_type: Annotated[
        Literal["AdamW", "AdamW8bit", "Lion", "Lion8bit", "Prodigy", "AdaFactor"],
        Field(description="The optimizer. 8-bit ones need a GPU; Prodigy wants learning_rate 1."),
        Tunable(values=("AdamW", "Lion")),
    ] = "AdamW"
    optimizer_args: Annotated[
        tuple[str, ...],
        Field(description="An argument of the optimizer, such as weight_decay=0.01 or betas=0.9,0.99; repeatable."),
    ] = ()
    lr_scheduler_num_cycles: Annotated[
        int,
        Field(ge=1, description="How often cosine_with_restarts starts again."),
        Tunable(1, 5, when=("lr_scheduler", ("cosine_with_restarts",))),
    ] = 1
    max_grad_norm: Annotated[
        float,
        Field(ge=0, description="Gradients are clipped to this norm; 0: they are not clipped."),
        Tunable(0.1, 2.0, log=True),
    ] = 1.0

    v_parameterization: Annotated[
        bool | None,
        Field(description="The base model predicts the velocity. Not given: as its scheduler or its metadata say."),
    ] = None
    zero_terminal_snr: Annotated[
        bool, Field(description="Train with noise that ends in pure noise; for models that predict the velocity.")
    ] = False
    min_snr_gamma: Annotated[
        float | None,
        Field(gt=0, description="Weight the loss by min-SNR with this gamma; 5.0 in the paper (arXiv:2303.09556)."),
        Tunable(1.0, 20.0, log=True),
    ] = None
    noise_offset: Annotated[
        float,
        Field(ge=0, le=1, description="Strength of noise added per picture and channel, for very dark or light."),
        Tunable(0.0, 0.1),
    ] = 0.0

    clip_skip: Annotated[
        int | None,
        Field(ge=1, le=12, description="Use the text encoder's layer so many from the end; 2 for many anime models."),
    ] = None
    max_token_length: Annotated[
        int, Field(ge=75, le=225, multiple_of=75, description="Tokens of a caption that are read.")
    ] = 75
    shuffle_caption: Annotated[
        bool, Field(description="Shuffle the parts of a caption between its commas; for captions made of tags.")
    ] = False
    keep_tokens: Annotated[
        int,
        Field(ge=0, description="Parts at the beginning of a caption that are not shuffled, such as its rare word."),
    ] = 0
    caption_dropout_rate: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of pictures that are shown without their caption."),
        Tunable(0.0, 0.2),
    ] = 0.0

    flip_aug: Annotated[
        bool, Field(description="Mirror pictures at random. Harms faces, text and everything with a left and right.")
    ] = False
    cache_latents: Annotated[
        bool, Field(description="Encode every picture once, before training: much faster, less memory.")
    ] = True
    random_crop: Annotated[bool, Field(description="Cut pictures at random places instead of their middle.")] = False
    save_precision: Annotated[
        Literal["float", "fp16", "bf16"], Field(description="Type of the numbers in the LoRA's files.")
    ] = "fp16"

    @property
    def alpha(self) -> float:
        """``network_alpha``, or its default. (That of sd-scripts is 1, which trains weakly at any other rank.)"""
        return float(self.network_dim) if self.network_alpha is None else self.network_alpha

    @field_validator("conv_alpha")
    @classmethod
    def _alpha_of_something(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        if alpha is not None and info.data.get("conv_dim", 1) is None:
            raise ValueError(f"found {alpha:g} without conv_dim, so nothing is scaled; give conv_dim or leave it out.")
        return alpha

    @field_validator("text_encoder_lr")
    @classmethod
    def _rate_of_something(cls, rate: float | None, info: ValidationInfo) -> float | None:
        if rate is not None and info.data.get("train_text_encoder") is False:
            raise ValueError(f"found {rate:g} with train_text_encoder false: it trains nothing; leave one of them out.")
        return rate

    @field_validator("optimizer_type")
    @classmethod
    def _prodigy_finds_the_rate(cls, optimizer: str, info: ValidationInfo) -> str:
        rates = {name: info.data.get(name) for name in ("learning_rate", "unet_lr", "text_encoder_lr")}
        small = [f"{name} {rate:g}" for name, rate in rates.items() if rate is not None and rate < 0.1]
        if optimizer == "Prodigy" and small:
            raise ValueError(
                f"found Prodigy with {', '.join(small)}. It finds the rate itself and multiplies it by this; "
                "wanted about 1, or another optimizer."
            )
        return optimizer

    @field_validator("optimizer_args")
    @classmethod
    def _are_assignments(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        for argument in arguments:
            if not re.fullmatch(r"[a-z]\w*=[\w.,+()\[\]-]+", argument):
                raise ValueError(f"found {argument!r}, wanted name=value without spaces, such as weight_decay=0.01.")
        return arguments

    @field_validator("lr_scheduler_num_cycles")
    @classmethod
    def _cycles_have_a_use(cls, cycles: int, info: ValidationInfo) -> int:
        scheduler = info.data.get("lr_scheduler")
        if cycles > 1 and scheduler not in (None, "cosine_with_restarts"):
            raise ValueError(f"found {cycles} with lr_scheduler {scheduler}; only cosine_with_restarts has cycles.")
        return cycles

    @field_validator("keep_tokens")
    @classmethod
    def _something_moves(cls, count: int, info: ValidationInfo) -> int:
        if count and info.data.get("shuffle_caption") is False:
            raise ValueError(f"found {count} without shuffle_caption: nothing moves; add it or leave this out.")
        return count

    @field_validator("random_crop")
    @classmethod
    def _crops_are_not_cached(cls, crop: bool, info: ValidationInfo) -> bool:
        if crop and info.data.get("cache_latents"):
            raise ValueError(
                "found true with cache_latents: a picture encoded once is cut once; add cache_latents false."
            )
        return crop


class KohyaDreamBoothLora(KohyaFields):
    """DreamBooth with LoRA on folders named <repeats>_<name>, by kohya-ss train_network.py."""

    name = "kohya-dreambooth-lora"
    summary = "Teach subjects from folders named <repeats>_<name> with kohya's sd-scripts, as a small LoRA file."
    container = "kohya"
    layout = Layout.KOHYA
    trainer = "kohya"

    class_data_dir: Annotated[
        str | None,
        Field(min_length=1, description="Regularisation pictures of the class, in folders named <repeats>_<name> too."),
    ] = None
    prior_loss_weight: Annotated[
        float,
        Field(gt=0, le=100, description="Weight of the regularisation pictures in the loss."),
        Tunable(0.1, 2.0, log=True),
    ] = 1.0

    @field_validator("prior_loss_weight")
    @classmethod
    def _weight_of_something(cls, weight: float, info: ValidationInfo) -> float:
        if weight != 1.0 and info.data.get("class_data_dir", "") is None:
            raise ValueError(f"found {weight:g} without class_data_dir, so nothing is weighted; give class_data_dir.")
        return weight


class KohyaNativeLora(KohyaFields):
    """LoRA on captioned images, by kohya-ss train_network.py."""

    name = "kohya-native-lora"
    summary = "Teach a style or many subjects from captioned pictures with kohya's sd-scripts, as a small LoRA file."
    container = "kohya"
    layout = Layout.CAPTIONED
    trainer = "kohya"
