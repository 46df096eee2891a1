"""All methods by name."""

from __future__ import annotations

import difflib

from sdtune.errors import RecipeError
from sdtune.methods.dreambooth import DreamBooth, DreamBoothLora
from sdtune.methods.fields import CommonFields
from sdtune.methods.kohya import KohyaDreamBoothLora, KohyaNativeLora
from sdtune.methods.text_to_image import TextToImage, TextToImageLora

ALL = (DreamBooth, DreamBoothLora, TextToImage, TextToImageLora, KohyaDreamBoothLora, KohyaNativeLora)
METHODS: dict[str, type[CommonFields]] = {method.name: method for method in ALL}


def find_method(name: str) -> type[CommonFields]:
    """The method called ``name``. RecipeError names the nearest ones."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(METHODS)}."
    raise RecipeError(f"no method is called {name!r}; {hint}")
