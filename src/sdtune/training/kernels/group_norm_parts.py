"""What both ways to launch GroupNorm share."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sdtune.training.kernels.launch import power_of_two


class Norm(NamedTuple):
    """What is computed: groups, epsilon, SiLU or none, the type of the result; whole: by one program for each group."""

    groups: int
    eps: float
    silu: bool
    dtype: torch.dtype
    whole: bool


class Inputs(NamedTuple):
    """rows: [batch, pixels, channels]; shift: [batch, channels]; offset, weight, bias: [channels].

    statistics: float32 [2, batch, groups], mean and 1 / deviation.
    """

    rows: torch.Tensor
    shift: torch.Tensor | None
    offset: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor
    statistics: torch.Tensor

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """All of them, for a kernel: a tensor also where there is none, which is not read then."""
        rows, shift, offset, weight, bias, statistics = self
        shift, offset = rows if shift is None else shift, rows if offset is None else offset
        return rows, shift, offset, weight, bias, statistics[0], statistics[1]

    @property
    def added(self) -> dict[str, int]:
        """What is added before the norm, as kernels are told it."""
        return {"SHIFT": int(self.shift is not None), "OFFSET": int(self.offset is not None)}


class Gradients(NamedTuple):
    """dy, further: [batch, pixels, channels], of the norm and of x from further on; dx: as many elements, contiguous.

    sums: float32 [3, batch, channels] of each image's gradients of weight, bias and what is added, where needed.
    """

    dy: torch.Tensor
    further: torch.Tensor | None
    dx: torch.Tensor
    sums: torch.Tensor | None
    affine: bool
    added: bool


def tile(count: int, columns: int, elements: int) -> tuple[int, int]:
    """Rows of a program's tile of so many columns and at most so many elements, and its warps."""
    rows = max(1, min(power_of_two(count), elements // columns))
    return rows, max(1, min(8, rows * columns // 512))


@triton.jit
def added_to(shift, offset, image, channel, channels, SHIFT, OFFSET):
    """What is added to each channel, float32."""
    inside = channel < channels
    added = tl.zeros(channel.shape, dtype=tl.float32)
    if OFFSET:
        added += tl.load(offset + channel, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        added += tl.load(shift + image * channels + channel, mask=inside, other=0.0).to(tl.float32)
    return added


@triton.jit
def silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def silu_slope(z):
    s = tl.sigmoid(z)
    return s * (1.0 + z * (1.0 - s))
