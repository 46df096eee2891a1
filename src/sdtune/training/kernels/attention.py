"""Attention to few keys, as a prompt's 77: all of them in each program's tile, one kernel forward and two backward.

torch's scaled_dot_product_attention has three kernels, all made for thousands of keys: cuDNN's, which it takes on an
H100, flash-attn's and the efficient one. flash-attn's backward pass, in torch and in its own package, parts the keys
among its programs, of which 77 give one or two for each head, and has kernels before and after it for what they share.
Here programs part the queries. Each has all keys, so that nothing of a row is kept or prepared: its sum, and that of
the gradient times the output, are taken again from what is in the tile. The gradients of keys and values are parts of
one tensor, as their projections' product is. Many keys are left to torch: within 2 % its choice was the quickest at all
shapes of Stable Diffusion, and padded heads were slower.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional

from sdtune.training.kernels.launch import launch, power_of_two, usable

KEYS, HEADS = 128, 40
"""At most: keys, and heads of all images together. Measured on an H100: with more of either torch's is as quick."""
PROGRAMS, START = 132, 2
"""Of the backward pass that run at a time, one on each multiprocessor of an H100: a fixed number gives a fixed order.
What a program needs to start and to end, in tiles."""
PARTS, ELEMENTS = 16, 256
"""Of the tile that sums the programs' gradients of keys and values."""
COUNTS = ["heads", "tokens", "keys", "tiles", "q_apart", "k_apart", "v_apart", "dy_apart", "q_image", "k_image",
          "v_image", "dy_image"]  # fmt: skip
"""Not compiled for. Distances are in units of EIGHT numbers, 16 bytes: so they are known to be multiples of it."""
EIGHT = 8


class Tiles(NamedTuple):
    """Queries of a tile and the warps of its program, forward and backward.

    apart: the gradients of keys and of values are summed by different programs, for which registers are too few in one.
    """

    rows: int
    warps: int
    back_rows: int
    back_warps: int
    apart: bool
    stages: int = 2
    programs: int = PROGRAMS


def tiles(head_dim: int, keys: int) -> Tiles:
    """The quickest on an H100, of those that ``benchmarks/kernel_speed.py --tune`` tries. keys: padded."""
    numbers = keys * head_dim
    return Tiles(64, 4, 128 if numbers <= 128 * 64 else 64, 8, apart=numbers > 128 * 80)


def attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """As diffusers' AttnProcessor2_0 does it."""
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """[batch, heads, tokens, head_dim] each, to the same; key and value have tokens of their own.

    Softmax and sums are float32. The result, and the gradient of query, are views of [batch, tokens, heads * head_dim],
    those of key and value of one [batch, keys, 2 * heads * head_dim].
    """
    if mask is not None or not few_keys(query, key, value):
        return attention_reference(query, key, value, mask)
    result: torch.Tensor = FewKeysAttention.apply(query, key, value)
    return result


def few_keys(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """The kernels take these."""
    head_dim, keys = query.shape[-1], max(16, power_of_two(key.shape[2]))
    return (
        usable(query)
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and head_dim % EIGHT == 0
        and value.shape == key.shape
        and head_dim <= 160
        and keys <= KEYS
        and query.shape[0] * query.shape[1] <= HEADS
        and _has_room(query.device)
    )


@cache
def _has_room(device: torch.device) -> bool:
    """The GPU is of the kind that was measured, Hopper: heads of 160 need more shared memory than most have."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


class FewKeysAttention(torch.autograd.Function):
    """Keeps its inputs alone; the backward pass computes the weights again."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = _rows(query), _rows(key), _rows(value)
        batch, heads, tokens, head_dim = query.shape
        keys, options = key.shape[2], _options(query, key)
        chosen = tiles(head_dim, options["KEYS"])
        y = query.new_empty(batch, tokens, heads, head_dim)
        launch(_forward, (triton.cdiv(tokens, chosen.rows), batch * heads))(
            query, key, value, y, head_dim**-0.5, heads, tokens, keys, *_distances(query, key, value),
            ROWS=chosen.rows, num_warps=chosen.warps, **options,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value)
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        needs_query, *needs_others = ctx.needs_input_grad
        dy = _rows(dy.to(query.dtype))
        batch, heads, tokens, head_dim = query.shape
        keys, options = key.shape[2], _options(query, key)
        chosen, others = tiles(head_dim, options["KEYS"]), any(needs_others)
        apart = chosen.apart and others
        count = triton.cdiv(tokens, chosen.back_rows)
        of_each = _tiles_of_each(count, batch * heads * (1 + apart), chosen.programs)
        parts = triton.cdiv(count, of_each)
        dquery = query.new_empty(batch, tokens, heads, head_dim)
        sums = query.new_empty(parts if others else 0, batch, keys, 2, heads, head_dim, dtype=torch.float32)
        launch(_backward, (parts, batch * heads, 1 + apart))(
            query, key, value, dy, dquery, sums, head_dim**-0.5, heads, tokens, keys, of_each,
            *_distances(query, key, value, dy), ROWS=chosen.back_rows, OTHERS=others, APART=apart,
            num_warps=chosen.back_warps, num_stages=chosen.stages, **options,
        )  # fmt: skip
        dquery = dquery.transpose(1, 2) if needs_query else None
        if not others:
            return dquery, None, None
        dothers = query.new_empty(batch, keys, 2, heads, head_dim)
        numbers = dothers.numel()
        launch(_sum, (triton.cdiv(numbers, ELEMENTS),))(
            sums, dothers, numbers // EIGHT, parts, PARTS=PARTS, ELEMENTS=ELEMENTS, num_warps=4
        )
        dkey, dvalue = dothers.permute(2, 0, 3, 1, 4)
        return dquery, dkey if needs_others[0] else None, dvalue if needs_others[1] else None


@cache
def _tiles_of_each(count: int, times: int, programs: int) -> int:
    """How many of ``count`` tiles a program takes, which is done in the least time: there are ``times`` as many."""

    def time(of_each: int) -> int:
        rounds: int = triton.cdiv(triton.cdiv(count, of_each) * times, programs)
        return rounds * (of_each + START)

    return min(range(1, count + 1), key=time)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[batch, heads, tokens, head_dim], a head's numbers behind each other and the heads too; a copy if it was not."""
    _, heads, _, head_dim = x.shape
    image, head, token, number = x.stride()
    if number == 1 and head in (head_dim, head_dim if heads > 1 else head) and not (image % EIGHT or token % EIGHT):
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _distances(*given: torch.Tensor) -> list[int]:
    """From token to token of each, and from image to image, as the kernels take them."""
    return [one.stride(dim) // EIGHT for one in given for dim in (2, 0)]


def _options(query: torch.Tensor, key: torch.Tensor) -> dict[str, int]:
    """The head's size, and what the kernels go through it and the keys with: powers of two, not below 16.

    A head goes in two pieces, 40 as 32 + 16, 80 as 64 + 16, 160 as 128 + 32: one would have 64, 128 and 256.
    """
    head_dim = query.shape[-1]
    first = max(16, power_of_two(head_dim + 1) // 2)
    rest = max(16, power_of_two(head_dim - first)) if head_dim > first else 0
    return {"HEAD": head_dim, "FIRST": first, "REST": rest, "KEYS": max(16, power_of_two(key.shape[2]))}


@triton.jit
def _load(x, row, count, apart, HEAD: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """A head's rows in two pieces, zeros where there is nothing; without a rest it is the first again."""
    column, in_rows = tl.arange(0, FIRST)[None, :], (row < count)[:, None]
    x += row[:, None] * (apart * 8)
    first = tl.load(x + column, mask=in_rows & (column < HEAD), other=0.0)
    rest = first
    if REST > 0:
        column = FIRST + tl.arange(0, REST)[None, :]
        rest = tl.load(x + column, mask=in_rows & (column < HEAD), other=0.0)
    return first, rest


@triton.jit
def _store(x, first, rest, scale, row, count, apart, HEAD: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    column, in_rows = tl.arange(0, FIRST)[None, :], (row < count)[:, None]
    x += row[:, None] * apart
    tl.store(x + column, (first * scale).to(x.dtype.element_ty), mask=in_rows & (column < HEAD))
    if REST > 0:
        column = FIRST + tl.arange(0, REST)[None, :]
        tl.store(x + column, (rest * scale).to(x.dtype.element_ty), mask=in_rows & (column < HEAD))


@triton.jit
def _across(a, a_rest, b, b_rest, REST: tl.constexpr):
    """Products of rows: [rows of a, rows of b]."""
    product = tl.dot(a, tl.trans(b))
    if REST > 0:
        product = tl.dot(a_rest, tl.trans(b_rest), product)
    return product


@triton.jit
def _added(first, rest, a, b, b_rest, REST: tl.constexpr):
    """The sum and a b, in two pieces."""
    first = tl.dot(a, b, first)
    if REST > 0:
        rest = tl.dot(a, b_rest, rest)
    return first, rest


@triton.jit
def _zeros(ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    first = tl.zeros([ROWS, FIRST], dtype=tl.float32)
    rest = first
    if REST > 0:
        rest = tl.zeros([ROWS, REST], dtype=tl.float32)
    return first, rest


@triton.jit
def _softmax(scores, scale, key, keys):
    """Weights of rows, of which the largest is 1, and what they are to be multiplied with, [rows, 1]."""
    # The power of two is what the GPU has.
    scores = tl.where((key < keys)[None, :], scores * (scale * 1.4426950408889634), float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return weights, (1.0 / tl.sum(weights, axis=1))[:, None]


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    q, k, v, y, scale, heads, tokens, keys, q_apart, q_image, k_apart, k_image, v_apart, v_image,
    HEAD: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    row, key = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS)
    # All is asked for before anything is waited for.
    query, query_rest = _load(q + image * (q_image * 8) + head * HEAD, row, tokens, q_apart, HEAD, FIRST, REST)
    some, some_rest = _load(k + image * (k_image * 8) + head * HEAD, key, keys, k_apart, HEAD, FIRST, REST)
    value, value_rest = _load(v + image * (v_image * 8) + head * HEAD, key, keys, v_apart, HEAD, FIRST, REST)
    weights, share = _softmax(_across(query, query_rest, some, some_rest, REST), scale, key, keys)
    first, rest = _zeros(ROWS, FIRST, REST)
    first, rest = _added(first, rest, weights.to(v.dtype.element_ty), value, value_rest, REST)
    y += image * tokens * (heads * HEAD) + head * HEAD
    _store(y, first, rest, share, row, tokens, heads * HEAD, HEAD, FIRST, REST)


@triton.jit(do_not_specialize=COUNTS)
def _backward(
    q, k, v, dy, dq, sums, scale, heads, tokens, keys, tiles,
    q_apart, q_image, k_apart, k_image, v_apart, v_image, dy_apart, dy_image,
    HEAD: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    OTHERS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """The gradient of a share of the queries, and the sums over them that are keys' and values'."""
    image, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    q += image * (q_image * 8) + head * HEAD
    k += image * (k_image * 8) + head * HEAD
    v += image * (v_image * 8) + head * HEAD
    dy += image * (dy_image * 8) + head * HEAD
    dq += image * tokens * (heads * HEAD) + head * HEAD
    # [parts, batch, keys, 2, heads, HEAD], keys' before values'.
    images = tl.num_programs(1) // heads
    dk = sums + (tl.program_id(0) * images + image) * keys * (2 * heads * HEAD) + head * HEAD
    dv = dk + heads * HEAD
    if not APART:
        _share(
            q, k, v, dy, dq, dk, dv, scale, heads, tokens, keys, tiles, q_apart, k_apart, v_apart, dy_apart,
            HEAD, FIRST, REST, KEYS, ROWS, True, OTHERS, OTHERS,
        )  # fmt: skip
    elif tl.program_id(2) == 0:
        _share(
            q, k, v, dy, dq, dk, dv, scale, heads, tokens, keys, tiles, q_apart, k_apart, v_apart, dy_apart,
            HEAD, FIRST, REST, KEYS, ROWS, True, True, False,
        )  # fmt: skip
    else:
        _share(
            q, k, v, dy, dq, dk, dv, scale, heads, tokens, keys, tiles, q_apart, k_apart, v_apart, dy_apart,
            HEAD, FIRST, REST, KEYS, ROWS, False, False, True,
        )  # fmt: skip


@triton.jit
def _share(
    q, k, v, dy, dq, dk, dv, scale, heads, tokens, keys, tiles, q_apart, k_apart, v_apart, dy_apart,
    HEAD: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    DQ: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """What of the gradients is wanted, of the share's tiles."""
    key = tl.arange(0, KEYS)
    some, some_rest = _load(k, key, keys, k_apart, HEAD, FIRST, REST)
    value, value_rest = _load(v, key, keys, v_apart, HEAD, FIRST, REST)
    dkey, dkey_rest = _zeros(KEYS, FIRST, REST)
    dvalue, dvalue_rest = _zeros(KEYS, FIRST, REST)
    for tile in range(tiles):
        row = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        query, query_rest = _load(q, row, tokens, q_apart, HEAD, FIRST, REST)
        grad, grad_rest = _load(dy, row, tokens, dy_apart, HEAD, FIRST, REST)
        weights, share = _softmax(_across(query, query_rest, some, some_rest, REST), scale, key, keys)
        weights *= share
        if DV:
            rounded = tl.trans(weights.to(grad.dtype))
            dvalue, dvalue_rest = _added(dvalue, dvalue_rest, rounded, grad, grad_rest, REST)
        if DQ:
            dweights = _across(grad, grad_rest, value, value_rest, REST)
            # The sum is that of dy times y.
            dscores = weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None])
            dscores = dscores.to(query.dtype)
            first, rest = _zeros(ROWS, FIRST, REST)
            first, rest = _added(first, rest, dscores, some, some_rest, REST)
            _store(dq, first, rest, scale, row, tokens, heads * HEAD, HEAD, FIRST, REST)
            if DK:
                dkey, dkey_rest = _added(dkey, dkey_rest, tl.trans(dscores), query, query_rest, REST)
    if DK:
        _store(dk, dkey, dkey_rest, scale, key, keys, 2 * heads * HEAD, HEAD, FIRST, REST)
    if DV:
        _store(dv, dvalue, dvalue_rest, 1.0, key, keys, 2 * heads * HEAD, HEAD, FIRST, REST)


@triton.jit(do_not_specialize=["count", "parts"])
def _sum(x, y, count, parts, PARTS: tl.constexpr, ELEMENTS: tl.constexpr):
    """[parts, count] to [count]; count in units of eight."""
    at, part = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS), tl.arange(0, PARTS)
    inside = at < count * 8
    total = tl.zeros([ELEMENTS], dtype=tl.float32)
    for start in range(0, parts, PARTS):
        number = (start + part).to(tl.int64)[:, None]
        given = tl.load(x + number * (count * 8) + at[None, :], mask=(number < parts) & inside[None, :], other=0.0)
        total += tl.sum(given, axis=0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
