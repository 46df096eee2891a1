"""Reads a Stable Diffusion checkpoint in one file (``.safetensors``, or ``.ckpt`` without pickled code), offline.

diffusers' own ``from_single_file`` reads these files too. This one follows the writer's table of names back instead:
both directions agree by construction, only one weight at a time is copied, and a file that lacks weights is an error
that names them (diffusers stops at a "meta tensor" or, in a text encoder, says nothing). The tests hold it against
diffusers' reader.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdtune.errors import TrainingError
from sdtune.training.components.lora_weights import Family
from sdtune.training.components.single_file_names import PREFIXES, UNET, Place, other_names, places

CONFIGS = Path(__file__).parent.parent / "configs"
PICKLED = (".ckpt", ".bin", ".pt", ".pth")
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""In modelspec's words and in diffusers' own."""


@dataclass
class Checkpoint:
    """An opened file. tensor: reads one by name, when it is wanted."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    tensor: Callable[[str], Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def holds(self, *beginnings: str) -> bool:
        """There is a tensor whose name begins so."""
        return any(name.startswith(beginnings) for name in self.shapes)


def config_folder(family: Family) -> Path:
    """The shipped diffusers folder without weights and vocabulary.

    It is what diffusers' ``from_single_file(config=...)`` wants, with the tokenizers given beside it.
    """
    return CONFIGS / family.value


def detect_family(path: Path) -> Family:
    """The family of a checkpoint, by the names and shapes in its header; no weight is read of a safetensors file.

    TrainingError: not a whole Stable Diffusion 1.x, 2.x or SDXL base model (a LoRA, an inpainting model, SD 3...),
    and what it is instead; not readable; or a pickle that holds more than weights.
    """
    return _family(_opened(path))


def read_single_file(
    path: Path, dtype: torch.dtype, *, prediction_type: str | None = None, config: Path | None = None
) -> dict[str, Any]:
    """The parts of the model under their names in a diffusers pipeline, on the CPU, in eval mode, weights in dtype.

    ``tokenizer``, ``text_encoder``, ``vae``, ``unet``, ``scheduler``, and for SDXL ``tokenizer_2`` and
    ``text_encoder_2``. The scheduler is DDIM (SDXL: Euler); another is made with ``from_config(scheduler.config)``.
    prediction_type: ``epsilon`` or ``v_prediction``; by default what the file says of itself, else ``epsilon``.
    config: a diffusers folder to take settings and tokenizer from, for a model of other sizes than the published ones.
    If the file has EMA weights beside the others (``model_ema.``), the others are read, as other programs do.
    TrainingError: as detect_family; or weights are missing, of other shapes, or unknown to the UNet.
    """
    file = _opened(path)
    family = _family(file)
    folder = config or config_folder(family)
    predicts = _prediction_type(file, family, prediction_type)
    if config is None:
        predicts = predicts or "epsilon"
    parts: dict[str, Any] = {component: _empty(component, folder) for component in PREFIXES[family]}
    tables = {component: _table(model, file, family, component) for component, model in parts.items()}
    for component, table in tables.items():  # only now that all of them are known to be there
        _fill(parts[component], file, table, dtype)
    if config is None and family is Family.SD2 and predicts == "epsilon":
        parts["unet"].register_to_config(sample_size=64)  # SD 2.x predicts the noise at 512 pixels
    for component in ("tokenizer", "tokenizer_2")[: len(PREFIXES[family]) - 2]:
        parts[component] = _tokenizer(folder, component)
    parts["scheduler"] = _scheduler(folder, predicts, zero_snr="ztsnr" in file)
    return parts


# --- opening ---------------------------------------------------------------------------------------------------------


def _opened(path: Path) -> Checkpoint:
    try:
        if path.suffix.lower() in PICKLED:
            return _unpickled(path)
        file: Any = safe_open(path, framework="pt")  # its methods have no types
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return Checkpoint(path, shapes, partial(_tensor, path, file), file.metadata() or {})
    except SafetensorError as error:
        raise TrainingError(f"{path}: not a whole safetensors file ({error}). Was the download complete?") from error
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _tensor(path: Path, file: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    # Of a type that this torch has not; the error is whatever its lookup says.
    except (SafetensorError, RuntimeError, LookupError, AttributeError, ValueError) as error:
        raise TrainingError(f"{path}: its tensor {name[:100]!r} cannot be read ({error}).") from None
    return tensor


def _unpickled(path: Path) -> Checkpoint:
    """torch's restricted reader, which builds tensors and plain containers and calls nothing else."""
    try:
        # only files of torch >= 1.6 are zip archives, which can be mapped instead of read
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    # Fed with broken bytes it may raise anything: UnpicklingError, RuntimeError, EOFError, IndexError, KeyError ...
    except Exception as error:
        raise TrainingError(
            f"{path}: not a file of weights alone, or damaged. Pickled files can run code, and sdtune opens only "
            "their tensors; convert it to .safetensors with a tool you trust."
        ) from error
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = content if isinstance(content, dict) else {}
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    return Checkpoint(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)


# --- what it is ------------------------------------------------------------------------------------------------------

_CONV_IN = f"{UNET}input_blocks.0.0.weight"
_TO_CONTEXT = ("input_blocks.1.1", "input_blocks.4.1")  # the first block with cross-attention of SD, of SDXL
_WIDTHS = {768: Family.SD1, 1024: Family.SD2, 2048: Family.SDXL}
_OTHER_INPUTS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-to-image (InstructPix2Pix or video) model",
    9: "an inpainting model",
}
_OTHER_MODELS = {  # of files that may have a Stable Diffusion UNet as well
    "control_model.": "a ControlNet",
    "edm_": "an EDM model (Playground 2.5 or CosXL)",
    f"{UNET}joint_blocks.": "Stable Diffusion 3",
    f"{UNET}double_blocks.": "Flux",
    f"{UNET}input_blocks.1.0.time_stack": "a video model",
    "noise_augmentor.": "an unCLIP model",
    "embedder.model.visual.": "an unCLIP model",
}
_OTHER_FILES = {  # of files that have none
    "lora_": "a LoRA",
    "unet.": "a LoRA",
    "base_model.model.": "a LoRA",
    "text_encoder.": "a LoRA",
    "joint_blocks.": "Stable Diffusion 3's transformer alone",
    "double_blocks.": "Flux's transformer alone",
    "transformer_blocks.": "a transformer of another family",
    "down_blocks.": "a UNet of a diffusers folder; name the folder that model_index.json is in",
    "input_blocks.": "a UNet alone",
    "first_stage_model.": "a VAE alone",
    "encoder.": "a VAE alone",
    "decoder.": "a VAE alone",
    "text_model.": "a text encoder alone",
    "emb_params": "a textual inversion",
    "string_to_param": "a textual inversion",
}


def _family(file: Checkpoint) -> Family:
    wanted = "base_model wants a checkpoint of Stable Diffusion 1.x, 2.x or SDXL with UNet, VAE and text encoder."
    for beginning, kind in _OTHER_MODELS.items():
        if file.holds(beginning):
            raise TrainingError(f"{file.path} is {kind}. {wanted}")
    if _CONV_IN not in file:
        kind = next((kind for beginning, kind in _OTHER_FILES.items() if file.holds(beginning)), "something else")
        raise TrainingError(f"{file.path} is {kind}. {wanted}")
    if (channels := _second(file, _CONV_IN)) != 4:
        kind = _OTHER_INPUTS.get(channels, "a model of another kind")
        raise TrainingError(f"{file.path} is {kind} (its UNet has {channels} input channels, not 4). {wanted}")
    names = (f"{UNET}{block}.transformer_blocks.0.attn2.to_k.weight" for block in _TO_CONTEXT)
    width = next((_second(file, name) for name in names if name in file), 0)
    if width == 1280:
        raise TrainingError(f"{file.path} is SDXL's refiner. {wanted}")
    if width in _WIDTHS:
        return _WIDTHS[width]
    for family in (Family.SDXL, Family.SD2, Family.SD1):  # of other sizes than the published models
        if file.holds(PREFIXES[family][list(PREFIXES[family])[-1]]):
            return family
    raise TrainingError(f"{file.path}: a UNet of a family that sdtune does not know (context {width} wide). {wanted}")


def _second(file: Checkpoint, name: str) -> int:
    """What a weight takes in; 0 of what is none."""
    shape = file.shapes[name]
    return shape[1] if len(shape) > 1 else 0


def _prediction_type(file: Checkpoint, family: Family, asked: str | None) -> str | None:
    """``epsilon``, ``v_prediction``, or None where nothing tells."""
    if asked is not None and asked not in PREDICTION_TYPES:
        raise TrainingError(f"prediction_type is epsilon or v_prediction, not {asked}.")
    said = asked or file.metadata.get("modelspec.prediction_type", "")
    if said in PREDICTION_TYPES:
        return PREDICTION_TYPES[said]
    if "v_pred" in file or file.metadata.get("modelspec.architecture") == "stable-diffusion-v2-768-v":
        return "v_prediction"
    # The published SD 2.x models differ in this layer, and so do models trained from them. Source: ComfyUI.
    telling = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if family is Family.SD2 and telling in file and float(file.tensor(telling).float().std(correction=0)) > 0.09:
        return "v_prediction"
    return None


# --- the parts -------------------------------------------------------------------------------------------------------


def _empty(component: str, folder: Path) -> nn.Module:
    """The part without its weights."""
    model: nn.Module
    with init_empty_weights():  # leaves alone what is not in a file, such as position ids
        if component == "unet":
            model = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder=component))
        elif component == "vae":
            model = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder=component))
        else:
            kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
            model = kind(CLIPTextConfig.from_pretrained(folder, subfolder=component))
    return model.eval()


def _table(model: nn.Module, file: Checkpoint, family: Family, component: str) -> dict[str, Place]:
    """Where the file has each weight of the part. TrainingError: not all are there, or not in these shapes."""
    empty = model.state_dict()
    usual = places(family, component, empty, model.config)
    table = {key: place for key, expected in usual.items() if (place := _find(file, expected)) is not None}
    if not table:
        raise TrainingError(f"{file.path} has no {component}: only a whole checkpoint can be trained.")
    if missing := sorted(usual[key].name for key in usual.keys() - table.keys()):
        raise TrainingError(
            f"{file.path}: its {component} lacks {len(missing)} of the {len(usual)} weights of {family}, such as "
            f"{missing[0]}. Is it a pruned or distilled model?"
        )
    known = {place.name for place in table.values()}
    if component == "unet" and (extra := {name for name in file.shapes if name.startswith(UNET)} - known):
        raise TrainingError(
            f"{file.path}: its UNet has {len(extra)} weights that {family}'s has not, such as {min(extra)}. "
            "Distilled and extended models are not read."
        )
    for key, place in table.items():
        tensor = torch.empty(file.shapes[place.name], device="meta")
        if not _can_be_taken(tensor, place) or _core(_taken(tensor, place).shape) != _core(empty[key].shape):
            raise TrainingError(
                f"{file.path}: {place.name} is {list(tensor.shape)}; {family}'s {component} wants "
                f"{list(empty[key].shape)}. A model of other sizes needs its settings: give it as a diffusers folder."
            )
    return table


def _fill(model: nn.Module, file: Checkpoint, table: Mapping[str, Place], dtype: torch.dtype) -> None:
    """Give the model its weights: copies, so that nothing refers to the file once this is done."""
    weights = {}
    for key, empty in model.state_dict().items():
        tensor = _taken(file.tensor(table[key].name), table[key])
        weights[key] = tensor.reshape(empty.shape).to(dtype, copy=True).contiguous()
    model.load_state_dict(weights, assign=True)


def _find(file: Checkpoint, place: Place) -> Place | None:
    """place under the name that it has in this file; None: nowhere."""
    for name in (place.name, *other_names(place.name)):
        if name in file:
            return Place(name, place.third, place.conv1x1, place.transposed)
    if place.transposed and f"{place.name}.weight" in file:  # of an older converter, which did not transpose it
        return Place(f"{place.name}.weight")
    return None


def _can_be_taken(tensor: Tensor, place: Place) -> bool:
    if place.third is not None:
        return tensor.dim() > 0 and len(tensor.chunk(3)) == 3
    return not place.transposed or tensor.dim() == 2


def _taken(tensor: Tensor, place: Place) -> Tensor:
    if place.third is not None:
        return tensor.chunk(3)[place.third]
    return tensor.T if place.transposed else tensor


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer's and a 1x1 convolution's weights are the same numbers, and files have either."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else tuple(shape)


def _scheduler(folder: Path, prediction_type: str | None, *, zero_snr: bool) -> Any:
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    if prediction_type:
        settings["prediction_type"] = prediction_type
    if zero_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return getattr(diffusers, settings["_class_name"]).from_config(settings)


def _tokenizer(folder: Path, component: str) -> Any:
    if (folder / component / "vocab.json").exists() or (folder / component / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(folder, subfolder=component)
    settings: Mapping[str, Any] = json.loads((folder / component / "tokenizer_config.json").read_text())
    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(
        vocab=dict(vocabulary),
        merges=list(merges),
        pad_token=settings["pad_token"],
        model_max_length=settings["model_max_length"],
    )


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's tokens with their numbers, and its merges: the contents of ``vocab.json`` and ``merges.txt``.

    The tokens are the 256 bytes inside a word, the same at its end, what the merges make, and two marks.
    """
    with gzip.open(CONFIGS / "clip" / "merges.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:-1]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    # GPT-2's printable stand-ins: bytes that are printable come first, under their own sign
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges
