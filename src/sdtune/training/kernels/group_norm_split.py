"""GroupNorm where a group of an image is too much for one program: three kernels each way.

The first sums each channel over a chunk of the image's pixels, the second makes groups of the sums, the third goes over
the image again. A tile is 64 channels wide: all of Stable Diffusion's widths are multiples of it, groups are not.
"""

import torch
import triton
import triton.language as tl

from sdtune.training.kernels.group_norm_parts import Gradients, Inputs, Norm, added_to, silu, silu_slope, tile
from sdtune.training.kernels.launch import launch, power_of_two

COLUMNS, ELEMENTS = 64, 4096
"""Of a program's tile."""
COUNTS = ["pixels", "size", "rows_of_chunk", "chunks"]
"""Not compiled for, so that few kernels serve all shapes: each compilation delays the first step."""
PROGRAMS, CHUNKS = 1056, 64
"""How many should sum: eight for each multiprocessor of an H100; and at most so many chunks of an image."""


def forward(inputs: Inputs, y: torch.Tensor, norm: Norm) -> None:
    """Fill y, [batch, height, width, channels], and the statistics."""
    batch, pixels, channels = inputs.rows.shape
    columns, rows, chunk, chunks = _shape(inputs)
    group, blocks = channels // norm.groups, triton.cdiv(channels, columns)
    parts = inputs.rows.new_empty(2, batch, chunks, channels, dtype=torch.float32)
    x, shift, offset, weight, bias, means, rstds = inputs.arguments()
    apart, tiles = inputs.rows.stride(1), {"COLUMNS": columns, "ROWS": rows, "num_warps": 4}
    launch(_moments, (chunks, blocks, batch))(
        x, shift, offset, parts[0], parts[1], pixels, channels, apart, chunk, **inputs.added, **tiles
    )
    launch(_statistics, (norm.groups, batch))(
        parts[0], parts[1], means, rstds, pixels, channels, group, chunk, chunks, norm.eps,
        PADDED=power_of_two(group), CHUNKS=CHUNKS, num_warps=4,
    )  # fmt: skip
    launch(_normalize, (triton.cdiv(pixels, rows), blocks, batch))(
        x, shift, offset, weight, bias, means, rstds, y, pixels, channels, group, apart,
        SILU=norm.silu, **inputs.added, **tiles,
    )  # fmt: skip


def backward(inputs: Inputs, grads: Gradients, norm: Norm) -> None:
    """Fill dx and sums."""
    batch, pixels, channels = inputs.rows.shape
    columns, rows, chunk, chunks = _shape(inputs)
    group, blocks = channels // norm.groups, triton.cdiv(channels, columns)
    parts = grads.dy.new_empty(3, batch, chunks, channels, dtype=torch.float32)
    of_groups = grads.dy.new_empty(2, batch, norm.groups, dtype=torch.float32)
    apart, dy_apart = inputs.rows.stride(1), grads.dy.stride(1)
    tiles = {"SILU": norm.silu, **inputs.added, "COLUMNS": columns, "ROWS": rows, "num_warps": 4}
    launch(_sums, (chunks, blocks, batch))(
        *inputs.arguments(), grads.dy, parts[0], parts[1], parts[2],
        pixels, channels, group, apart, dy_apart, chunk, ADDED=grads.added, **tiles,
    )  # fmt: skip
    dw, db, da = parts if grads.sums is None else grads.sums
    launch(_group_sums, (norm.groups, batch))(
        parts[0], parts[1], parts[2], inputs.weight, inputs.statistics[1], of_groups[0], of_groups[1], dw, db, da,
        pixels, channels, group, chunks, PADDED=power_of_two(group), CHUNKS=CHUNKS,
        AFFINE=grads.affine, ADDED=grads.added, num_warps=4,
    )  # fmt: skip
    further = grads.dy if grads.further is None else grads.further
    launch(_gradient, (triton.cdiv(pixels, rows), blocks, batch))(
        *inputs.arguments(), grads.dy, further, of_groups[0], of_groups[1], grads.dx,
        pixels, channels, group, apart, dy_apart, further.stride(1), FURTHER=grads.further is not None, **tiles,
    )  # fmt: skip


def _shape(inputs: Inputs) -> tuple[int, int, int, int]:
    """Columns and rows of a tile, rows of a chunk, chunks of an image."""
    batch, pixels, channels = inputs.rows.shape
    columns = min(COLUMNS, power_of_two(channels))
    rows, _ = tile(pixels, columns, ELEMENTS)
    wanted = min(CHUNKS, triton.cdiv(PROGRAMS, triton.cdiv(channels, columns) * batch))
    chunk = max(rows, power_of_two(triton.cdiv(pixels, wanted)))
    return columns, rows, chunk, triton.cdiv(pixels, chunk)


@triton.jit(do_not_specialize=COUNTS)
def _moments(
    x, shift, offset, means, squares, pixels, channels, apart, rows_of_chunk,
    SHIFT: tl.constexpr, OFFSET: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations from it, of each channel in a chunk of an image."""
    chunk, image = tl.program_id(0), tl.program_id(2)
    channel, row = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    in_row = channel < channels
    added = added_to(shift, offset, image, channel, channels, SHIFT, OFFSET)[None, :]
    x += image.to(tl.int64) * pixels * apart
    mean = tl.zeros([COLUMNS], dtype=tl.float32)
    square = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, rows_of_chunk, ROWS):
        at = chunk * rows_of_chunk + start + row
        inside = (at < pixels)[:, None] & in_row[None, :]
        value = tl.load(x + at[:, None] * apart + channel[None, :], mask=inside, other=0.0).to(tl.float32) + added
        count = tl.sum((at < pixels).to(tl.float32))
        tile_mean = tl.sum(tl.where(inside, value, 0.0), axis=0) / tl.maximum(count, 1.0)
        centred = tl.where(inside, value - tile_mean[None, :], 0.0)
        away = tile_mean - mean
        # A chunk's tiles are full, up to the last that has anything.
        share = count / (start + count)
        mean += away * share
        square += tl.sum(centred * centred, axis=0) + away * away * (start * share)
    to = (image * tl.num_programs(0) + chunk) * channels + channel
    tl.store(means + to, mean, mask=in_row)
    tl.store(squares + to, square, mask=in_row)


@triton.jit(do_not_specialize=COUNTS)
def _statistics(
    part_means, part_squares, means, rstds, pixels, channels, size, rows_of_chunk, chunks, eps,
    PADDED: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    group, image = tl.program_id(0), tl.program_id(1)
    lane, chunk = tl.arange(0, PADDED), tl.arange(0, CHUNKS)
    inside = (chunk < chunks)[:, None] & (lane < size)[None, :]
    at = (image * chunks + chunk)[:, None] * channels + (group * size + lane)[None, :]
    count = tl.where(chunk < chunks, tl.minimum(pixels - chunk * rows_of_chunk, rows_of_chunk), 0).to(tl.float32)[
        :, None
    ]
    part = tl.load(part_means + at, mask=inside, other=0.0)
    mean = tl.sum(part * count) / (pixels * size)
    away = tl.where(inside, part - mean, 0.0)
    squares = tl.sum(tl.load(part_squares + at, mask=inside, other=0.0) + away * away * count)
    tl.store(means + image * tl.num_programs(0) + group, mean)
    tl.store(rstds + image * tl.num_programs(0) + group, 1.0 / tl.sqrt(squares / (pixels * size) + eps))


@triton.jit(do_not_specialize=COUNTS)
def _normalize(
    x, shift, offset, weight, bias, means, rstds, y, pixels, channels, size, apart,
    SILU: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2)
    channel, at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_row = channel < channels
    inside = (at < pixels)[:, None] & in_row[None, :]
    group = image * (channels // size) + channel // size
    mean = tl.load(means + group, mask=in_row, other=0.0)
    rstd = tl.load(rstds + group, mask=in_row, other=0.0)
    added = added_to(shift, offset, image, channel, channels, SHIFT, OFFSET) - mean
    scale = tl.load(weight + channel, mask=in_row, other=0.0).to(tl.float32) * rstd
    b = tl.load(bias + channel, mask=in_row, other=0.0).to(tl.float32)
    x += image.to(tl.int64) * pixels * apart
    y += image.to(tl.int64) * pixels * channels
    value = tl.load(x + at[:, None] * apart + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    z = (value + added[None, :]) * scale[None, :] + b[None, :]
    if SILU:
        z = silu(z)
    tl.store(y + at[:, None] * channels + channel[None, :], z.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _sums(
    x, shift, offset, weight, bias, means, rstds, dy, dweights, dbiases, normals,
    pixels, channels, size, apart, dy_apart, rows_of_chunk, ADDED: tl.constexpr, SILU: tl.constexpr,
    SHIFT: tl.constexpr, OFFSET: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias of each channel in a chunk of an image, and the sum of what was normalized."""
    chunk, image = tl.program_id(0), tl.program_id(2)
    channel, row = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    in_row = channel < channels
    group = image * (channels // size) + channel // size
    mean = tl.load(means + group, mask=in_row, other=0.0)
    rstd = tl.load(rstds + group, mask=in_row, other=0.0)[None, :]
    added = (added_to(shift, offset, image, channel, channels, SHIFT, OFFSET) - mean)[None, :]
    w = tl.load(weight + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
    x += image.to(tl.int64) * pixels * apart
    dy += image.to(tl.int64) * pixels * dy_apart
    dweight = tl.zeros([COLUMNS], dtype=tl.float32)
    dbias = tl.zeros([COLUMNS], dtype=tl.float32)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, rows_of_chunk, ROWS):
        at = chunk * rows_of_chunk + start + row
        inside = (at < pixels)[:, None] & in_row[None, :]
        normal = tl.load(x + at[:, None] * apart + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        normal = (normal + added) * rstd
        grad = tl.load(dy + at[:, None] * dy_apart + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        if SILU:
            grad *= silu_slope(normal * w + b)
        dweight += tl.sum(grad * normal, axis=0)
        dbias += tl.sum(grad, axis=0)
        if ADDED:
            total += tl.sum(tl.where(inside, normal, 0.0), axis=0)
    to = (image * tl.num_programs(0) + chunk) * channels + channel
    tl.store(dweights + to, dweight, mask=in_row)
    tl.store(dbiases + to, dbias, mask=in_row)
    if ADDED:
        tl.store(normals + to, total, mask=in_row)


@triton.jit(do_not_specialize=COUNTS)
def _group_sums(
    part_dweights, part_dbiases, part_normals, weight, rstds, alongs, levels, dweights, dbiases, dadded,
    pixels, channels, size, chunks, PADDED: tl.constexpr, CHUNKS: tl.constexpr,
    AFFINE: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    group, image = tl.program_id(0), tl.program_id(1)
    lane, chunk = tl.arange(0, PADDED), tl.arange(0, CHUNKS)
    in_group = lane < size
    inside = (chunk < chunks)[:, None] & in_group[None, :]
    channel = group * size + lane
    at = (image * chunks + chunk)[:, None] * channels + channel[None, :]
    w = tl.load(weight + channel, mask=in_group, other=0.0).to(tl.float32)
    dweight = tl.sum(tl.load(part_dweights + at, mask=inside, other=0.0), axis=0)
    dbias = tl.sum(tl.load(part_dbiases + at, mask=inside, other=0.0), axis=0)
    along = tl.sum(dweight * w) / (pixels * size)
    level = tl.sum(dbias * w) / (pixels * size)
    of_group = image * tl.num_programs(0) + group
    tl.store(alongs + of_group, along)
    tl.store(levels + of_group, level)
    to = image * channels + channel
    if AFFINE:
        tl.store(dweights + to, dweight, mask=in_group)
        tl.store(dbiases + to, dbias, mask=in_group)
    if ADDED:
        normal = tl.sum(tl.load(part_normals + at, mask=inside, other=0.0), axis=0)
        rstd = tl.load(rstds + of_group)
        # The sum of the gradient over the pixels, which is affine in what was summed.
        tl.store(dadded + to, (dbias * w - level * pixels - normal * along) * rstd, mask=in_group)


@triton.jit(do_not_specialize=COUNTS)
def _gradient(
    x, shift, offset, weight, bias, means, rstds, dy, further, alongs, levels, dx,
    pixels, channels, size, apart, dy_apart, further_apart, FURTHER: tl.constexpr, SILU: tl.constexpr,
    SHIFT: tl.constexpr, OFFSET: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2)
    channel, at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_row = channel < channels
    inside = (at < pixels)[:, None] & in_row[None, :]
    group = image * (channels // size) + channel // size
    mean = tl.load(means + group, mask=in_row, other=0.0)
    rstd = tl.load(rstds + group, mask=in_row, other=0.0)[None, :]
    along = tl.load(alongs + group, mask=in_row, other=0.0)[None, :]
    level = tl.load(levels + group, mask=in_row, other=0.0)[None, :]
    added = (added_to(shift, offset, image, channel, channels, SHIFT, OFFSET) - mean)[None, :]
    w = tl.load(weight + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
    x += image.to(tl.int64) * pixels * apart
    dy += image.to(tl.int64) * pixels * dy_apart
    further += image.to(tl.int64) * pixels * further_apart
    dx += image.to(tl.int64) * pixels * channels
    normal = tl.load(x + at[:, None] * apart + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    normal = (normal + added) * rstd
    grad = tl.load(dy + at[:, None] * dy_apart + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if SILU:
        grad *= silu_slope(normal * w + b)
    result = (grad * w - level - normal * along) * rstd
    if FURTHER:
        at_further = further + at[:, None] * further_apart + channel[None, :]
        result += tl.load(at_further, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at[:, None] * channels + channel[None, :], result.to(dx.dtype.element_ty), mask=inside)
