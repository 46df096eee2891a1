"""AdamW over one long tensor: clipping, moments, weight decay, the model's copy and the next gradient in one pass.

torch's fused AdamW wants gradients in float32, clipped where they lie. With the sum that they are added to, its
clipping, the cast to half precision and two tensors of zeros, 62 bytes of each weight go through memory in a step;
here 28, and 2 for the norm.
"""

import torch
import triton
import triton.language as tl

from sdtune.training.kernels.launch import usable

ELEMENTS, WARPS = 1024, 8
"""Of a program: four numbers of each tensor for a thread, so that neighbours in a warp read what lies side by side. Of
eight, as half precision would like them, those in float32 lie 32 bytes apart."""


def adamw_reference(
    master: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, gradient: torch.Tensor,
    computing: torch.Tensor, norm: torch.Tensor, max_norm: float,
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """As torch's clip_grad_norm_ and AdamW do it."""
    grad = gradient.to(master.dtype) * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    master.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    master.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    computing.copy_(master)
    gradient.zero_()


def adamw(
    master: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, gradient: torch.Tensor,
    computing: torch.Tensor, norm: torch.Tensor, max_norm: float,
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    elements: int = ELEMENTS, warps: int = WARPS,
) -> None:  # fmt: skip
    """One step, in place; ``gradient`` is zero afterwards, and ``computing`` holds ``master`` in its own type.

    master, exp_avg, exp_avg_sq: float32 [count]. gradient, computing: [count], in half precision or float32.
    norm: of all gradients that are clipped together, a float32 scalar on the device, which the host does not read.
    step: which one this is, from 1. elements, warps: of a program.
    Source: Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """
    if not usable(master):
        adamw_reference(
            master, exp_avg, exp_avg_sq, gradient, computing, norm, max_norm, step, lr, beta1, beta2, eps, weight_decay
        )
        return
    count = master.numel()
    # Differences from 1 are made here, in double precision: 1 - 0.9999 has three digits in float32.
    _update[(triton.cdiv(count, elements),)](
        master, exp_avg, exp_avg_sq, gradient, computing, norm, count, float(max_norm),
        lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, 1.0 - beta1, float(beta2), 1.0 - beta2, float(eps),
        float(lr * weight_decay), ELEMENTS=elements, num_warps=warps,
    )  # fmt: skip


# count is a multiple of 64 and may be told so: with masks of any length, numbers would be read one by one.
@triton.jit
def _update(
    master, exp_avg, exp_avg_sq, gradient, computing, norm, count, max_norm,
    rate, unbias, new1, old2, new2, eps, decay, ELEMENTS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < count
    clip = tl.div_rn(max_norm, tl.load(norm) + 1e-6)
    # Not tl.minimum, which makes a number of a norm that is none.
    clip = tl.where(clip > 1.0, 1.0, clip)
    grad = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * clip
    weight = tl.load(master + at, mask=inside, other=0.0)
    mean = tl.load(exp_avg + at, mask=inside, other=0.0)
    square = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    mean += new1 * (grad - mean)
    square = old2 * square + new2 * grad * grad
    # Added up before they are taken from the weight, which is so rounded once.
    weight -= decay * weight + rate * tl.div_rn(mean, unbias * tl.sqrt_rn(square) + eps)
    tl.store(master + at, weight, mask=inside)
    tl.store(exp_avg + at, mean, mask=inside)
    tl.store(exp_avg_sq + at, square, mask=inside)
    tl.store(computing + at, weight.to(computing.dtype.element_ty), mask=inside)
    tl.store(gradient + at, tl.zeros([ELEMENTS], gradient.dtype.element_ty), mask=inside)
