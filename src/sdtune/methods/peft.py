"""DreamBooth with any kind of adapter that PEFT has for these models, on the UNet and on the text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sdtune.methods.base import Tunable
from sdtune.methods.fields import TrainingFields
from sdtune.methods.ledger import Layout
from sdtune.methods.method_fields import DreamBoothFields, LoraFields, TextEncoderFields


@dataclass(frozen=True)
class AdapterKind:
    """What a kind of adapter has a use for."""

    alpha: bool = False
    dropout: bool = True
    bias: bool = True
    convolutions: bool = False
    dora: bool = False


ADAPTERS = {
    "lora": AdapterKind(alpha=True, convolutions=True, dora=True),
    "loha": AdapterKind(alpha=True, bias=False, convolutions=True),
    "lokr": AdapterKind(alpha=True, bias=False, convolutions=True),
    "oft": AdapterKind(),
    "boft": AdapterKind(),
    "hra": AdapterKind(dropout=False),
}
Bias = Literal["none", "all", "adapter_only"]


class PeftFields(LoraFields):
    """The settings of PEFT's adapters, those of the text encoder apart."""

    rank: Annotated[
        int,
        Field(
            ge=1, le=512, description="Rank of the matrices; side of the blocks of oft and boft; reflections of hra."
        ),
        Tunable(values=(4, 8, 16, 32, 64), log=True, by_default=True),
    ] = 16
    lora_dropout: Annotated[
        float,
        Field(
            ge=0, lt=1, description="Dropout: on the input of lora, of ranks of loha and lokr, of blocks of oft, boft."
        ),
        Tunable(0.0, 0.3, when=("adapter", ("lora", "loha", "lokr", "oft", "boft"))),
    ] = 0.0
    adapter: Annotated[
        Literal["lora", "loha", "lokr", "oft", "boft", "hra"],
        Field(description="The kind of adapter; web UIs know all but oft and boft."),
        Tunable(values=("lora", "loha", "lokr")),
    ] = "lora"
    bias: Annotated[
        Bias, Field(description="Also train the UNet's own biases: all, or those of layers with an adapter.")
    ] = "none"
    text_encoder_rank: Annotated[
        int | None,
        Field(ge=1, le=512, description="Rank in the text encoder. Not given: rank."),
        Tunable(values=(4, 8, 16, 32, 64), log=True, when=("train_text_encoder", (True,))),
    ] = None
    text_encoder_alpha: Annotated[
        float | None,
        Field(gt=0, description="The same as lora_alpha for the text encoder. Not given: the UNet's scale of it."),
    ] = None
    text_encoder_dropout: Annotated[
        float | None, Field(ge=0, lt=1, description="Dropout in the text encoder. Not given: lora_dropout.")
    ] = None
    text_encoder_bias: Annotated[
        Bias | None, Field(description="The same as bias for the text encoder. Not given: bias.")
    ] = None

    @field_validator("adapter")
    @classmethod
    def _has_what_was_asked(cls, adapter: str, info: ValidationInfo) -> str:
        """The settings that all LoRA methods share stand before this one, so what does not fit is told here."""
        kind = ADAPTERS[adapter]
        uses = {
            "lora_alpha": kind.alpha,
            "lora_dropout": kind.dropout,
            "use_dora": kind.dora,
            "conv_rank": kind.convolutions,
            "save_bin": adapter == "lora",
        }
        unused = [
            name for name, used in uses.items() if not used and info.data.get(name) != cls.model_fields[name].default
        ]
        if unused and all(name in info.data for name in unused):
            raise ValueError(f"found {adapter}, which has no {' and no '.join(unused)}; leave that out.")
        if adapter == "hra":
            _even(info.data.get("rank"))
        return adapter

    @field_validator("bias", "text_encoder_bias")
    @classmethod
    def _kind_has_a_bias(cls, bias: str | None, info: ValidationInfo) -> str | None:
        adapter = info.data.get("adapter")
        if adapter and bias not in (None, "none") and not ADAPTERS[adapter].bias:
            raise ValueError(f"found {bias}, but {adapter} leaves the biases as they are; leave it out.")
        if bias not in (None, "none") and info.data.get("save_bin"):
            raise ValueError(f"found {bias} with save_bin, a file that can hold no biases; leave one of them out.")
        return bias

    @field_validator("text_encoder_rank", "text_encoder_alpha", "text_encoder_dropout", "text_encoder_bias")
    @classmethod
    def _belongs_to_the_text_encoder_and_the_kind(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return value
        if info.data.get("train_text_encoder") is False:
            raise ValueError(f"found {value}, but the text encoder is not trained; add --train-text-encoder.")
        adapter = info.data.get("adapter", "lora")
        uses = {"text_encoder_alpha": ADAPTERS[adapter].alpha, "text_encoder_dropout": ADAPTERS[adapter].dropout}
        if not uses.get(str(info.field_name), True):
            raise ValueError(f"found {value}, which {adapter} has no use for; leave it out.")
        if adapter == "hra" and info.field_name == "text_encoder_rank":
            _even(value)
        return value


class PeftDreamBoothLora(PeftFields, TextEncoderFields, TrainingFields, DreamBoothFields):
    """DreamBooth with PEFT's adapters, saved as PEFT saves them too."""

    name = "peft-dreambooth-lora"
    summary = "Teach one subject with any of PEFT's adapters: LoRA, LoHa, LoKr, OFT, BOFT, HRA."
    container = "diffusers"
    layout = Layout.IMAGES
    trainer = "peft_dreambooth_lora"

    def sample_prompts(self) -> tuple[str, ...]:
        return self.sample_prompt or (self.instance_prompt,)


def _even(rank: int | None) -> None:
    """hra begins as pairs of reflections that undo each other."""
    if rank is not None and rank % 2:
        raise ValueError(f"found hra with the rank {rank}; its reflections come in pairs: use an even number.")
