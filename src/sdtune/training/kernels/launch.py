"""What all kernels share: where they run, in which type they answer, and how they are started."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs kernels step by step on the CPU, if the variable was set before it was imported: the tests do so."""

_rehearsal: "Rehearsal | None" = None


class Rehearsal:
    """Has each kernel that would be started compiled, in a thread of its own and once for each kind of arguments."""

    def __init__(self, device: torch.device, pool: ThreadPoolExecutor) -> None:
        self._device, self._pool = device, pool
        self._compiled: dict[Any, Future[None]] = {}

    def compile(self, kernel: Any, *args: Any, **options: Any) -> None:
        """In place of a start: nothing is computed, and the call does not wait."""
        # Triton's interpreter, of the tests, specializes nothing.
        general = [parameter.do_not_specialize for parameter in getattr(kernel, "params", ())]
        kinds = tuple(_kind_of(arg, special=not same) for arg, same in zip_longest(args, general[: len(args)]))
        key = (id(kernel), kinds, tuple(options.items()))
        if key not in self._compiled:
            # A type stands for a tensor: tensors would be kept until it is compiled.
            like = [arg.dtype if isinstance(arg, torch.Tensor) and _is_aligned(arg) else arg for arg in args]
            self._compiled[key] = self._pool.submit(self._compile, kernel, like, options)

    def wait(self) -> int:
        """Until all are compiled; how many. What went wrong with one is raised."""
        for future in self._compiled.values():
            future.result()
        return len(self._compiled)

    def _compile(self, kernel: Any, like: list[Any], options: dict[str, Any]) -> None:
        # A new thread would be on the first GPU.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            kernel.warmup(*like, grid=(1,), **options)


@contextmanager
def rehearsal(device: torch.device) -> Iterator[None]:
    """Inside, kernels are compiled instead of started, side by side; at the end all are.

    What they would have written is left as the memory was, so that all results of it are worth nothing.
    """
    global _rehearsal
    # Autograd starts the backward pass's in a thread of its own, which knows nothing of this one's context.
    pool = ThreadPoolExecutor(os.cpu_count())
    _rehearsal = now = Rehearsal(device, pool)
    try:
        yield
        now.wait()
    finally:
        _rehearsal = None
        pool.shutdown(wait=False, cancel_futures=True)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``, or in a rehearsal what has it compiled instead."""
    if _rehearsal is not None:
        return partial(_rehearsal.compile, kernel)
    started: Callable[..., Any] = kernel[grid]
    return started


def _kind_of(arg: Any, *, special: bool) -> Any:
    """What a kernel is compiled anew for: Triton looks at the type, and whether numbers are 1 or multiples of 16."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, _is_aligned(arg)
    if isinstance(arg, int):
        return arg.bit_length() > 31, special and arg == 1, special and arg % 16 == 0
    return type(arg)


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


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
