"""GroupNorm by both ways to launch it: values and gradients."""

from __future__ import annotations

import pytest
import torch

from sdtune.training.kernels import group_norm_split
from sdtune.training.kernels.group_norm import group_norm, group_norm_reference
from sdtune.training.kernels.group_norm_parts import Inputs
from sdtune.training.kernels.launch import pixel_rows
from tests.training.kernels.comparing import assert_as_exact, assert_same

WAYS = pytest.mark.parametrize("whole", [True, False], ids=["whole", "split"])


def inputs(shape, dtype, trained, shift, offset, layout=torch.channels_last):
    batch, channels = shape[:2]
    x = (2 * torch.randn(shape) + 3).to(dtype).to(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(channels).to(dtype).requires_grad_(trained) for _ in range(2))
    added = [
        torch.randn(batch, channels).to(dtype).requires_grad_(trained) if shift else None,
        torch.randn(channels).to(dtype).requires_grad_(trained) if offset else None,
    ]
    return [x, weight, bias, *added]


def functions(groups, silu, whole):
    def kernel(x, weight, bias, shift, offset):
        return group_norm(x, weight, bias, groups, 1e-5, silu, shift, offset, whole)

    def reference(x, weight, bias, shift, offset):
        return group_norm_reference(x, weight, bias, groups, 1e-5, silu, shift, offset)

    return kernel, reference


@WAYS
@pytest.mark.parametrize(
    ("shape", "groups", "silu", "shift", "offset", "trained"),
    [
        ((2, 80, 6, 5), 16, True, True, True, True),
        ((1, 80, 9, 13), 16, False, False, False, False),
        ((2, 30, 1, 1), 3, True, True, False, False),
        # Several tiles and chunks, the last of them not full.
        ((1, 64, 17, 30), 2, True, False, True, True),
        ((1, 96, 31, 6), 1, False, False, False, True),
    ],
)
def test_float32(whole, shape, groups, silu, shift, offset, trained):
    assert_same(*functions(groups, silu, whole), inputs(shape, torch.float32, trained, shift, offset), [0, 1])


@WAYS
@pytest.mark.parametrize("trained", [False, True])
def test_bfloat16(whole, trained):
    given = inputs((2, 40, 9, 8), torch.bfloat16, trained, shift=True, offset=True)
    assert_as_exact(*functions(4, True, whole), given, [0, 1])


@WAYS
def test_gradient_of_the_norm_alone(whole):
    assert_same(*functions(2, True, whole), inputs((1, 32, 4, 4), torch.float32, False, False, False), [0])


@WAYS
def test_other_layouts(whole):
    """Rows of a tensor that was put together of two, and a layout that must be copied."""
    kernel, reference = functions(4, True, whole)
    both = torch.randn(2, 64, 5, 4).to(memory_format=torch.channels_last)
    given = inputs((2, 24, 5, 4), torch.float32, False, False, False)
    part = both[:, 16:40]
    assert (kernel(part, *given[1:])[0] - reference(part, *given[1:])[0]).abs().max() < 1e-5
    given = inputs((2, 24, 5, 4), torch.float32, False, False, False, layout=torch.contiguous_format)
    assert_same(kernel, reference, given, [0, 1])
    assert kernel(*given)[0].is_contiguous(memory_format=torch.channels_last)


@WAYS
def test_mean_that_is_much_larger_than_the_deviation(whole):
    kernel, reference = functions(2, False, whole)
    x = torch.randn(1, 32, 16, 40) + 1000
    found, _ = kernel(x, torch.ones(32), torch.zeros(32), None, None)
    wanted, _ = reference(x.double(), torch.ones(32).double(), torch.zeros(32).double(), None, None)
    assert (found - wanted).abs().max() < 1e-3


@WAYS
def test_frozen_weights_have_no_gradient_and_trained_ones_are_repeatable(whole):
    kernel, _ = functions(4, True, whole)
    frozen = inputs((2, 32, 5, 5), torch.float32, False, True, True)
    kernel(*frozen)[0].sum().backward()
    assert [one.grad is None for one in frozen] == [False, True, True, True, True]
    trained = inputs((2, 32, 5, 5), torch.float32, True, True, True)
    first, second = (torch.autograd.grad(kernel(*trained)[0].square().sum(), trained) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_chunks_of_several_tiles(monkeypatch):
    """As in large batches: fewer chunks of an image, and the last tiles of its last chunk are empty."""
    monkeypatch.setattr(group_norm_split, "CHUNKS", 2)
    given = inputs((1, 64, 15, 20), torch.float32, True, True, True)
    assert group_norm_split._shape(Inputs(pixel_rows(given[0]), None, None, *given[1:3], given[1]))[1:] == (64, 256, 2)
    assert_same(*functions(4, True, False), given, [0, 1])
