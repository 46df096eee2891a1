"""The base model as sd-scripts takes it: a whole folder or file on this disk, with its tokenizers beside it.

sd-scripts builds the UNets of Stable Diffusion 1, 2 and SDXL itself, takes the noise schedule for granted, and fetches
its tokenizers from Hugging Face by name unless it finds them in --tokenizer_cache_dir. So the model's shape is read
here, what cannot be told is refused, and the tokenizers are laid where it looks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdtune.errors import RecipeError, TrainingError
from sdtune.methods.kohya import KohyaFields
from sdtune.training.components.base_model_copy import base_model_here
from sdtune.training.components.lora_weights import Family
from sdtune.training.components.single_file import clip_vocabulary, config_folder, detect_family
from sdtune.training.kohya.shape import Shape, refuse_other_schedule, shape_of

CLIP_L, OPEN_CLIP_H, OPEN_CLIP_G = (
    "openai_clip-vit-large-patch14",
    "stabilityai_stable-diffusion-2",
    "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k",
)
TOKENIZERS = {
    Family.SD1: {"tokenizer": CLIP_L},
    Family.SD2: {"tokenizer": OPEN_CLIP_H},
    Family.SDXL: {"tokenizer": CLIP_L, "tokenizer_2": OPEN_CLIP_G},
}
"""By the folder in a diffusers model: the folder in --tokenizer_cache_dir that sd-scripts looks for."""


@dataclass(frozen=True)
class KohyaBase:
    """tokenizers: for --tokenizer_cache_dir, so that sd-scripts needs no network. shape: where it is not its own."""

    path: Path
    family: Family
    v_parameterization: bool
    resolution: int
    tokenizers: Path
    shape: Shape = field(default_factory=Shape)


def prepare_base(method: KohyaFields, work: Path) -> KohyaBase:
    """The base model, fetched if need be; what has to be changed for sd-scripts is a copy in ``work``.

    TrainingError: it cannot be loaded, or sd-scripts would not train it. RecipeError: a setting does not fit it.
    """
    path = _fetched(method)
    base = _of_file(method, path, work) if path.is_file() else _of_folder(method, path, work)
    if base.family is Family.SDXL and method.clip_skip is not None:
        raise RecipeError(
            f"clip_skip: found {method.clip_skip}, but SDXL always reads the last layer but one; drop it."
        )
    if method.zero_terminal_snr and not base.v_parameterization:
        raise RecipeError(
            f"zero_terminal_snr: {method.base_model} predicts the noise, which nothing can be learned from at pure "
            "noise; it is for models that predict the velocity."
        )
    return base


def _fetched(method: KohyaFields) -> Path:
    base = base_model_here(method)
    if base.path:
        return base.path
    try:
        return Path(DiffusionPipeline.download(base.name, revision=method.revision))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"base_model: {base.name} cannot be loaded ({error}). Check the name; a gated model needs a Hugging Face "
            "token, and a machine without the network a diffusers folder."
        ) from None


# --- a diffusers folder ----------------------------------------------------------------------------------------------


def _of_folder(method: KohyaFields, folder: Path, work: Path) -> KohyaBase:
    kind = _config(folder / "model_index.json").get("_class_name")
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise TrainingError(
            f"base_model: {method.base_model} is a {kind}; {method.name} trains Stable Diffusion 1.x, 2.x and XL."
        )
    unet = _config(folder / "unet" / "config.json")
    sdxl = kind == "StableDiffusionXLPipeline"
    family = Family.SDXL if sdxl else Family.SD2 if unet.get("cross_attention_dim") == 1024 else Family.SD1
    vae, text_encoder = (_config(folder / part / "config.json") for part in ("vae", "text_encoder"))
    shape = shape_of(method.base_model, sdxl, unet, vae, text_encoder)
    scheduler = _config(folder / "scheduler" / "scheduler_config.json")
    refuse_other_schedule(method.base_model, scheduler)
    _check_clip_skip(method, text_encoder)
    predicts_velocity = scheduler.get("prediction_type", "epsilon") == "v_prediction"
    return KohyaBase(
        path=_readable(folder, work),
        family=family,
        v_parameterization=predicts_velocity if method.v_parameterization is None else method.v_parameterization,
        resolution=int(unet["sample_size"]) * 8,
        tokenizers=_lay_tokenizers(method, folder, family, work / "tokenizers"),
        shape=shape,
    )


def _check_clip_skip(method: KohyaFields, text_encoder: dict[str, Any]) -> None:
    layers = text_encoder.get("num_hidden_layers", 12)
    if method.clip_skip is not None and method.clip_skip > layers:
        raise RecipeError(f"clip_skip: found {method.clip_skip}, but this text encoder has {layers} layers.")


def _readable(folder: Path, work: Path) -> Path:
    """``folder``, or one like it whose text encoder loads in the transformers that sd-scripts wants.

    transformers 5.6 dropped the level ``text_model`` from the names in CLIPTextModel. Older ones find none of the
    weights under the new names, and train on random ones after a warning.
    """
    weights = folder / "text_encoder" / "model.safetensors"
    if not weights.is_file():
        return folder
    with safe_open(weights, "pt") as opened:
        if all(name.startswith("text_model.") for name in opened.keys()):  # noqa: SIM118
            return folder
    copy = work / "base" / folder.name
    copy.mkdir(parents=True)
    for entry in folder.iterdir():
        if entry.name != "text_encoder":
            (copy / entry.name).symlink_to(entry)
    (copy / "text_encoder").mkdir()
    shutil.copyfile(folder / "text_encoder" / "config.json", copy / "text_encoder" / "config.json")
    renamed = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(weights).items()}
    save_file(renamed, copy / "text_encoder" / "model.safetensors", {"format": "pt"})
    return copy


def _lay_tokenizers(method: KohyaFields, folder: Path, family: Family, target: Path) -> Path:
    """The model's own tokenizers, under the names that sd-scripts looks for."""
    for own, wanted in TOKENIZERS[family].items():
        shutil.copytree(folder / own, target / wanted)
        _write_slow_tokenizer(target / wanted)
        if not (target / wanted / "vocab.json").is_file() or not (target / wanted / "merges.txt").is_file():
            raise TrainingError(
                f"base_model: {method.base_model}: {own}/ has no vocab.json and merges.txt; is the copy of the model "
                "whole?"
            )
    return target


def _write_slow_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt, which sd-scripts' tokenizer reads, from the one file that transformers 5 writes."""
    whole = folder / "tokenizer.json"
    if (folder / "vocab.json").is_file() or not whole.is_file():
        return
    model = json.loads(whole.read_text(encoding="utf-8"))["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    _write_vocabulary(folder, model["vocab"], merges)


def _write_vocabulary(folder: Path, vocabulary: Mapping[str, int], merges: Iterable[Sequence[str]]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"base_model: {file} cannot be read ({error}); is the copy of the model whole?") from None
    return config if isinstance(config, dict) else {}


# --- a single file ---------------------------------------------------------------------------------------------------


def _of_file(method: KohyaFields, file: Path, work: Path) -> KohyaBase:
    if file.suffix != ".safetensors":
        raise TrainingError(
            f"base_model: {method.base_model} is not a .safetensors file. sd-scripts opens others so that they can run "
            "code; convert it with a tool you trust."
        )
    family = detect_family(file)
    predicts_velocity = method.v_parameterization
    if predicts_velocity is None:
        predicts_velocity = _says_velocity(method, file, family)
    sides = {Family.SD1: 512, Family.SD2: 768 if predicts_velocity else 512, Family.SDXL: 1024}
    for own, wanted in TOKENIZERS[family].items():
        (work / "tokenizers" / wanted).mkdir(parents=True)
        settings = config_folder(family) / own / "tokenizer_config.json"
        shutil.copyfile(settings, work / "tokenizers" / wanted / settings.name)
        _write_vocabulary(work / "tokenizers" / wanted, *clip_vocabulary())
    return KohyaBase(file.resolve(), family, predicts_velocity, sides[family], work / "tokenizers")


def _says_velocity(method: KohyaFields, file: Path, family: Family) -> bool:
    """What the file says of itself. RecipeError: nothing, and its family has models of both kinds."""
    with safe_open(file, "pt") as opened:
        said = (opened.metadata() or {}).get("modelspec.prediction_type")
        marked = "v_pred" in opened.keys()  # noqa: SIM118
    if family is Family.SD2 and said is None and not marked:
        raise RecipeError(
            f"v_parameterization: {method.base_model} is a Stable Diffusion 2.x file that does not say what it "
            "predicts; give --v-parameterization if it was made for 768 pixels, else --no-v-parameterization."
        )
    return marked or said in ("v", "v_prediction")
