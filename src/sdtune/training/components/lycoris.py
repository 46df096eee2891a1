"""Writes PEFT's LoHa, LoKr and HRA adapters in kohya's form under LyCORIS' keys, which ComfyUI, Forge and A1111 read.

LoHa and LoKr: PEFT keeps LyCORIS' tensors in LyCORIS' shapes, and they are written as they are, but for two things that
readers of LoKr get wrong. Two whole matrices have no rank for them, and they ignore alpha; PEFT's scale is multiplied
in. And ComfyUI (seen in November 2026) fails on Tucker's core ``lokr_t2``, logs it and leaves the layer as it was; the
core is multiplied into ``lokr_w2_b``, which has the same rank.

HRA turns the inputs of a layer by reflections: W' = W R. R - I has no more than the adapter's rank, so that this is
exactly LyCORIS' GLoRA, W' = W + W a2 a1 + b2 b1, with b2 b1 = 0. It is written in GLoRA's older layout (a2 [in, rank],
a1 [rank, in]), the one that both ComfyUI and A1111 read; of convolutions larger than 1 x 1 only ComfyUI reads it.

OFT and BOFT cannot be written. PEFT's turn a layer's inputs, W' = W R. LyCORIS' and kohya's, which UIs read under
``oft_blocks``, turn its outputs, W' = R W, and in general no R of the one kind does what an R of the other does.
As GLoRA, R - I would have full rank: four matrices as wide as the layer, more than the layer itself. BOFT's R with two
or more factors is a dense matrix besides. What is left is the difference of the merged weights, as large as the layers
and right for one base model only; that is a checkpoint, not an adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdtune.errors import TrainingError
from sdtune.training.components.export import alpha_tensor
from sdtune.training.components.kohya_metadata import hashes
from sdtune.training.components.lora_names import Family, classic_clip_path, kohya_layer
from sdtune.training.components.tensor_file import finite, write_tensors

_PARTS = {
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
"""LyCORIS' and PEFT's names of the tensors of one module."""


def write_lycoris(
    models: Mapping[str, nn.Module],
    path: Path,
    family: Family,
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float16,
    adapter_name: str = "default",
) -> Path:
    """A .safetensors file of the adapters in ``models``, with kohya's names for their modules; returns its path.

    models: by their names in a pipeline (``unet``, ``text_encoder``, ``text_encoder_2``), one kind of adapter in all.
    metadata: of ``kohya_metadata``; the network module, its arguments and the hashes are set here.
    TrainingError: no adapter, one that has no equivalent here (the module's docstring says why), or not finite.
    """
    algorithms, tensors = set[str](), dict[str, Tensor]()
    for component, model in models.items():
        for name, layer, kind in _adapted(model, adapter_name):
            module = name if component == "unet" else classic_clip_path(name)
            key = kohya_layer(component, module, family)
            for part, tensor in lycoris_tensors(layer, kind, name, adapter_name).items():
                tensors[f"{key}.{part}"] = tensor if part == "alpha" else finite(tensor, dtype, f"{component}.{name}")
            algorithms.add("glora" if kind == "hra" else kind)
    if not tensors:
        raise TrainingError(f"No LoHa, LoKr or HRA adapter named {adapter_name!r} in {', '.join(models)}.")
    if len(algorithms) > 1:
        raise TrainingError(f"Adapters of several kinds ({', '.join(sorted(algorithms))}) cannot be in one file.")
    header = {
        **metadata,
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": json.dumps({"algo": algorithms.pop()}),
    }
    return write_tensors(path, tensors, {**header, **hashes(tensors, header)})


def _adapted(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any, str]]:
    """Path, layer and kind of every adapter in the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        kind = type(layer).__module__.split(".")[2]  # peft.tuners.loha.layer
        if any(adapter_name in getattr(layer, part) for part in layer.adapter_layer_names):
            yield name.replace("_orig_mod.", "").removeprefix("base_model.model."), layer, kind


def lycoris_tensors(layer: Any, kind: str, name: str, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of one module by LyCORIS' names, ``alpha`` among them; float32 on the CPU.

    layer: of ``peft.tuners.loha``, ``lokr`` or ``hra``, which is its kind; name: for messages.
    """
    if kind == "hra":
        return _glora(layer, adapter_name)
    if kind not in _PARTS:
        raise TrainingError(
            f"{name}: an adapter of the kind {kind} cannot be written under LyCORIS' keys; LoHa, LoKr and HRA can."
        )
    tensors = {
        part: _copy(getattr(layer, part)[adapter_name]) for part in _PARTS[kind] if adapter_name in getattr(layer, part)
    }
    # Not layer.scaling, which may be the strength of the moment.
    rank, alpha = layer.r[adapter_name], float(layer.alpha[adapter_name])
    if (core := tensors.pop("lokr_t2", None)) is not None:
        tensors["lokr_w2_a"] = tensors["lokr_w2_a"].T.contiguous()
        tensors["lokr_w2_b"] = torch.einsum("rs...,si->ri...", core, tensors["lokr_w2_b"]).flatten(1).contiguous()
    if "lokr_w1" in tensors and "lokr_w2" in tensors:
        tensors["lokr_w2"] *= alpha / rank
        alpha = float(rank)
    return {**tensors, "alpha": alpha_tensor(alpha)}


def _glora(layer: Any, adapter_name: str) -> dict[str, Tensor]:
    """a2 [in, rank] and a1 [rank, in] with R = I + a2 a1; b2 [out, rank] and b1 [rank, in] of zeros.

    in: of a convolution its input channels times its kernel.
    """
    # A product of reflections, R_k = R_(k-1) (I - 2 u u^T), grows by one column and one row per reflection.
    u = _copy(layer.hra_u[adapter_name]).double()
    columns: list[Tensor] = []
    rows: list[Tensor] = []
    for direction in _directions(u, orthogonal=layer.hra_apply_GS[adapter_name]):
        turned = direction.clone()  # by the reflections before it
        for column, row in zip(columns, rows, strict=True):
            turned += column * (row @ direction)
        columns.append(-2 * turned)
        rows.append(direction)
    a2, a1 = _balanced(torch.stack(columns, dim=1), torch.stack(rows))
    rank, out = len(rows), int(layer.get_base_layer().weight.shape[0])
    return {
        "a1.weight": a1.float().contiguous(),
        "a2.weight": a2.float().contiguous(),
        "b1.weight": torch.zeros(rank, a1.shape[1]),
        "b2.weight": torch.zeros(out, rank),
        "alpha": alpha_tensor(float(rank)),
    }


def _directions(u: Tensor, *, orthogonal: bool) -> Iterator[Tensor]:
    """Unit vectors of the reflections, [in] each; orthogonal: by Gram-Schmidt, as HRA does with ``apply_GS``."""
    found: list[Tensor] = []
    for column in u.unbind(dim=1):
        for earlier in found if orthogonal else []:
            column = column - (earlier @ column) * earlier
        found.append(column / column.norm())
        yield found[-1]


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of equal size with the same product.

    HRA starts from pairs of equal reflections, which cancel: the product is far smaller than its summands, and would
    drown in what half precision rounds off them.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, singular, v = torch.linalg.svd(r_left @ r_right.T)
    root = singular.sqrt()
    return q_left @ (u * root), (root[:, None] * v) @ q_right.T


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True).contiguous()
