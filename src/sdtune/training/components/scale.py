"""The scale alpha / rank, multiplied into ``up`` for readers that know no alpha, and taken out again bit for bit.

A product of floats is rounded, so that division alone does not give back what was multiplied. What is missing stands
in the file's header, as JSON, in entries of our own that other programs pass over:

- ``sdtune_trained_alpha``: the alpha that was multiplied in;
- ``sdtune_trained_dtype``: the types of the tensors, where they were widened to hold the product;
- ``sdtune_rounding``: by how many steps of its type the quotient misses ``up``, packed; for modules where it does.

Of the first two, the most common value of a component stands under its name, others under ``component.path``.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdtune.training.components.lora_weights import LoraModule, LoraWeights

TRAINED_ALPHA_KEY = "sdtune_trained_alpha"
TRAINED_DTYPE_KEY = "sdtune_trained_dtype"
ROUNDING_KEY = "sdtune_rounding"
HEADER_KEYS = (TRAINED_ALPHA_KEY, TRAINED_DTYPE_KEY, ROUNDING_KEY)

MOST_ROUNDING = 50_000_000
"""Bytes; readers of safetensors refuse a header of more than 100 million."""
SPOILT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, re.error, zlib.error)

_INTEGERS = {2: torch.int16, 4: torch.int32}
"""Of as many bytes as a float, to count in steps of it."""
_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def multiply_in(weights: LoraWeights, dtype: torch.dtype | None) -> tuple[LoraWeights, dict[str, str]]:
    """The same LoRA with alpha = rank everywhere, and the header's entries that undo it.

    dtype: of all tensors. None: each keeps its own, unless a product has no exact place in half precision; then all
    are float32, because a layer whose halves differ in type cannot be run.
    There are none where they cannot be true or cannot be kept: of a dtype that holds less than the source, and of
    rounding beyond ``MOST_ROUNDING`` (about a fifth of a byte per number of ``up``: 250 million of them, in float32).
    """
    source = {
        f"{component}.{path}": module for component, modules in weights.items() for path, module in modules.items()
    }
    widened = dtype is None and not all(_has_place(module) for module in source.values())
    target = torch.float32 if widened else dtype
    products = {name: _product(module, target) for name, module in source.items()}
    multiplied = {
        component: {path: products[f"{component}.{path}"] for path in modules} for component, modules in weights.items()
    }
    types = {
        f"{name}.{part}": tensor.dtype for name, module in source.items() for part, tensor in module.tensors.items()
    }
    if all(module.alpha == module.rank for module in source.values()):
        return multiplied, {}  # nothing to undo
    if dtype is not None and any(torch.promote_types(dtype, one) != dtype for one in types.values()):
        return multiplied, {}
    rounding = {}
    for name, module in source.items():
        up = module.up if widened else module.up.to(products[name].up.dtype)
        if steps := _packed(_bits(up) - _bits(_quotient(products[name].up, module.scale, up.dtype))):
            rounding[name] = steps
    if sum(map(len, rounding.values())) > MOST_ROUNDING:
        return multiplied, {}
    entries: dict[str, Mapping[str, Any]] = {
        TRAINED_ALPHA_KEY: _by_component({name: module.alpha for name, module in source.items()}),
        TRAINED_DTYPE_KEY: _by_component({name: str(one).removeprefix("torch.") for name, one in types.items()})
        if widened
        else {},
        ROUNDING_KEY: rounding,
    }
    return multiplied, {key: json.dumps(entry, sort_keys=True) for key, entry in entries.items() if entry}


def take_out(weights: LoraWeights, metadata: Mapping[str, str]) -> LoraWeights:
    """The LoRA as it was before ``multiply_in`` made ``weights`` and the entries in ``metadata`` of it.

    Tensors in float16, bfloat16 or float32. An entry that is not ours raises one of ``SPOILT``.
    """
    alphas, types, rounding = (json.loads(metadata.get(key, "{}")) for key in HEADER_KEYS)
    taken_out: LoraWeights = {}
    for component, modules in weights.items():
        taken_out[component] = dict(modules)
        for path, module in modules.items():
            name = f"{component}.{path}"
            if (alpha := alphas.get(name, alphas.get(component))) is None:
                continue
            kinds = {
                part: _FLOATS[types.get(f"{name}.{part}", types.get(component))] if types else tensor.dtype
                for part, tensor in module.tensors.items()
            }
            magnitude = None if module.magnitude is None else module.magnitude.to(kinds["magnitude"])
            up = _quotient(module.up, float(alpha) / module.alpha, kinds["up"])
            if name in rounding:
                up = (_bits(up) + _unpacked(rounding[name], up)).view(up.dtype)
            taken_out[component][path] = LoraModule(module.down.to(kinds["down"]), up, float(alpha), magnitude)
    return taken_out


def _product(module: LoraModule, dtype: torch.dtype | None) -> LoraModule:
    up = (module.up.double() * module.scale).to(dtype or module.up.dtype)
    return replace(module.to(dtype), up=up, alpha=float(module.rank))


def _has_place(module: LoraModule) -> bool:
    """The product is exact in the type of ``up``, or that is as wide as a file's type gets."""
    product = module.up.double() * module.scale
    return module.up.dtype.itemsize > 2 or torch.equal(product.to(module.up.dtype).double(), product)


def _quotient(product: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (product.double() / scale).to(dtype)


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(_INTEGERS[weight.dtype.itemsize])


def _packed(steps: Tensor) -> str:
    """Empty if all are zero. Integers wrap around, so that any difference is undone."""
    if not bool(steps.any()):
        return ""
    return base64.b64encode(zlib.compress(steps.numpy().tobytes(), 9)).decode()


def _unpacked(packed: str, like: Tensor) -> Tensor:
    size = like.numel() * like.element_size()
    content = zlib.decompressobj().decompress(base64.b64decode(packed), size)
    return torch.frombuffer(bytearray(content), dtype=_INTEGERS[like.element_size()]).reshape(like.shape)


def _by_component(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by ``component.path``, of each component the most common one under its name alone."""
    common = {}
    for component in {name.partition(".")[0] for name in values}:
        of_component = [value for name, value in values.items() if name.startswith(f"{component}.")]
        common[component] = Counter(of_component).most_common(1)[0][0]
    return common | {name: value for name, value in values.items() if value != common[name.partition(".")[0]]}
