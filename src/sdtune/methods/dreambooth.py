"""DreamBooth: a subject learned from a few pictures of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sdtune.methods.base import Tunable
from sdtune.methods.fields import TrainingFields
from sdtune.methods.ledger import Layout
from sdtune.methods.method_fields import DreamBoothFields, FullFields, LoraFields, TextEncoderFields


class DreamBooth(TextEncoderFields, FullFields, TrainingFields, DreamBoothFields):
    """DreamBooth on all weights of the UNet, by diffusers."""

    name = "dreambooth"
    summary = "Teach one subject from a few pictures, as a whole model."
    container = "diffusers"
    layout = Layout.IMAGES
    trainer = "dreambooth"

    learning_rate: Annotated[
        float,
        Field(gt=0, le=1, description="Peak learning rate of the optimizer."),
        Tunable(1e-7, 1e-4, log=True, by_default=True),
    ] = 5e-6

    def sample_prompts(self) -> tuple[str, ...]:
        return self.sample_prompt or (self.instance_prompt,)


class DreamBoothLora(LoraFields, TextEncoderFields, TrainingFields, DreamBoothFields):
    """DreamBooth with LoRA on the UNet, by diffusers and PEFT."""

    name = "dreambooth-lora"
    summary = "Teach one subject from a few pictures, as a small LoRA file."
    container = "diffusers"
    layout = Layout.IMAGES
    trainer = "dreambooth_lora"

    def sample_prompts(self) -> tuple[str, ...]:
        return self.sample_prompt or (self.instance_prompt,)
