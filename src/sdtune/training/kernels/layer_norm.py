"""LayerNorm of rows, with the residual addition before it.

Beside torch's: one kernel adds and normalizes, and one gives the gradient of both (the gradient that reaches the sum
from further on is added inside it), statistics are float32 whatever the rows are, and nothing but the sum is kept.
Liger-Kernel's layer_norm keeps statistics in the type of the rows, takes no residual and computes weight gradients also
for frozen weights.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional

from sdtune.training.kernels.launch import compute_dtype, launch, power_of_two, usable

ELEMENTS = 4096
"""Of a program's tile, at most."""
PROGRAMS = 264
"""That sum gradients of weights, two for each multiprocessor of an H100: a fixed number gives a fixed order."""


def add_layer_norm_reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As diffusers' BasicTransformerBlock does it."""
    total = x if residual is None else x + residual
    return functional.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual and that sum, both [..., channels].

    The sum is of x's type, the norm of autocast's. Use the second result where the sum is used further on, also without
    a residual: its gradient is then added in the kernel.
    """
    if not usable(x):
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    result: tuple[torch.Tensor, torch.Tensor] = AddLayerNorm.apply(x, residual, weight, bias, eps, compute_dtype(x))
    return result


class AddLayerNorm(torch.autograd.Function):
    """Keeps the sum and its rows' statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        x = x.contiguous()
        channels = x.shape[-1]
        rows = x.numel() // channels
        y = torch.empty_like(x, dtype=dtype)
        total = torch.empty_like(x) if residual is not None else x.view_as(x)
        statistics = x.new_empty(2, rows, dtype=torch.float32)
        block, warps = _tile(channels)
        launch(_forward, (triton.cdiv(rows, block),))(
            x, residual.contiguous() if residual is not None else x, weight, bias, total, y,
            statistics[0], statistics[1], rows, channels, eps,
            PADDED=power_of_two(channels), ROWS=block, RESIDUAL=residual is not None, num_warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(total, weight, statistics)
        ctx.dtypes = x.dtype, residual.dtype if residual is not None else None
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None) -> tuple[Any, ...]:
        total, weight, statistics = ctx.saved_tensors
        x_dtype, residual_dtype = ctx.dtypes
        needs_x, needs_residual, *needs_affine = ctx.needs_input_grad[:4]
        if dy is None:
            dx, dweight, dbias = dtotal, None, None
        else:
            dx, dweight, dbias = _gradients(dy, dtotal, total, weight, statistics, any(needs_affine))
        dx_as = dx.to(x_dtype) if dx is not None and needs_x else None
        dresidual = dx.to(residual_dtype) if dx is not None and needs_residual else None
        return dx_as, dresidual, dweight, dbias, None, None


def _gradients(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    statistics: torch.Tensor,
    affine: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    channels = total.shape[-1]
    rows = total.numel() // channels
    block, warps = _tile(channels)
    tiles = triton.cdiv(rows, block)
    programs = min(tiles, PROGRAMS) if affine else tiles
    dx = torch.empty_like(total)
    sums = total.new_empty(2, programs, channels, dtype=torch.float32) if affine else statistics
    launch(_backward, (programs,))(
        dy.contiguous(), dtotal.contiguous() if dtotal is not None else dy, total, weight,
        statistics[0], statistics[1], dx, sums[0], sums[1], rows, channels,
        triton.cdiv(tiles, programs), PADDED=power_of_two(channels), ROWS=block,
        SKIP=dtotal is not None, AFFINE=affine, num_warps=warps,
    )  # fmt: skip
    if not affine:
        return dx, None, None
    dweight, dbias = sums.sum(1).to(weight.dtype)
    return dx, dweight, dbias


def _tile(channels: int) -> tuple[int, int]:
    """Rows of a program's tile, and its warps."""
    padded = power_of_two(channels)
    rows = max(1, min(8, ELEMENTS // padded))
    return rows, max(1, min(8, rows * padded // 512))


@triton.jit(do_not_specialize=["count", "tiles"])
def _forward(
    x, residual, weight, bias, total, y, means, rstds, count, channels, eps,
    PADDED: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    inside = (row < count)[:, None] & (channel < channels)[None, :]
    at = row[:, None] * channels + channel[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        # The norm is that of the sum as it is kept.
        value = rounded.to(tl.float32)
    mean = tl.sum(value, axis=1) / channels
    centred = tl.where(inside, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    w = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    result = centred * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
    tl.store(means + row, mean, mask=row < count)
    tl.store(rstds + row, rstd, mask=row < count)


@triton.jit(do_not_specialize=["count", "tiles"])
def _backward(
    dy, dtotal, total, weight, means, rstds, dx, dweights, dbiases, count, channels, tiles,
    PADDED: tl.constexpr, ROWS: tl.constexpr, SKIP: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = tl.arange(0, PADDED)
    in_row = channel < channels
    w = tl.load(weight + channel, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros([PADDED], dtype=tl.float32)
    dbias = tl.zeros([PADDED], dtype=tl.float32)
    for tile in range(tiles):
        row = (program.to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & in_row[None, :]
        at = row[:, None] * channels + channel[None, :]
        mean = tl.load(means + row, mask=row < count, other=0.0)
        rstd = tl.load(rstds + row, mask=row < count, other=0.0)
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        normal = tl.where(inside, (value - mean[:, None]) * rstd[:, None], 0.0)
        scaled = grad * w[None, :]
        along = tl.sum(scaled * normal, axis=1) / channels
        level = tl.sum(scaled, axis=1) / channels
        result = (scaled - level[:, None] - normal * along[:, None]) * rstd[:, None]
        if SKIP:
            result += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
        if AFFINE:
            dweight += tl.sum(grad * normal, axis=0)
            dbias += tl.sum(grad, axis=0)
    if AFFINE:
        tl.store(dweights + program * channels + channel, dweight, mask=in_row)
        tl.store(dbiases + program * channels + channel, dbias, mask=in_row)
