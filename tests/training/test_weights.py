"""Masters in float32, and a model that computes with their casts."""

from __future__ import annotations

import pytest
import torch

from sdtune.training.components.weights import ALIGNMENT, Weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer() -> torch.nn.Conv2d:
    torch.manual_seed(0)
    return torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def weights_of(model: torch.nn.Module, dtype: torch.dtype) -> Weights:
    return Weights([{"params": list(model.parameters()), "lr": 0.1}], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_holds_casts_of_the_masters(dtype: torch.dtype) -> None:
    model, before = layer(), layer()
    assert model.bias is not None
    assert before.bias is not None
    weights = weights_of(model, dtype)
    assert model.weight.dtype is dtype
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.weight, before.weight.to(dtype))
    with torch.no_grad():
        weights.masters[0].add_(1.0)
    weights.cast()
    assert torch.equal(model.weight, (before.weight + 1.0).to(dtype))
    assert torch.equal(model.bias, (before.bias + 1.0).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_add_up_in_the_masters_until_the_cast(dtype: torch.dtype) -> None:
    model = layer()
    weights = weights_of(model, dtype)
    pictures = torch.randn(2, 4, 5, 5, dtype=dtype)
    expected = layer()
    for _ in range(3):
        model(pictures).float().square().mean().backward()
        weights.collect()
        expected(pictures.float()).square().mean().backward()
    flat = weights.gradients[0]
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for one, wanted in zip(weights.groups(flat=False)[0]["params"], expected.parameters(), strict=True):
        assert wanted.grad is not None
        torch.testing.assert_close(one.grad, wanted.grad, rtol=tolerance, atol=tolerance)
    assert flat.norm() > 0
    weights.cast()
    assert flat.norm() == 0
    assert model.weight.grad is not None
    assert model.weight.grad.norm() == 0


def test_updates_smaller_than_half_precision_resolves_survive() -> None:
    """A hundred steps, each a 64th of the smallest that bfloat16 can take from 1, are seen in the end."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    weights = weights_of(model, torch.bfloat16)
    optimizer = torch.optim.SGD(weights.masters, lr=2.0**-14)
    for _ in range(100):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        weights.collect()
        optimizer.step()
        weights.cast()
    assert weights.masters[0][0].item() == 1 - 100 * 2.0**-14
    assert model.weight.item() == pytest.approx(1 - 100 * 2.0**-14, abs=2.0**-8)
    assert model.weight.item() < 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_full_precision_the_model_holds_the_masters(dtype: torch.dtype) -> None:
    model, before = layer(), layer()
    assert model.bias is not None
    weights = weights_of(model, dtype)
    with weights.full_precision():
        assert torch.equal(model.weight, before.weight)
        with torch.no_grad():
            model.bias.zero_()
    assert model.weight.dtype is dtype
    assert model.bias.abs().max() == 0
    # Training goes on as if nothing had been.
    model(torch.ones(1, 4, 3, 3, dtype=dtype)).sum().backward()
    weights.collect()
    assert weights.gradients[0].norm() > 0


def test_weights_begin_where_matrix_products_want_them() -> None:
    model = layer()
    weights = weights_of(model, torch.bfloat16)
    assert model.bias is not None
    assert (model.bias.data_ptr() - model.weight.data_ptr()) % (ALIGNMENT * model.weight.element_size()) == 0
    assert weights.masters[0].numel() % ALIGNMENT == 0


@pytest.mark.parametrize("flat", [True, False])
def test_an_optimizer_moves_the_model(flat: bool) -> None:
    model, expected = layer(), layer()
    weights = weights_of(model, torch.float32)
    ours = torch.optim.AdamW(weights.groups(flat=flat), lr=0.1)
    theirs = torch.optim.AdamW(expected.parameters(), lr=0.1)
    pictures = torch.randn(2, 4, 5, 5)
    for _ in range(3):
        for one in (model, expected):
            one(pictures).square().mean().backward()
        weights.collect()
        ours.step()
        weights.cast()
        theirs.step()
        theirs.zero_grad()
    torch.testing.assert_close(model.weight, expected.weight)
    torch.testing.assert_close(model.bias, expected.bias)


def test_they_are_kept_and_taken_up_again() -> None:
    model, other = layer(), torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights_of(other, torch.bfloat16).load_state_dict(weights_of(model, torch.bfloat16).state_dict())
    assert torch.equal(other.weight, model.weight)
