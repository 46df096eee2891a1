"""What all kernels share: where they run, and in which type they answer."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs kernels step by step on the CPU, if the variable was set before it was imported: the tests do so."""


def usable(x: torch.Tensor) -> bool:
    """Kernels can run on this tensor."""
    return (x.is_cuda or INTERPRETED) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type that the matrix product after this one will compute in: autocast's, or the tensor's own.

    Under autocast torch's norms answer in float32, which is cast for the next product: the kernels answer in its type,
    rounded once, as there.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()


def pixel_rows(x: torch.Tensor) -> torch.Tensor:
    """[batch, channels, height, width] as [batch, pixels, channels], contiguous channels; no copy from channels_last.

    Slices of the channels of such a tensor need none either: rows are then further apart than they are long.
    """
    rows = x.permute(0, 2, 3, 1)
    batch, height, width, channels = rows.shape
    apart = rows.stride(2) if width > 1 else rows.stride(1) if height > 1 else rows.stride(0)
    wanted = (height * width * apart, width * apart, apart, 1)
    sizes = zip(rows.shape, rows.stride(), wanted, strict=True)
    if apart < channels or any(size > 1 and stride != want for size, stride, want in sizes):
        return rows.contiguous().view(batch, height * width, channels)
    return rows.as_strided((batch, height * width, channels), (height * width * apart, apart, 1))
