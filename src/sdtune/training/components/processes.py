"""Several processes, one for each GPU, that train as one: what each takes of a batch, how gradients are exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

AT_ONCE = 2**26
"""Entries of gradients exchanged together: 256 MB of float32, few messages and little memory beside a model's."""


@dataclass(frozen=True)
class Share:
    """Part ``number`` of so many equal parts."""

    number: int
    of: int

    def rows(self, drawn: torch.Tensor) -> torch.Tensor:
        """This part of what was drawn for all: of its first dimension."""
        size = len(drawn) // self.of
        return drawn[self.number * size : (self.number + 1) * size]


ALL = Share(0, 1)


def exchange_gradients(parameters: Sequence[torch.nn.Parameter], accelerator: Any) -> None:
    """Every gradient becomes its mean over all processes.

    By hand and not by a wrapper around the model (DistributedDataParallel): what is trained is spread over several
    models, and their modules keep their names and attributes. The models are small beside a step, so that little is
    lost by not overlapping with the backward pass.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for some in _together(gradients):
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in some]), reduction="mean")
        for gradient, mean in zip(some, flat.split([gradient.numel() for gradient in some]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _together(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The gradients in lists of at most AT_ONCE entries, or one gradient."""
    some: list[torch.Tensor] = []
    for gradient in gradients:
        if some and sum(one.numel() for one in some) + gradient.numel() > AT_ONCE:
            yield some
            some = []
        some.append(gradient)
    if some:
        yield some
