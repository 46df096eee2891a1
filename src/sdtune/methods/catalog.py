"""All methods by name."""

from __future__ import annotations

import difflib

from sdtune.errors import RecipeError
from sdtune.methods.dreambooth import DreamBooth, DreamBoothLora
from sdtune.methods.fields import CommonFields
from sdtune.methods.kohya import KohyaDreamBoothLora, KohyaNativeLora
from sdtune.methods.peft import PeftDreamBoothLora
from sdtune.methods.text_to_image import TextToImage, TextToImageLora

ALL = (
    DreamBooth,
    DreamBoothLora,
    TextToImage,
    TextToImageLora,
    PeftDreamBoothLora,
    KohyaDreamBoothLora,
    KohyaNativeLora,
)
METHODS: dict[str, type[CommonFields]] = {method.name: method for method in ALL}

ALIASES = {
    "diffuser_dreambooth": "dreambooth",
    "diffuser_dreambooth_lora": "dreambooth-lora",
    "diffuser_text_to_image": "text-to-image",
    "diffuser_text_to_image_lora": "text-to-image-lora",
    "peft_lora": "peft-dreambooth-lora",
    "kohya_lora": "kohya-dreambooth-lora",
}
"""What the quick-start scripts, which sdtune supersedes, called them."""


def find_method(name: str) -> type[CommonFields]:
    """The method called ``name``, today or formerly. RecipeError names the nearest ones."""
    if ALIASES.get(name, name) in METHODS:
        return METHODS[ALIASES.get(name, name)]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(METHODS)}."
    raise RecipeError(f"no method is called {name!r}; {hint}")
