"""Numbers in words, and what the files of a result are for, as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

MEANING = {
    "model": "for diffusers: from_pretrained",
    "single_file": "the same in one file, for A1111, Forge, ComfyUI, SD.Next",
    "lora": "for diffusers",
    "kohya_lora": "for A1111, Forge, ComfyUI, SD.Next",
    "bin": "the same for old tools",
    "peft": "for PEFT: PeftModel.from_pretrained",
    "contact_sheet": "before and after, to look at",
    "tensorboard": "curves: tensorboard --logdir",
    "card": "what it is and how to use it, for people",
    "recipe": "the settings, for --config",
    "hub": "on the Hugging Face Hub",
    "notebook": "executed, for Jupyter",
    "picture": "what a cell drew",
}
"""Of the kinds of artifacts."""


def count(number: int, noun: str) -> str:
    """``1 step``, ``400 steps``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """``75.2`` as ``1 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def age(since: datetime | None) -> str:
    """How long ago, in its largest unit: ``12 s``, ``4 min``, ``3 h``, ``2 d``; ``-`` where it is not known."""
    if since is None:
        return "-"
    seconds = (datetime.now(UTC) - since).total_seconds()
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
