"""What can be said of a base model without loading it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtune.errors import RecipeError

CHECKPOINTS = (".safetensors", ".ckpt")
"""What a single file with all weights of a model is called."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class BaseModel:
    """A base model as the settings name it.

    path: its folder or file on this machine; None for a Hugging Face id, which is fetched at the start of the run.
    resolution: side in pixels of the pictures it was made for; None where only loading it would tell.
    """

    name: str
    path: Path | None
    resolution: int | None


def find_base_model(name: str) -> BaseModel:
    """The base model ``name`` stands for: a diffusers folder, one file with all weights, or a Hugging Face id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise RecipeError(
                f"base_model: {name} is a folder without model_index.json; wanted the folder of a whole diffusers "
                "pipeline (unet/, vae/, text_encoder/, tokenizer/, scheduler/), as save_pretrained writes it."
            )
        return BaseModel(name, folder.resolve(), _resolution(folder))
    if folder.exists():
        if folder.suffix not in CHECKPOINTS:
            raise RecipeError(
                f"base_model: {name} is a file, but none of {', '.join(CHECKPOINTS)}; wanted a diffusers folder, "
                "a checkpoint file or a Hugging Face id."
            )
        return BaseModel(name, folder.resolve(), None)
    if not _HUB_ID.fullmatch(name):
        raise RecipeError(
            f"base_model: no folder {name!r} here, and it is no Hugging Face id (owner/name) either; check the path."
        )
    return BaseModel(name, None, None)


def _resolution(folder: Path) -> int | None:
    """Latent side of the UNet times the VAE's scale: two for each of its blocks but the first."""
    unet, vae = _config(folder / "unet"), _config(folder / "vae")
    side, blocks = unet.get("sample_size"), vae.get("block_out_channels")
    return side * 2 ** (len(blocks) - 1) if isinstance(side, int) and isinstance(blocks, list) else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"base_model: {folder / 'config.json'} cannot be read ({error}); is the copy of the model whole?"
        ) from None
    return config if isinstance(config, dict) else {}
