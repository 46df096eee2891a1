"""The settings that some methods have: of the subject, the captions, and what of the model is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sdtune.methods.base import Method, Tunable
from sdtune.methods.fields import Prompt


class DreamBoothFields(Method):
    """Teach one subject, named by a rare word, from a few pictures (Ruiz et al. 2022, arXiv:2208.12242)."""

    instance_prompt: Annotated[
        Prompt, Field(description='What every picture shows, with a rare word for the subject: "a photo of sks cat".')
    ]
    with_prior_preservation: Annotated[
        bool, Field(description="Train on pictures of the subject's class too, so that the model goes on drawing it.")
    ] = False
    class_prompt: Annotated[
        Prompt | None, Field(description='What the class pictures show, without the rare word: "a photo of a cat".')
    ] = None
    class_data_dir: Annotated[
        str | None, Field(min_length=1, description="Folder of class pictures; what is missing is drawn by the model.")
    ] = None
    num_class_images: Annotated[int, Field(ge=1, description="Class pictures to train on.")] = 100
    prior_loss_weight: Annotated[
        float,
        Field(gt=0, description="Weight of the class pictures in the loss."),
        Tunable(0.1, 2.0, log=True, when=("with_prior_preservation", (True,))),
    ] = 1.0

    @field_validator("class_prompt", "class_data_dir", "num_class_images", "prior_loss_weight")
    @classmethod
    def _belongs_to_the_prior(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        # None, if what was given for it is itself a mistake: that one is enough.
        wanted = info.data.get("with_prior_preservation")
        if wanted is False and value != cls.model_fields[name].default:
            raise ValueError(
                f"found {value!r}, which has no use without prior preservation; "
                "add --with-prior-preservation or leave it out."
            )
        if wanted and name == "class_prompt" and value is None:
            raise ValueError(
                "missing; prior preservation needs --class-prompt, "
                'the instance prompt without its rare word: "a photo of a cat".'
            )
        return value


class CaptionFields(Method):
    """Train on pictures that each have a caption of their own."""

    proportion_empty_prompts: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of captions replaced by nothing; helps classifier-free guidance."),
        Tunable(0.0, 0.2),
    ] = 0.0


class FullFields(Method):
    """Train all weights of the UNet."""

    save_precision: Annotated[
        Literal["float", "fp16", "bf16"], Field(description="Type of the numbers in the model's files.")
    ] = "fp16"
    use_ema: Annotated[
        bool,
        Field(description="Keep and save a moving average of the weights: smoother, for longer runs."),
        Tunable(values=("true", "false")),
    ] = False
    ema_decay: Annotated[
        float,
        Field(gt=0, lt=1, description="Decay of the moving average."),
        Tunable(values=(0.99, 0.999, 0.9999), when=("use_ema", (True,))),
    ] = 0.9999

    @field_validator("ema_decay")
    @classmethod
    def _belongs_to_ema(cls, decay: float, info: ValidationInfo) -> float:
        if not info.data.get("use_ema", False) and decay != cls.model_fields["ema_decay"].default:
            raise ValueError(f"found {decay}, which has no use without a moving average; add --use-ema.")
        return decay


class TextEncoderFields(Method):
    """Train the text encoder beside the UNet."""

    train_text_encoder: Annotated[
        bool, Field(description="Train the text encoder too."), Tunable(values=("true", "false"))
    ] = False
    text_encoder_lr: Annotated[
        float | None,
        Field(gt=0, le=1, description="Learning rate of the text encoder. Not given: learning_rate."),
        Tunable(1e-6, 1e-3, log=True, when=("train_text_encoder", (True,))),
    ] = None

    @field_validator("text_encoder_lr")
    @classmethod
    def _belongs_to_the_text_encoder(cls, rate: float | None, info: ValidationInfo) -> float | None:
        if rate is not None and not info.data.get("train_text_encoder", False):
            raise ValueError(f"found {rate}, but the text encoder is not trained; add --train-text-encoder.")
        return rate


class LoraFields(Method):
    """Train low-rank deltas beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Annotated[
        int,
        Field(ge=1, le=512, description="Rank of the LoRA matrices."),
        Tunable(4, 64, log=True, by_default=True),
    ] = 16
    lora_alpha: Annotated[
        float | None,
        Field(gt=0, description="The deltas are scaled by lora_alpha / rank. Not given: equal to rank."),
        Tunable(1.0, 64.0, log=True, when=("adapter", ("lora", "loha", "lokr"))),
    ] = None
    lora_dropout: Annotated[
        float, Field(ge=0, lt=1, description="Dropout on the input of each LoRA."), Tunable(0.0, 0.3)
    ] = 0.0
    target_modules: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(min_length=1, description="Layers of the UNet that get a LoRA, by the end of their names; repeatable."),
    ] = ("to_q", "to_k", "to_v", "to_out.0")
    use_dora: Annotated[
        bool,
        Field(description="Also learn the norm of each row of the weights (DoRA, arXiv:2402.09353); slower."),
        Tunable(values=("true", "false"), when=("adapter", ("lora",))),
    ] = False
    conv_rank: Annotated[
        int | None,
        Field(ge=1, le=512, description="Also train the UNet's 3x3 convolutions, with this rank."),
        Tunable(4, 64, log=True, when=("adapter", ("lora", "loha", "lokr"))),
    ] = None
    conv_alpha: Annotated[
        float | None, Field(gt=0, description="The same as lora_alpha for convolutions. Not given: equal to conv_rank.")
    ] = None
    save_bin: Annotated[
        bool, Field(description="Also write pytorch_lora_weights.bin, for tools from before safetensors.")
    ] = False

    @field_validator("conv_alpha")
    @classmethod
    def _belongs_to_convolutions(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        if alpha is not None and info.data.get("conv_rank", 1) is None:
            raise ValueError(f"found {alpha:g} without conv_rank, which has nothing to scale; give conv_rank.")
        return alpha

    @property
    def alpha(self) -> float:
        """``lora_alpha``, or its default."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha
