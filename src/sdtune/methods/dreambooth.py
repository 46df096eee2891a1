"""DreamBooth: a subject learned from a few pictures of it."""

from __future__ import annotations

from sdtune.methods.fields import DreamBoothFields, LoraFields, TrainingFields
from sdtune.methods.ledger import Layout


class DreamBoothLora(LoraFields, TrainingFields, DreamBoothFields):
    """DreamBooth with LoRA on the UNet, by diffusers and PEFT."""

    name = "dreambooth-lora"
    summary = "Teach one subject from a few pictures, as a small LoRA file."
    container = "diffusers"
    layout = Layout.IMAGES
    trainer = "dreambooth_lora"

    def sample_prompts(self) -> tuple[str, ...]:
        return self.sample_prompt or (self.instance_prompt,)
