"""The update of a step in one kernel, against the sum in float32, torch's clipping, its fused AdamW and the cast.

A part of ``kernel_speed.py``. Both sides are the trainer's own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from sdtune.training.components.flat_adamw import FlatAdamW
from sdtune.training.components.weights import Weights
from sdtune.training.kernels.adamw import adamw, adamw_reference

STEPS, REPLAYS = 3, 20
SLICE = 2**16
"""Entries at both ends that are compared: beyond 2**31 bytes lie only the last."""
TILES = [(512, 4), (1024, 8), (2048, 16), (1024, 4), (2048, 8)]
"""Numbers and warps of a program."""
SLEEP = 200_000_000
"""Cycles, a tenth of a second: until then all that is timed is in the queue, as it is behind a step's graph."""
MAX_NORM, LR, BETAS, EPS, WEIGHT_DECAY = 1.0, 1e-3, (0.9, 0.999), 1e-8, 1e-2


def trainee(
    count: int, device: str, *, at_once: bool
) -> tuple[torch.nn.Parameter, Weights, torch.optim.Optimizer, Callable[[], None]]:
    """``count`` weights that the model has in bfloat16, as it has them; and what follows on a backward pass."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(count, device=device, generator=generator).mul_(0.02))
    weights = Weights([{"params": [weight], "lr": LR}], torch.bfloat16)
    options: Any = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    if at_once:
        ours = FlatAdamW(weights, MAX_NORM, **options)
        return weight, weights, ours, ours.step
    theirs = torch.optim.AdamW(weights.groups(flat=True), fused=device == "cuda", **options)

    def one_by_one() -> None:
        weights.collect()
        torch.nn.utils.clip_grad_norm_(weights.masters, MAX_NORM)
        theirs.step()
        weights.cast()

    return weight, weights, theirs, one_by_one


def gradient(count: int, device: str, step: int) -> torch.Tensor:
    """Of a norm that is clipped at the first step and at no other."""
    generator = torch.Generator(device).manual_seed(step)
    drawn = torch.randn(count, device=device, dtype=torch.bfloat16, generator=generator)
    return drawn.mul_((3.0 if step == 1 else 0.3) / count**0.5)


def ends(flat: torch.Tensor) -> torch.Tensor:
    """A copy of both."""
    return torch.cat([flat[:SLICE], flat[-SLICE:]]).detach()


def reference(count: int, device: str, start: torch.Tensor) -> torch.Tensor:
    """What becomes of the ends of ``start`` in STEPS steps, in float64."""
    weight = start.double()
    mean, square, model = (torch.zeros_like(weight) for _ in range(3))
    for step in range(1, STEPS + 1):
        whole = gradient(count, device, step)
        norm = sum(part.double().square().sum() for part in whole.split(2**26)) ** 0.5
        adamw_reference(
            weight, mean, square, ends(whole).double(), model, norm, MAX_NORM, step, LR, *BETAS, EPS, WEIGHT_DECAY
        )
    return weight


def outcome(count: int, device: str, *, at_once: bool, time_it: Callable[..., dict[str, float]]) -> dict[str, Any]:
    """The ends of the weights before and after STEPS steps; whether casts and gradients are what they must be; time."""
    parameter, weights, optimizer, update = trainee(count, device, at_once=at_once)
    [master], [model] = weights.masters, weights.computing
    assert parameter.grad is not None
    start = ends(master[:count])
    for step in range(1, STEPS + 1):
        parameter.grad += gradient(count, device, step)
        update()
    # Part by part, so that nothing as large as the weights is made for it.
    parts = zip(master.detach().split(2**26), model.split(2**26), parameter.grad.split(2**26), strict=False)
    right = all(torch.equal(one.bfloat16(), cast) and not left.any() for one, cast, left in parts)

    found = {"start": start, "end": ends(master[:count]), "right": right, **time_it(update)}
    if at_once:
        found["tiles"] = tiles(optimizer.state[master], weights, time_it)
    return found


def tiles(
    state: dict[str, torch.Tensor], weights: Weights, time_it: Callable[..., dict[str, float]]
) -> dict[str, float]:
    """Microseconds of the kernel alone."""
    [master], [computing], [grad] = weights.masters, weights.computing, weights.gradients
    norm = torch.zeros((), device=master.device)

    def once(elements: int, warps: int) -> None:
        adamw(
            master, state["exp_avg"], state["exp_avg_sq"], grad, computing, norm, MAX_NORM, STEPS, LR, *BETAS, EPS,
            WEIGHT_DECAY, elements, warps,
        )  # fmt: skip

    return {f"{tile[0]} in {tile[1]} warps": time_it(lambda tile=tile: once(*tile))["device"] for tile in TILES}


def timed(once: Callable[[], None]) -> dict[str, float]:
    """Microseconds that the GPU takes for it, and the host to ask for it; GiB at its peak."""
    once()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP)
    begin.record()
    started = time.perf_counter()
    for _ in range(REPLAYS):
        once()
    host = time.perf_counter() - started
    end.record()
    end.synchronize()
    return {
        "device": round(begin.elapsed_time(end) * 1e3 / REPLAYS, 1),
        "host": round(host * 1e6 / REPLAYS, 1),
        "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def measure_adamw(
    count: int, bytes_per_second: float, device: str = "cuda", time_it: Callable[..., dict[str, float]] = timed
) -> dict[str, Any]:
    """Errors are parts of the largest change, of the weights' ends against float64."""
    found: dict[str, Any] = {"bound": round(30 * count / bytes_per_second * 1e6, 1)}
    for name, at_once in (("plain", False), ("chosen", True)):
        gc.collect()
        ran = outcome(count, device, at_once=at_once, time_it=time_it)
        start, end = ran.pop("start"), ran.pop("end")
        wanted = reference(count, device, start)
        change = (wanted - start).abs().max()
        found[f"{name}_errors"] = [((end - wanted).abs().max() / change).item()]
        found[f"{name}_right"] = ran.pop("right")
        found[name] = ran.pop("device")
        found |= {f"{name}_{what}": value for what, value in ran.items()}
    found["chosen_right"] &= found["chosen_errors"][0] <= 1.5 * max(found["plain_errors"][0], 1e-5)
    return found
