"""Writes a whole model as one ``.safetensors`` checkpoint, in the layout that every Stable Diffusion program reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtune.errors import TrainingError
from sdtune.training.components.files import publish
from sdtune.training.components.lora_weights import Family
from sdtune.training.components.single_file_names import LOGIT_SCALE, PREFIXES, places

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def write_single_file(
    parts: Mapping[str, Any],
    path: Path,
    family: Family,
    *,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint for A1111, Forge, ComfyUI, kohya's tools and diffusers' ``from_single_file``; returns its path.

    parts: ``unet``, ``vae``, ``text_encoder`` and for SDXL ``text_encoder_2`` as modules, on any device; with
    ``scheduler`` the file tells whether the UNet predicts the velocity: in its header, and by the (empty) tensors
    ``v_pred`` and ``ztsnr`` that programs look for. dtype: float16, bfloat16 or float32.
    metadata: entries of the header (``modelspec.*``); they come before the prediction type that is set here.

    SD 2.x has the 23 layers of its text encoder that are used; the 24th of OpenCLIP is in no diffusers model.
    The file is whole or not there, and the same bytes for the same weights and metadata. One weight at a time is
    copied, so that an SDXL needs no memory for a second copy (safetensors' own writer takes two).
    TrainingError: a part is missing, a weight has no place in the layout or is not finite in dtype.
    """
    sources = layout(parts, family)
    config = getattr(parts.get("scheduler"), "config", {})
    v_prediction = config.get("prediction_type") == "v_prediction"
    marks = {"v_pred": v_prediction, "ztsnr": v_prediction and bool(config.get("rescale_betas_zero_snr"))}
    for name in (name for name, on in marks.items() if on):
        sources[name] = Source((0,), lambda: torch.empty(0))
    header: dict[str, Any] = {"format": "pt"}
    if config:
        header["modelspec.prediction_type"] = "v" if v_prediction else "epsilon"
    header |= dict(metadata or {})
    with publish(path) as temporary, temporary.open("wb") as file:
        for chunk in _chunks(sources, dtype, header):
            file.write(chunk)
    return path


class Source:
    """A tensor of the file: its shape, and how to make it when its turn comes."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], Tensor]) -> None:
        self.shape = shape
        self.make = make


def layout(parts: Mapping[str, Any], family: Family) -> dict[str, Source]:
    """What the file holds, by name; of modules on the meta device too."""
    sources: dict[str, Source] = {}
    for component in PREFIXES[family]:
        if parts.get(component) is None:
            raise TrainingError(f"A single-file checkpoint of {family} needs its {component}; nothing was written.")
        # torch.compile() wraps a model and prefixes the names of its weights
        weights = {key.replace("_orig_mod.", ""): weight for key, weight in parts[component].state_dict().items()}
        thirds: dict[str, dict[int, Tensor]] = {}
        for key, place in places(family, component, weights, parts[component].config).items():
            if place.third is None:
                sources[place.name] = _placed(weights[key], conv1x1=place.conv1x1, transposed=place.transposed)
            else:
                thirds.setdefault(place.name, {})[place.third] = weights[key]
        sources |= {name: _stacked([found[number] for number in range(3)]) for name, found in thirds.items()}
    if family is Family.SDXL:  # 100 is where OpenCLIP's training capped it; kohya's loader wants the tensor
        sources[LOGIT_SCALE] = Source((), lambda: torch.tensor(math.log(100.0)))
    return sources


def _placed(weight: Tensor, *, conv1x1: bool, transposed: bool) -> Source:
    weight = weight.detach()
    if conv1x1 and weight.dim() == 2:
        weight = weight[:, :, None, None]
    if transposed:
        weight = weight.T
    return Source(tuple(weight.shape), lambda: weight)


def _stacked(thirds: list[Tensor]) -> Source:
    rows = sum(third.shape[0] for third in thirds)
    return Source((rows, *thirds[0].shape[1:]), lambda: torch.cat([third.detach() for third in thirds]))


def _chunks(sources: Mapping[str, Source], dtype: torch.dtype, metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of a safetensors file: length of the header, header, tensors in the order of their names."""
    if dtype not in _DTYPES:
        raise TrainingError(f"A single-file checkpoint is float16, bfloat16 or float32, not {dtype}.")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, source in sorted(sources.items()):
        start, end = end, end + math.prod(source.shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": source.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begin at a multiple of 8
    yield len(encoded).to_bytes(8, "little") + encoded
    for name, source in sorted(sources.items()):
        tensor = source.make().to("cpu", dtype).contiguous()
        if not bool(tensor.isfinite().all()):
            raise TrainingError(f"{name}: not finite in {dtype}; nothing was written.")
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
