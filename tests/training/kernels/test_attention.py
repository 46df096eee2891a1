"""Attention to few keys: values and gradients, and what of it is left to torch."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.utils.checkpoint import checkpoint

from sdtune.training.kernels import attention as kernel
from sdtune.training.kernels.attention import FewKeysAttention, Tiles, attention, attention_reference, few_keys
from sdtune.training.kernels.processor import FusedAttnProcessor
from tests.training.kernels.comparing import assert_as_exact, double, errors, outcome

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def projections(dtype, heads, head_dim, tokens, keys, batch=2):
    """The query's product, and that of key and value as one."""
    width = heads * head_dim
    shapes = (batch, tokens, width), (batch, keys, 2 * width)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def parts(query, both, heads):
    """As views of them, [batch, heads, tokens, head_dim]."""
    given = (query, *both.chunk(2, dim=-1))
    return [one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in given]


def of_products(function, heads):
    return lambda query, both: function(*parts(query, both, heads)).transpose(1, 2).flatten(2)


def check(inputs, heads):
    assert few_keys(*parts(*inputs, heads))
    assert_as_exact(of_products(attention, heads), of_products(attention_reference, heads), inputs, [0])


@DTYPES
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_a_prompt(dtype, head_dim):
    check(projections(dtype, 2, head_dim, 63, 77), 2)


def test_many_queries():
    check(projections(torch.float16, 1, 40, 1000, 77, batch=1), 1)


@pytest.mark.parametrize(
    ("head_dim", "keys"), [(40, 100), (64, 128), (80, 90), (64, 1), (40, 16), (64, 64), (160, 128), (24, 77), (8, 3)]
)
def test_other_keys(head_dim, keys):
    check(projections(torch.bfloat16, 3, head_dim, 70, keys, batch=1), 3)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("of_each", [19, 4, 1])
def test_however_the_queries_are_parted(monkeypatch, apart, of_each):
    """One program for all 19 tiles, four with five parts, a program for each: more than are summed at once."""
    monkeypatch.setattr(kernel, "tiles", lambda *_: Tiles(16, 4, 16, 4, apart, 1))
    monkeypatch.setattr(kernel, "_tiles_of_each", lambda *_: of_each)
    check(projections(torch.float16, 1, 40, 301, 9, batch=1), 1)


def test_as_many_programs_as_keep_the_gpu_busy():
    def of_each(tokens, times):
        return kernel._tiles_of_each(-(-tokens // 64), times, 132)

    # 128 programs, the next number would need two rounds; 120 of 16 tiles in three; all tiles at once.
    assert [of_each(4096, 8), of_each(1024, 20), of_each(256, 8)] == [4, 3, 1]
    # One of 64 tiles for each of 160 would need two rounds of that length: 128 tiles' time, in place of 78 at best.
    rounds = -(-160 * -(-64 // of_each(4096, 160)) // 132)
    assert rounds * of_each(4096, 160) < 90


def test_only_where_it_was_measured(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: {"cuda:6": (9, 0), "cuda:7": (8, 9)}[str(device)]
    )
    assert [kernel._has_room(torch.device(name)) for name in ("cuda:6", "cuda:7")] == [True, False]


def test_large_scores():
    """Of queries that agree with one key alone, and far above those of the others."""
    query, both = projections(torch.float16, 1, 64, 40, 77)
    check([(50 * query.detach()).requires_grad_(), both], 1)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_trained_has_a_gradient(wanted):
    given = [
        one.detach().requires_grad_(w)
        for one, w in zip(parts(*projections(torch.float16, 2, 40, 9, 5), 2), wanted, strict=True)
    ]
    attention(*given).float().square().sum().backward()
    doubles = [double(one) for one in given]
    attention_reference(*doubles).square().sum().backward()
    for one, other in zip(given, doubles, strict=True):
        assert (one.grad is None) is (other.grad is None)
        if other.grad is not None:
            assert errors([one.grad], [other.grad])[0] < 5e-3


def test_nothing_is_copied():
    """The projections are read where they are, and what is returned is where the next product and theirs read it."""
    query, both = projections(torch.float16, 2, 40, 9, 5)
    views = parts(query, both, 2)
    assert all(kernel._rows(one) is one for one in views)
    result = attention(*views)
    assert result.transpose(1, 2).is_contiguous()
    dquery, dkey, dvalue = torch.autograd.grad(result, views, torch.randn_like(result))
    assert dquery.transpose(1, 2).is_contiguous()
    rows = [one.transpose(1, 2).flatten(2) for one in (dkey, dvalue)]
    assert [one.stride() for one in rows] == [(5 * 160, 160, 1)] * 2
    assert rows[1].data_ptr() - rows[0].data_ptr() == 80 * 2
    assert rows[0].untyped_storage().data_ptr() == dkey.untyped_storage().data_ptr()


@pytest.mark.parametrize("change", ["heads apart", "numbers apart", "rows of odd length"])
def test_other_layouts_are_copied(change):
    def laid_out(x):
        if change == "heads apart":
            return x.contiguous()
        if change == "numbers apart":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        return (
            torch.nn.functional.pad(x.transpose(1, 2).flatten(2), (0, 1))[..., :-1]
            .unflatten(2, (2, -1))
            .transpose(1, 2)
        )

    def other(*given):
        return laid_out(attention(*(laid_out(one) for one in given)))

    assert_as_exact(
        of_products(other, 2), of_products(attention_reference, 2), projections(torch.float16, 2, 40, 20, 7), [0]
    )


def test_the_same_every_time():
    inputs = projections(torch.bfloat16, 1, 40, 200, 77)
    first, second = (outcome(of_products(attention, 1), inputs, [0]) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "keys", "masked"),
    [(torch.float32, 40, 77, False), (torch.float16, 40, 300, False), (torch.float16, 160, 256, False),
     (torch.float16, 44, 77, False), (torch.float16, 40, 77, True)],
    ids=["float32", "keys", "numbers", "head", "mask"],
)  # fmt: skip
def test_the_rest_is_left_to_torch(monkeypatch, dtype, head_dim, keys, masked):
    monkeypatch.setattr(FewKeysAttention, "apply", lambda *_: pytest.fail("the kernel was taken"))
    views = parts(*projections(dtype, 2, head_dim, 9, keys), 2)
    mask = torch.zeros(2, 1, 9, keys, dtype=dtype) if masked else None
    assert torch.equal(attention(*views, mask), attention_reference(*views, mask))


def layer(processor, dtype):
    torch.manual_seed(3)
    attn = Attention(query_dim=80, cross_attention_dim=48, heads=2, dim_head=40, processor=processor).to(dtype)
    if isinstance(processor, FusedAttnProcessor):
        attn.processor.bind(attn)
    return attn


@pytest.mark.parametrize("way", ["plain", "autocast", "checkpoint", "no_grad", "inference"])
def test_in_diffusers_attention(monkeypatch, way):
    """Once in the kernel, whatever is around it; autocast computes float32 weights' products in bfloat16."""
    calls = []
    apply = FewKeysAttention.apply
    monkeypatch.setattr(FewKeysAttention, "apply", lambda *given: calls.append(given[0].dtype) or apply(*given))
    fused = layer(FusedAttnProcessor(), torch.float32 if way == "autocast" else torch.bfloat16)
    plain = layer(AttnProcessor2_0(), torch.float64)
    plain.load_state_dict(fused.state_dict())
    x, text = torch.randn(2, 30, 80), torch.randn(2, 7, 48)
    given = [one.to(fused.to_q.weight.dtype).requires_grad_() for one in (x, text)]
    wanted = [double(one) for one in given]
    target = plain(*wanted)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"), torch.inference_mode(way == "inference"):
        if way == "no_grad":
            with torch.no_grad():
                result = fused(*given)
        else:
            result = checkpoint(fused, *given, use_reentrant=False) if way == "checkpoint" else fused(*given)
    assert errors([result], [target])[0] < 2e-2
    if way in ("plain", "autocast", "checkpoint"):
        grads = [torch.autograd.grad(one.sum(), [*inputs]) for one, inputs in ((result, given), (target, wanted))]
        assert max(errors(*grads)) < 3e-2
    assert calls == [torch.bfloat16] * (2 if way == "checkpoint" else 1)
