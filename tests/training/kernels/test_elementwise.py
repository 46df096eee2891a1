"""GEGLU, LayerNorm and the residual addition: values and gradients."""

from __future__ import annotations

import pytest
import torch

from sdtune.training.kernels import layer_norm
from sdtune.training.kernels.geglu import geglu, geglu_reference
from sdtune.training.kernels.group_norm import group_norm
from sdtune.training.kernels.layer_norm import add_layer_norm, add_layer_norm_reference
from sdtune.training.kernels.residual import add_bias, add_bias_reference
from tests.training.kernels.comparing import assert_as_exact, assert_same

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def check(dtype):
    return assert_same if dtype == torch.float32 else assert_as_exact


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 48), (1, 3, 1000), (40, 2)])
def test_geglu(dtype, shape):
    projected = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    check(dtype)(geglu, geglu_reference, [projected], [0])


def test_gelu_is_the_exact_one():
    """The approximation by tanh is off by 5e-4 there."""
    gate = torch.linspace(-4, 4, 200)
    found = geglu(torch.cat([torch.ones(200), gate])[None])[0]
    assert (found - torch.nn.functional.gelu(gate)).abs().max() < 1e-6


@DTYPES
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 80), (1, 33, 320), (3, 2)])
def test_layer_norm(dtype, trained, residual, shape):
    channels = shape[-1]
    x = (torch.randn(shape) + 2).to(dtype).requires_grad_()
    other = torch.randn(shape).to(dtype).requires_grad_() if residual else None
    weight, bias = (torch.randn(channels).to(dtype).requires_grad_(trained) for _ in range(2))
    check(dtype)(
        lambda *given: add_layer_norm(*given, 1e-5), lambda *given: add_layer_norm_reference(*given, 1e-5),
        [x, other, weight, bias], [0, 1],
    )  # fmt: skip


def test_layer_norm_in_many_tiles_per_program(monkeypatch):
    """As on a GPU with more rows than programs that sum the gradients of weights."""
    monkeypatch.setattr(layer_norm, "PROGRAMS", 3)
    x = torch.randn(69, 5).requires_grad_()
    weight, bias = torch.randn(5).requires_grad_(), torch.randn(5).requires_grad_()
    assert_same(
        lambda *given: layer_norm.add_layer_norm(given[0], None, *given[1:], 1e-5),
        lambda *given: layer_norm.add_layer_norm_reference(given[0], None, *given[1:], 1e-5),
        [x, weight, bias], [0],
    )  # fmt: skip


def test_mean_that_is_much_larger_than_the_deviation():
    x = (torch.randn(4, 320) + 1000).requires_grad_()
    weight, bias = torch.ones(320), torch.zeros(320)
    found, _ = add_layer_norm(x, None, weight, bias, 1e-5)
    wanted, _ = add_layer_norm_reference(x.double(), None, weight.double(), bias.double(), 1e-5)
    assert (found - wanted).abs().max() < 1e-3


def test_norm_is_of_the_type_that_autocast_computes_in():
    with torch.autocast("cpu", torch.bfloat16):
        normed, total = add_layer_norm(torch.randn(2, 8), None, torch.ones(8), torch.zeros(8), 1e-5)
        image, _ = group_norm(torch.randn(1, 8, 2, 2), torch.ones(8), torch.zeros(8), 2, 1e-5)
    assert normed.dtype == image.dtype == torch.bfloat16
    assert total.dtype == torch.float32


@DTYPES
@pytest.mark.parametrize("trained", [False, True])
def test_bias_and_residual(dtype, trained):
    x, other = (torch.randn(2, 70, 5, 3).to(dtype).requires_grad_() for _ in range(2))
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    bias = torch.randn(70).to(dtype).requires_grad_(trained)
    check(dtype)(add_bias, add_bias_reference, [x, other, bias], [0])
