"""Text-to-image: a style or a world learned from many captioned pictures."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sdtune.methods.base import Tunable
from sdtune.methods.fields import TrainingFields
from sdtune.methods.ledger import Layout
from sdtune.methods.method_fields import CaptionFields, FullFields, LoraFields


class TextToImage(FullFields, CaptionFields, TrainingFields):
    """All weights of the UNet on captioned pictures, by diffusers."""

    name = "text-to-image"
    summary = "Train on captioned pictures, as a whole model."
    container = "diffusers"
    layout = Layout.CAPTIONED
    trainer = "text_to_image"

    learning_rate: Annotated[
        float,
        Field(gt=0, le=1, description="Peak learning rate of the optimizer."),
        Tunable(1e-7, 1e-4, log=True, by_default=True),
    ] = 1e-5


class TextToImageLora(LoraFields, CaptionFields, TrainingFields):
    """LoRA on captioned pictures, by diffusers and PEFT."""

    name = "text-to-image-lora"
    summary = "Train on captioned pictures, as a small LoRA file."
    container = "diffusers"
    layout = Layout.CAPTIONED
    trainer = "text_to_image_lora"
