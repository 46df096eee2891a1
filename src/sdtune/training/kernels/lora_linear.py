"""LoRA linears that read the same rows: to_q, to_k and to_v of an attention as one.

y = x W^T + b + s (x A^T) B^T, for all of them with three matrix products: one of the frozen weights below each other,
one thin product with all A, and one that adds the product with all B (a block for each) where it writes. PEFT casts x
to float32 and back, and makes a product, a scaling and an addition for each layer. cuBLAS has these products; a Triton
kernel of ours would have to beat it at the large one to gain the one pass over y that the addition costs.

The adapters' weights are copied together, the scale into A's copy, by one kernel for the whole model at the start of
its forward pass. Their gradients are added to what ``.grad`` holds together too, at the end of the backward pass:
hundreds of tensors of a few thousand numbers would each cost a launch.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from sdtune.training.kernels.launch import compute_dtype, launch, usable

PADDED = 8
"""Each rank is padded to a multiple of it, with zeros: rows of 16 bytes."""
ELEMENTS = 1024


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor | None,
    up: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """One layer, as PEFT does it; down: A, up: B; neither of a layer without an adapter."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if down is None or up is None else y + (x @ down.to(x.dtype).T) @ up.to(x.dtype).T * scale


class LoraGroup:
    """Frozen linears of one width of input, and their adapters.

    weights: [out, in] each, made views of one tensor; downs: [rank, in], ups: [out, rank], None of a layer without;
    scales: alpha / rank.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        downs: Sequence[torch.Tensor | None],
        ups: Sequence[torch.Tensor | None],
        scales: Sequence[float],
    ) -> None:
        self.weights, self.downs, self.ups, self.scales = list(weights), list(downs), list(ups), list(scales)
        self.outs = [len(weight) for weight in weights]
        self.ranks = [0 if down is None else len(down) for down in downs]
        self.places, width = [], 0
        for rank in self.ranks:
            self.places.append(width)
            width += -(-rank // PADDED) * PADDED
        self.width = width
        self.weight = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, self.weight.split(self.outs), strict=True):
            weight.data = part
        self.bias = None
        if any(bias is not None for bias in biases):
            zeros = (self.weight.new_zeros(out) for out in self.outs)
            self.bias = torch.cat([none if b is None else b.detach() for b, none in zip(biases, zeros, strict=True)])
        self.down = self.weight.new_zeros(width, self.weight.shape[1])
        self.up = self.weight.new_zeros(len(self.weight), width)

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapters."""
        return next((down.dtype for down in self.downs if down is not None), self.weight.dtype)

    @property
    def whole(self) -> bool:
        """The layers' weights are still the ones that were put together: a move of the model parts them."""
        at = self.weight.data_ptr()
        for weight, out in zip(self.weights, self.outs, strict=True):
            if weight.data_ptr() != at or weight.dtype != self.weight.dtype:
                return False
            at += out * self.weight.shape[1] * self.weight.element_size()
        return True

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """Each adapter's weight, the part of ``down`` or ``up`` that it goes into, and what it is multiplied with."""
        found, first = [], 0
        layers = zip(self.downs, self.ups, self.scales, self.ranks, self.places, self.outs, strict=True)
        for down, up, scale, rank, place, out in layers:
            if down is not None and up is not None:
                found.append((down, self.down[place : place + rank], scale))
                found.append((up, self.up[first : first + out, place : place + rank], 1.0))
            first += out
        return found

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., in] to [..., out] of each layer; those of several layers are views of one tensor."""
        adapters = [one for pair in zip(self.downs, self.ups, strict=True) for one in pair]
        results: tuple[torch.Tensor, ...] = LoraLinear.apply(x, self, *adapters)
        return results

    def takes(self, x: torch.Tensor) -> bool:
        """The frozen weights are of the type that is computed in."""
        return compute_dtype(x) == self.weight.dtype and x.device == self.weight.device


class LoraLinear(torch.autograd.Function):
    """Keeps x and x A^T. Adapters are arguments so that autograd knows them; their values are the group's copies."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: LoraGroup, *adapters: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1]).to(group.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            low = rows @ group.down.T if group.width else None
            y = rows @ group.weight.T if group.bias is None else torch.addmm(group.bias, rows, group.weight.T)
            if low is not None:
                y.addmm_(low, group.up.T)
        ctx.save_for_backward(rows, low)
        ctx.group, ctx.shape, ctx.dtype = group, x.shape, x.dtype
        parts = y.split(group.outs, dim=1) if len(group.outs) > 1 else (y,)
        return tuple(part.unflatten(0, x.shape[:-1]) for part in parts)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[Any, ...]:
        group: LoraGroup = ctx.group
        rows, low = ctx.saved_tensors
        dys = tuple(dy.reshape(-1, dy.shape[-1]).to(group.weight.dtype) for dy in dys)
        weights, ups = group.weight.split(group.outs), group.up.split(group.outs)
        dlow = _summed(dys, ups) if group.width else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _summed(dys, weights)
            if dlow is not None:
                dx.addmm_(dlow, group.down)
            dx = dx.to(ctx.dtype).view(ctx.shape)
        grads: list[torch.Tensor | None] = []
        ddown = _product(dlow.T, rows, group.dtype) if dlow is not None else None
        adapters = zip(group.downs, group.ups, group.ranks, group.places, group.scales, dys, strict=True)
        for down, up, rank, place, scale, dy in adapters:
            if down is None or up is None or ddown is None:
                grads += [None, None]
                continue
            found = ddown[place : place + rank]
            grads += [_added(down, found if scale == 1 else found * scale)]
            grads += [_added(up, _product(dy.T, low[:, place : place + rank], group.dtype))]
        return dx, None, *grads


class Pending:
    """Gradients that are to be added to ``.grad`` at the end of the backward pass."""

    held: ClassVar[list[torch.Tensor]] = []
    found: ClassVar[list[torch.Tensor]] = []

    @classmethod
    def add(cls, held: torch.Tensor, found: torch.Tensor) -> None:
        if not cls.held:
            torch.autograd.Variable._execution_engine.queue_callback(cls.finish)
        cls.held.append(held)
        cls.found.append(found)

    @classmethod
    def finish(cls) -> None:
        with torch.no_grad():
            torch._foreach_add_(cls.held, cls.found)
        cls.clear()

    @classmethod
    def clear(cls) -> None:
        """Forget what a backward pass that failed left."""
        cls.held.clear()
        cls.found.clear()


def _added(parameter: torch.Tensor, found: torch.Tensor) -> torch.Tensor | None:
    """None where the gradient will be added to the parameter's; autograd is given it where there is none yet."""
    if not parameter.requires_grad:
        return None
    if parameter.grad is None:
        return found
    Pending.add(parameter.grad, found)
    return None


def _summed(dys: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of dy W over the layers."""
    total = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        total.addmm_(dy, weight)
    return total


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b, summed in float32 and rounded once to ``dtype``."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else (a.float() @ b.float()).to(dtype)


class LoraCopies:
    """All adapters' weights into their groups' tensors, in one launch."""

    def __init__(self) -> None:
        # Of all places there ever were: a CUDA graph goes on with the tables it was recorded with.
        self.tables: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, groups: Sequence[LoraGroup]) -> None:
        """Copy. Adapters that were moved are found again, which a CUDA graph cannot hold: call it once before."""
        Pending.clear()
        copies = [one for group in groups for one in group.copies()]
        if not copies:
            return
        kinds = {(source.dtype, target.dtype) for source, target, _ in copies}
        if len(kinds) > 1 or not usable(copies[0][1]):
            for source, target, scale in copies:
                target.copy_(source.detach() * scale)
            return
        places = tuple((source.data_ptr(), target.data_ptr(), scale) for source, target, scale in copies)
        if places not in self.tables:
            table = [
                [source.data_ptr(), target.data_ptr(), source.numel(), source.shape[1], target.stride(0)]
                for source, target, _ in copies
            ]
            device = copies[0][1].device
            scales = torch.tensor([scale for *_, scale in copies], dtype=torch.float32)
            self.tables[places] = torch.tensor(table, dtype=torch.int64).to(device), scales.to(device)
        launch_copies(*self.tables[places], max(source.numel() for source, *_ in copies), *kinds.pop())


def launch_copies(
    table: torch.Tensor, scales: torch.Tensor, largest: int, source: torch.dtype, target: torch.dtype
) -> None:
    """table: int64 [copies, 5], of each copy the addresses of both ends, elements, columns, the target's row stride."""
    kinds = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    grid = (len(table), triton.cdiv(largest, ELEMENTS))
    launch(_copy, grid)(table, scales, SOURCE=kinds[source], TARGET=kinds[target], ELEMENTS=ELEMENTS, num_warps=4)


@triton.jit
def _copy(table, scales, SOURCE: tl.constexpr, TARGET: tl.constexpr, ELEMENTS: tl.constexpr):
    row = table + tl.program_id(0) * 5
    source = tl.load(row).to(tl.pointer_type(SOURCE))
    target = tl.load(row + 1).to(tl.pointer_type(TARGET))
    count, columns, apart = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    at = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    value = tl.load(source + at, mask=at < count, other=0.0).to(tl.float32) * tl.load(scales + tl.program_id(0))
    tl.store(target + at // columns * apart + at % columns, value.to(TARGET), mask=at < count)
