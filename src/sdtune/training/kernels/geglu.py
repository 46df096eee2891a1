"""GEGLU: the first half of a projection, times the exact GELU of the second.

Liger-Kernel's geglu approximates the GELU by tanh, which is another function than Stable Diffusion was trained with,
and writes its gradients over its inputs. Plain torch copies the halves' gradients together, and its product and GELU
are a kernel each.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional

from sdtune.training.kernels.launch import launch, power_of_two, usable

COLUMNS, ELEMENTS = 256, 4096
"""Of a program's tile: widths in Stable Diffusion are multiples of 256."""


def geglu_reference(projected: torch.Tensor) -> torch.Tensor:
    """As diffusers' GEGLU does it."""
    hidden_states, gate = projected.chunk(2, dim=-1)
    return hidden_states * functional.gelu(gate)


def geglu(projected: torch.Tensor) -> torch.Tensor:
    """[..., 2 * width] to [..., width], in the same type; computed in float32."""
    if not usable(projected):
        return geglu_reference(projected)
    result: torch.Tensor = Geglu.apply(projected)
    return result


class Geglu(torch.autograd.Function):
    """Keeps the projection alone; the GELU is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, projected: torch.Tensor) -> torch.Tensor:
        projected = projected.contiguous()
        *lead, double = projected.shape
        y = projected.new_empty(*lead, double // 2)
        grid, options = _launch(y)
        launch(_forward, grid)(projected, y, y.numel() // y.shape[-1], **options)
        ctx.save_for_backward(projected)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (projected,) = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty_like(projected)
        grid, options = _launch(dy)
        launch(_backward, grid)(projected, dy, dx, dy.numel() // dy.shape[-1], **options)
        return dx


def _launch(y: torch.Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    width = y.shape[-1]
    columns = min(COLUMNS, power_of_two(width))
    rows = ELEMENTS // columns
    grid = (triton.cdiv(y.numel() // width, rows), triton.cdiv(width, columns))
    return grid, {"width": width, "ROWS": rows, "COLUMNS": columns, "num_warps": 4}


@triton.jit(do_not_specialize=["count"])
def _forward(x, y, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < count) & (column < width)
    at = row * (2 * width) + column
    hidden = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * width + column, (hidden * gelu).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _backward(x, dy, dx, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < count) & (column < width)
    at = row * (2 * width) + column
    hidden = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(dx + at, (grad * gate * below).to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + at + width, (grad * hidden * (below + gate * density)).to(dx.dtype.element_ty), mask=inside)
