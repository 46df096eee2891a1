"""Grouped LoRA linears: values and gradients, and the copies of their adapters."""

from __future__ import annotations

import pytest
import torch

from sdtune.training.kernels.lora_linear import LoraCopies, LoraGroup, launch_copies, lora_linear_reference
from tests.training.kernels.comparing import errors

SCALES = (2.0, 1.0, 0.5)


def layers(dtype, adapter_dtype, ranks, biases):
    """weights, biases, downs, ups of linears from 40 to 24, 32 and 48."""
    outs = (24, 32, 48)[: len(ranks)]
    weights = [(torch.randn(out, 40) / 6).to(dtype) for out in outs]
    bias = [torch.randn(out).to(dtype) if biases else None for out in outs]
    downs = [(torch.randn(r, 40) / 6).to(adapter_dtype).requires_grad_() if r else None for r in ranks]
    ups = [
        torch.randn(out, r).to(adapter_dtype).requires_grad_() if r else None
        for r, out in zip(ranks, outs, strict=True)
    ]
    return weights, bias, downs, ups


def outcome(x, parts, function):
    """Results, gradients of x and of all adapters; the adapters' gradients are left in .grad too."""
    ys = function(x)
    generator = torch.Generator().manual_seed(7)
    loss = sum((y * torch.randn(y.shape, generator=generator)).sum(dtype=torch.float64) for y in ys)
    adapters = [one for one in (*parts[2], *parts[3]) if one is not None]
    return [*ys, *torch.autograd.grad(loss, [x, *adapters])]


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("ranks", [(4,), (4, 4, 4), (4, 0, 9), (0, 0)])
@pytest.mark.parametrize("biases", [False, True])
def test_group(dtype, adapter_dtype, ranks, biases):
    parts = layers(dtype, adapter_dtype, ranks, biases)
    x = torch.randn(2, 7, 40).to(dtype).requires_grad_()
    kept = [weight.clone() for weight in parts[0]]
    group = LoraGroup(*parts, SCALES[: len(ranks)])
    LoraCopies()([group])
    found = outcome(x, parts, group)

    def reference(x):
        return [
            lora_linear_reference(x, *one, scale)
            for one, scale in zip(zip(*doubles, strict=True), SCALES, strict=False)
        ]

    doubles = [
        [None if one is None else one.detach().double().requires_grad_(one.requires_grad) for one in part]
        for part in parts
    ]
    wanted = outcome(x.detach().double().requires_grad_(), doubles, reference)
    assert max(errors(found, wanted)) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert all(torch.equal(weight, before) for weight, before in zip(parts[0], kept, strict=True))
    assert group.whole


def test_gradients_are_added_to_those_that_are_there():
    parts = layers(torch.float32, torch.float32, (4, 4, 4), False)
    group = LoraGroup(*parts, SCALES)
    LoraCopies()([group])
    x = torch.randn(3, 40)
    adapters = [*parts[2], *parts[3]]
    alone = torch.autograd.grad(sum(y.square().sum() for y in group(x)), adapters)
    flat = torch.ones(sum(one.numel() for one in adapters))
    for adapter, grad in zip(adapters, flat.split([one.numel() for one in adapters]), strict=True):
        adapter.grad = grad.view_as(adapter)
    for _ in range(2):
        sum(y.square().sum() for y in group(x)).backward()
    for adapter, once in zip(adapters, alone, strict=True):
        assert torch.allclose(adapter.grad, 1 + 2 * once, rtol=1e-4, atol=1e-4)
    # Where they were: the optimizer has them as one tensor.
    assert adapters[0].grad.data_ptr() == flat.data_ptr()


def test_adapters_that_were_moved_are_found():
    parts = layers(torch.float32, torch.float32, (4,), False)
    group, copies, x = LoraGroup(*parts, (1.0,)), LoraCopies(), torch.randn(3, 40)
    copies([group])
    before = group(x)[0]
    parts[2][0].data = torch.zeros(4, 40)
    copies([group])
    assert (group(x)[0] - x @ parts[0][0].T).abs().max() < 1e-5
    assert (before - x @ parts[0][0].T).abs().max() > 0.1


def test_copies_in_one_launch():
    """The kernel of the GPU, which finds both ends by their addresses."""
    sources = [torch.randn(4, 40), torch.randn(24, 4)]
    down, up = torch.zeros(8, 40), torch.zeros(60, 16)
    targets = [down[:4], up[12:36, 8:12]]
    table = [
        [one.data_ptr(), to.data_ptr(), one.numel(), one.shape[1], to.stride(0)]
        for one, to in zip(sources, targets, strict=True)
    ]
    launch_copies(torch.tensor(table), torch.tensor([0.5, 1.0]), 160, torch.float32, torch.float32)
    assert torch.equal(targets[0], sources[0] * 0.5)
    assert torch.equal(targets[1], sources[1])
    assert down[4:].abs().sum() == 0
    assert up.count_nonzero() == sources[1].count_nonzero()
