"""A convolution's bias and the residual addition after it, in one pass.

torch adds a convolution's bias in a kernel of its own after cuDNN's: the convolutions before a norm give theirs to the
norm (``group_norm``'s offset), those before an addition to this.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from sdtune.training.kernels.launch import launch, pixel_rows, power_of_two, usable

COLUMNS, ELEMENTS = 64, 4096


def add_bias_reference(x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As torch does it."""
    return residual + (x + bias[:, None, None].to(x.dtype))


def add_bias(x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x + residual, both [batch, channels, height, width] in channels_last, + bias, [channels]; of residual's type."""
    if not usable(x):
        return add_bias_reference(x, residual, bias)
    result: torch.Tensor = AddBias.apply(x, residual, bias)
    return result


class AddBias(torch.autograd.Function):
    """Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        rows, others = pixel_rows(x), pixel_rows(residual)
        batch, pixels, channels = rows.shape
        y = residual.new_empty(batch, *x.shape[2:], channels)
        columns = min(COLUMNS, power_of_two(channels))
        grid = (triton.cdiv(batch * pixels, ELEMENTS // columns), triton.cdiv(channels, columns))
        launch(_add, grid)(
            rows, others, bias, y, batch * pixels, channels, rows.stride(1), others.stride(1),
            ROWS=ELEMENTS // columns, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
        ctx.dtypes = x.dtype, bias.dtype
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x_dtype, bias_dtype = ctx.dtypes
        needs_x, needs_residual, needs_bias = ctx.needs_input_grad
        dbias = dy.sum((0, 2, 3), dtype=torch.float32).to(bias_dtype) if needs_bias else None
        return dy.to(x_dtype) if needs_x else None, dy if needs_residual else None, dbias


@triton.jit(do_not_specialize=["count"])
def _add(
    x, residual, bias, y, count, channels, apart, others_apart, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < count) & (channel < channels)[None, :]
    b = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    value = tl.load(x + row * apart + channel[None, :], mask=inside, other=0.0).to(tl.float32) + b
    value += tl.load(residual + row * others_apart + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * channels + channel[None, :], value.to(y.dtype.element_ty), mask=inside)
