"""Attention by the backend that was measured to be the quickest for a head's size.

torch's own choice goes by what each backend supports, not by its speed. None of the backends has a plain reference
here: torch's mathematics is one of them (``SDPBackend.MATH``).
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


class Choice(NamedTuple):
    """A backend, and the size that heads are padded to with zeros: they change neither products nor sums."""

    backend: SDPBackend
    padded: int


CANDIDATES = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
MANY_TOKENS = 512
"""Self-attention has more keys than that at the resolutions that cost time, cross-attention fewer: 77."""

MEASURED: Mapping[tuple[int, bool], Choice] = {}
"""By size of a head and whether there are many keys: the quickest forward and backward in half precision on an H100, as
``benchmarks/kernels.py`` prints it. What is not in it is left to torch."""


def attention_backend(head_dim: int, tokens: int, dtype: torch.dtype) -> Choice | None:
    """What to compute attention of so many keys with; None to leave it to torch, as always but in half precision."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return MEASURED.get((head_dim, tokens > MANY_TOKENS))


def padded_sizes(head_dim: int) -> list[int]:
    """Sizes worth trying: its own, and the next that tensor cores fill whole: 40 to 48 and 64."""
    return sorted({head_dim, -(-head_dim // 16) * 16, -(-head_dim // 64) * 64} if head_dim < 64 else {head_dim})


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    choice: Choice | None = None,
) -> torch.Tensor:
    """[batch, heads, tokens, head_dim] each, to the same; choice: None for the measured one."""
    head_dim = query.shape[-1]
    if choice is None and query.is_cuda and mask is None:
        choice = attention_backend(head_dim, key.shape[2], query.dtype)
    if choice is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if choice.padded > head_dim:
        more = (0, choice.padded - head_dim)
        query, key, value = (functional.pad(one, more) for one in (query, key, value))
    with _only(choice.backend):
        result = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=head_dim**-0.5)
    return result[..., :head_dim]


def _only(backend: SDPBackend) -> AbstractContextManager[None]:
    """A backend that cannot compute it must not end the run: torch's mathematics can always."""
    if backend is SDPBackend.MATH:
        return nullcontext()
    context: AbstractContextManager[None] = sdpa_kernel([backend, SDPBackend.MATH], set_priority=True)
    return context
