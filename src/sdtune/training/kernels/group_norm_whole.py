"""GroupNorm where one program has a whole group of an image: one kernel each way."""

import torch
import triton
import triton.language as tl

from sdtune.training.kernels.group_norm_parts import Gradients, Inputs, Norm, added_to, silu, silu_slope, tile
from sdtune.training.kernels.launch import launch, power_of_two

ELEMENTS = 8192
"""Of a program's tile: what is larger is gone through tile by tile, twice."""
SWITCHES = ["SILU", "SHIFT", "OFFSET", "FURTHER", "pixels"]
"""Not compiled for: so small a kernel waits for memory, not for a branch, and compiling delays the first step."""


def forward(inputs: Inputs, y: torch.Tensor, norm: Norm) -> None:
    """Fill y, [batch, height, width, channels], and the statistics."""
    batch, pixels, channels = inputs.rows.shape
    group = channels // norm.groups
    padded = power_of_two(group)
    rows, warps = tile(pixels, padded, ELEMENTS)
    launch(_forward, (norm.groups, batch))(
        *inputs.arguments(), y, pixels, channels, inputs.rows.stride(1), norm.eps, SILU=int(norm.silu), **inputs.added,
        GROUP=group, PADDED=padded, ROWS=rows, ONE=rows >= pixels, num_warps=warps,
    )  # fmt: skip


def backward(inputs: Inputs, grads: Gradients, norm: Norm) -> None:
    """Fill dx and sums."""
    batch, pixels, channels = inputs.rows.shape
    group = channels // norm.groups
    padded = power_of_two(group)
    rows, warps = tile(pixels, padded, ELEMENTS // 2)
    further = grads.dy if grads.further is None else grads.further
    dw, db, da = (inputs.statistics[0],) * 3 if grads.sums is None else grads.sums
    launch(_backward, (norm.groups, batch))(
        *inputs.arguments(), grads.dy, further, grads.dx, dw, db, da,
        pixels, channels, inputs.rows.stride(1), grads.dy.stride(1), further.stride(1),
        SILU=int(norm.silu), **inputs.added, FURTHER=int(grads.further is not None),
        AFFINE=grads.affine, ADDED=grads.added, GROUP=group, PADDED=padded, ROWS=rows, num_warps=warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=SWITCHES)
def _forward(
    x, shift, offset, weight, bias, means, rstds, y, pixels, channels, apart, eps, SILU, SHIFT, OFFSET,
    GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    group, image = tl.program_id(0), tl.program_id(1)
    lane, row = tl.arange(0, PADDED), tl.arange(0, ROWS)
    in_group = lane < GROUP
    channel = group * GROUP + lane
    added = added_to(shift, offset, image, channel, channels, SHIFT, OFFSET)[None, :]
    w = tl.load(weight + channel, mask=in_group, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + channel, mask=in_group, other=0.0).to(tl.float32)[None, :]
    x += image.to(tl.int64) * pixels * apart
    y += image.to(tl.int64) * pixels * channels
    if ONE:
        inside = (row < pixels)[:, None] & in_group[None, :]
        value = tl.load(x + row[:, None] * apart + channel[None, :], mask=inside, other=0.0).to(tl.float32) + added
        mean = tl.sum(tl.where(inside, value, 0.0)) / (pixels * GROUP)
        centred = tl.where(inside, value - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred) / (pixels * GROUP) + eps)
        z = centred * rstd * w + b
        if SILU:
            z = silu(z)
        tl.store(y + row[:, None] * channels + channel[None, :], z.to(y.dtype.element_ty), mask=inside)
    else:
        mean, squares, before = 0.0, 0.0, 0.0
        for start in range(0, pixels, ROWS):
            at = start + row
            inside = (at < pixels)[:, None] & in_group[None, :]
            value = tl.load(x + at[:, None] * apart + channel[None, :], mask=inside, other=0.0).to(tl.float32) + added
            count = (tl.minimum(pixels - start, ROWS) * GROUP).to(tl.float32)
            tile_mean = tl.sum(tl.where(inside, value, 0.0)) / count
            centred = tl.where(inside, value - tile_mean, 0.0)
            away = tile_mean - mean
            share = count / (before + count)
            mean += away * share
            squares += tl.sum(centred * centred) + away * away * before * share
            before += count
        rstd = 1.0 / tl.sqrt(squares / (pixels * GROUP) + eps)
        for start in range(0, pixels, ROWS):
            at = start + row
            inside = (at < pixels)[:, None] & in_group[None, :]
            value = tl.load(x + at[:, None] * apart + channel[None, :], mask=inside, other=0.0).to(tl.float32) + added
            z = (value - mean) * rstd * w + b
            if SILU:
                z = silu(z)
            tl.store(y + at[:, None] * channels + channel[None, :], z.to(y.dtype.element_ty), mask=inside)
    tl.store(means + image * tl.num_programs(0) + group, mean)
    tl.store(rstds + image * tl.num_programs(0) + group, rstd)


@triton.jit(do_not_specialize=SWITCHES)
def _backward(
    x, shift, offset, weight, bias, means, rstds, dy, further, dx, dweights, dbiases, dadded,
    pixels, channels, apart, dy_apart, further_apart, SILU, SHIFT, OFFSET, FURTHER,
    AFFINE: tl.constexpr, ADDED: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    group, image = tl.program_id(0), tl.program_id(1)
    lane, row = tl.arange(0, PADDED), tl.arange(0, ROWS)
    in_group = lane < GROUP
    channel = group * GROUP + lane
    mean = tl.load(means + image * tl.num_programs(0) + group)
    rstd = tl.load(rstds + image * tl.num_programs(0) + group)
    added = added_to(shift, offset, image, channel, channels, SHIFT, OFFSET)[None, :] - mean
    w = tl.load(weight + channel, mask=in_group, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + channel, mask=in_group, other=0.0).to(tl.float32)[None, :]
    x += image.to(tl.int64) * pixels * apart
    dy += image.to(tl.int64) * pixels * dy_apart
    further += image.to(tl.int64) * pixels * further_apart
    dx += image.to(tl.int64) * pixels * channels
    dweight = tl.zeros([PADDED], dtype=tl.float32)
    dbias = tl.zeros([PADDED], dtype=tl.float32)
    for start in range(0, pixels, ROWS):
        at = start + row
        inside = (at < pixels)[:, None] & in_group[None, :]
        normal = tl.load(x + at[:, None] * apart + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        normal = (normal + added) * rstd
        grad = tl.load(dy + at[:, None] * dy_apart + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        if SILU:
            grad *= silu_slope(normal * w + b)
        # Where there is nothing, the gradient is zero.
        dweight += tl.sum(grad * normal, axis=0)
        dbias += tl.sum(grad, axis=0)
    along = tl.sum(dweight[None, :] * w) / (pixels * GROUP)
    level = tl.sum(dbias[None, :] * w) / (pixels * GROUP)
    dsum = tl.zeros([PADDED], dtype=tl.float32)
    for start in range(0, pixels, ROWS):
        at = start + row
        inside = (at < pixels)[:, None] & in_group[None, :]
        normal = tl.load(x + at[:, None] * apart + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        normal = (normal + added) * rstd
        grad = tl.load(dy + at[:, None] * dy_apart + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        if SILU:
            grad *= silu_slope(normal * w + b)
        result = (grad * w - level - normal * along) * rstd
        if ADDED:
            dsum += tl.sum(tl.where(inside, result, 0.0), axis=0)
        if FURTHER:
            at_further = further + at[:, None] * further_apart + channel[None, :]
            result += tl.load(at_further, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at[:, None] * channels + channel[None, :], result.to(dx.dtype.element_ty), mask=inside)
    if AFFINE:
        tl.store(dweights + image * channels + channel, dweight, mask=in_group)
        tl.store(dbiases + image * channels + channel, dbias, mask=in_group)
    if ADDED:
        tl.store(dadded + image * channels + channel, dsum, mask=in_group)
