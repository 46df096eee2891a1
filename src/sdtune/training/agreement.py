"""What several processes do after the same step: write a checkpoint, and stop.

A signal reaches them at different moments, and their clocks are different ones; whoever acted on his own would leave
the others waiting in an exchange of gradients for ever. So all of them ask each other after the same steps, about once
a second, and the first says after which step they ask next.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SECONDS_BETWEEN = 1.0
MOST_STEPS = 1000
"""Between two times of asking, however fast they are."""


@dataclass(frozen=True)
class Agreed:
    """What all do now."""

    save: bool
    stop: bool


class Agreement:
    """processes: how many train together; exchange: of a vector of whole numbers the greatest of all processes."""

    def __init__(
        self,
        first: bool,
        processes: int,
        device: torch.device,
        exchange: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._first, self._processes, self._device = first, processes, device
        self._exchange = exchange or _greatest
        self._next = 0
        self._asked_at, self._asked_after = time.monotonic(), 0

    def after(self, step: int, *, save: bool, stop: bool, ask: bool = False) -> Agreed | None:
        """What to do after ``step``, where ``save`` and ``stop`` is what this process wants; None: train on.

        save: the first process alone decides. ask: all know that this is a step to ask after.
        """
        if self._processes == 1:
            return Agreed(save, stop) if save or stop else None
        if step < self._next and not ask:
            return None
        following = step + self._steps_in_a_second(step) if self._first else 0
        wanted = torch.tensor([save and self._first, stop, following], dtype=torch.int64, device=self._device)
        any_saves, any_stops, self._next = self._exchange(wanted).tolist()
        return Agreed(bool(any_saves), bool(any_stops)) if any_saves or any_stops else None

    def _steps_in_a_second(self, step: int) -> int:
        now = time.monotonic()
        rate = (step - self._asked_after) / max(now - self._asked_at, 1e-3)
        self._asked_at, self._asked_after = now, step
        return min(max(1, round(rate * SECONDS_BETWEEN)), MOST_STEPS)


def _greatest(wanted: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
    return wanted


def of_all(tensor: torch.Tensor, processes: int, device: torch.device) -> list[torch.Tensor]:
    """This tensor of every process, in their order, on the CPU; all call it, with the same shape."""
    if processes == 1:
        return [tensor.cpu()]
    mine = tensor.to(device)
    every = [torch.empty_like(mine) for _ in range(processes)]
    torch.distributed.all_gather(every, mine)
    return [one.cpu() for one in every]
