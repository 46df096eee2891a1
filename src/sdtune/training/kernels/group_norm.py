"""GroupNorm, with SiLU after it and the addition of one value per channel before it, in channels_last.

Beside torch's: torch leaves SiLU, the cast of autocast, the convolution's bias and the addition of the time embedding
to kernels of their own, and keeps SiLU's input; here it is one kernel where an image's group fits a program, else
three, and the SiLU's input is computed again. Liger-Kernel's group_norm is for NCHW alone, adds weight gradients
atomically (another order at each run) and computes them also for frozen weights.

Statistics are float32 and combined from means and squared deviations of parts (Chan et al. 1979), which does not cancel
as the mean of squares does. All sums have a fixed order.
"""

from typing import Any

import torch
from torch.nn import functional

from sdtune.training.kernels import group_norm_split, group_norm_whole
from sdtune.training.kernels.group_norm_parts import Gradients, Inputs, Norm
from sdtune.training.kernels.launch import compute_dtype, pixel_rows, power_of_two, usable


def group_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = False,
    shift: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As diffusers' ResnetBlock2D does it."""
    shifted = x
    if offset is not None:
        shifted = shifted + offset[:, None, None].to(x.dtype)
    if shift is not None:
        shifted = shifted + shift[:, :, None, None]
    y = functional.group_norm(shifted, groups, weight.to(shifted.dtype), bias.to(shifted.dtype), eps)
    return functional.silu(y) if silu else y, x


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = False,
    shift: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    whole: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + shift + offset, and x itself.

    x: [batch, channels, height, width]; shift: [batch, channels], as of a time embedding; offset: [channels], as the
    bias of the convolution before; both are added in float32. The norm is of autocast's type and channels_last. Use the
    second result where x is used further on: its gradient is then added in the kernel. whole: None to choose by shape.
    """
    if not usable(x):
        return group_norm_reference(x, weight, bias, groups, eps, silu, shift, offset)
    if whole is None:
        whole = fits_a_program(x.shape[0], x.shape[2] * x.shape[3], x.shape[1] // groups)
    norm = Norm(groups, eps, silu, compute_dtype(x), whole)
    result: tuple[torch.Tensor, torch.Tensor] = GroupNorm.apply(x, weight, bias, shift, offset, norm)
    return result


def fits_a_program(batch: int, pixels: int, channels_per_group: int) -> bool:
    """One kernel should be quicker than three: the group is small, or there are groups enough for a whole GPU."""
    elements = pixels * power_of_two(channels_per_group)
    return elements <= 2**14 or (elements <= 2**16 and batch >= 4)


class GroupNorm(torch.autograd.Function):
    """Keeps x and the groups' statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        shift: torch.Tensor | None,
        offset: torch.Tensor | None,
        norm: Norm,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        batch, channels, height, width = x.shape
        y = x.new_empty(batch, height, width, channels, dtype=norm.dtype)
        statistics = x.new_empty(2, batch, norm.groups, dtype=torch.float32)
        shift, offset = (None if one is None else one.contiguous() for one in (shift, offset))
        inputs = Inputs(pixel_rows(x), shift, offset, weight, bias, statistics)
        (group_norm_whole if norm.whole else group_norm_split).forward(inputs, y, norm)
        ctx.save_for_backward(*inputs)
        ctx.norm, ctx.shape = norm, x.shape
        return y.permute(0, 3, 1, 2), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dx_further: torch.Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return dx_further, None, None, None, None, None
        inputs, norm = Inputs(*ctx.saved_tensors), ctx.norm
        batch, channels, height, width = ctx.shape
        _, needs_weight, needs_bias, needs_shift, needs_offset, _ = ctx.needs_input_grad
        affine, added = needs_weight or needs_bias, needs_shift or needs_offset
        dx = inputs.rows.new_empty(batch, height, width, channels)
        sums = dx.new_empty(3, batch, channels, dtype=torch.float32) if affine or added else None
        further = pixel_rows(dx_further) if dx_further is not None else None
        grads = Gradients(pixel_rows(dy), further, dx, sums, affine, added)
        (group_norm_whole if norm.whole else group_norm_split).backward(inputs, grads, norm)
        dweight = dbias = dshift = doffset = None
        if sums is not None and affine:
            dweight, dbias = sums[:2].sum(1).to(inputs.weight.dtype)
        if sums is not None and inputs.shift is not None and needs_shift:
            dshift = sums[2].to(inputs.shift.dtype)
        if sums is not None and inputs.offset is not None and needs_offset:
            doffset = sums[2].sum(0).to(inputs.offset.dtype)
        return dx.permute(0, 3, 1, 2), dweight, dbias, dshift, doffset, None
