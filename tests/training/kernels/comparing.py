"""Values and gradients of a kernel against its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

Function: TypeAlias = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]

HALF = 3
"""Times the error of plain torch in half precision, that a kernel may have: torch has float32 within on the CPU, also
where tensor cores take half precision."""


def outcome(function: Function, inputs: Sequence[torch.Tensor | None], used: Sequence[int]) -> list[torch.Tensor]:
    """Results and gradients of the inputs that have one, of a random sum of the ``used`` results."""
    given = [None if one is None else one.detach().clone(memory_format=torch.preserve_format) for one in inputs]
    for one, original in zip(given, inputs, strict=True):
        if one is not None and original is not None and original.requires_grad:
            one.requires_grad_()
    results = function(*given)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    chosen = [results[number] for number in used]
    sums = [(one * torch.randn(one.shape, generator=generator)).sum(dtype=torch.float64) for one in chosen]
    trained = [one for one in given if one is not None and one.requires_grad]
    return [*chosen, *torch.autograd.grad(torch.stack(sums).sum(), trained)]


def errors(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> list[float]:
    """The largest error of each, as a part of the largest number in it."""
    return [
        ((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-6)).item()
        for one, other in zip(found, wanted, strict=True)
    ]


def assert_same(
    kernel: Function, reference: Function, inputs: Sequence[torch.Tensor | None], used: Sequence[int]
) -> None:
    """In float32: equal but for the order of sums."""
    wanted = outcome(reference, [double(one) for one in inputs], used)
    assert max(errors(outcome(kernel, inputs, used), wanted)) < 1e-5


def assert_as_exact(
    kernel: Function, reference: Function, inputs: Sequence[torch.Tensor | None], used: Sequence[int]
) -> None:
    """In half precision: against float64, not much further off than plain torch, or than a rounding is."""
    wanted = outcome(reference, [double(one) for one in inputs], used)
    plain = errors(outcome(reference, inputs, used), wanted)
    found = errors(outcome(kernel, inputs, used), wanted)
    rounding = max(torch.finfo(one.dtype).eps for one in inputs if one is not None) / 4
    for ours, theirs in zip(found, plain, strict=True):
        assert ours < HALF * max(theirs, rounding), (found, plain)


def double(one: torch.Tensor | None) -> torch.Tensor | None:
    return None if one is None else one.detach().double().requires_grad_(one.requires_grad)
