"""What is trained, as the optimizer sees it and as the model computes with it.

Updates are far smaller than half precision resolves, so every trained weight is a float32 "master" (Micikevicius et al.
2018, arXiv:1710.03740, section 3.1). Where the model computes in half precision its own parameters are casts of the
masters, renewed after each step. All of a group lie one behind the other in one flat tensor: casting, clipping,
exchanging and updating them are a few kernels, however many weights there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Group = dict[str, Any]
"""Parameters that share a learning rate, as torch's optimizers take them: ``params`` and ``lr``."""

ALIGNMENT = 64
"""Entries: every weight begins on a multiple of 128 bytes, which matrix products want of theirs."""


@dataclass(frozen=True)
class _Flat:
    """One group. parameters: the model's. offsets: where each begins in the flat tensors.

    master: float32. computing: what the model computes with: the master itself, or its cast to half precision.
    computing_grad: what backward passes add to: the master's gradient, or one in half precision.
    """

    parameters: Sequence[torch.nn.Parameter]
    offsets: Sequence[int]
    master: torch.nn.Parameter
    computing: torch.Tensor
    computing_grad: torch.Tensor
    is_cast: bool
    lr: float

    @property
    def gradient(self) -> torch.Tensor:
        """The master's; where that has none, the model's own."""
        return self.computing_grad if self.master.grad is None else self.master.grad

    def view(self, flat: torch.Tensor, number: int) -> torch.Tensor:
        """The part of ``flat`` that belongs to a parameter, in its shape and memory layout."""
        like = self.parameters[number]
        return flat.as_strided(like.size(), like.stride(), self.offsets[number])

    def hold(self, flat: torch.Tensor, grad: torch.Tensor | None) -> None:
        """Make the model's parameters views of ``flat``, and their gradients of ``grad``."""
        for number, parameter in enumerate(self.parameters):
            parameter.grad = None
            parameter.data = self.view(flat, number)
            parameter.grad = None if grad is None else self.view(grad, number)


class Weights:
    """The trained weights of a run.

    After a backward pass ``collect()`` brings the gradients to the masters; after an optimizer's step ``cast()`` brings
    the masters to the model. An optimizer that does both by itself wants neither, nor the masters' gradients: it calls
    ``stop_accumulating()``.
    """

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype) -> None:
        """Take over the parameters of ``groups``, which are float32; the model computes in ``dtype`` from now on."""
        self._groups = [_flattened(list(group["params"]), group["lr"], dtype) for group in groups]
        self.dtype = dtype

    @property
    def masters(self) -> list[torch.nn.Parameter]:
        """One flat float32 tensor per group, each with its gradient."""
        return [group.master for group in self._groups]

    @property
    def computing(self) -> list[torch.Tensor]:
        """What the model computes with, flat as the masters: these themselves, or their casts."""
        return [group.computing for group in self._groups]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """Of the masters, float32; after ``stop_accumulating()`` the model's own, in the type that it computes in."""
        return [group.gradient for group in self._groups]

    def stop_accumulating(self) -> None:
        """Masters that the model has casts of keep no gradients, 4 bytes of each weight: those of the last backward
        pass are all that there are."""
        for group in self._groups:
            if group.is_cast:
                group.master.grad = None

    def groups(self, *, flat: bool) -> list[Group]:
        """The masters for an optimizer: each group as one tensor, or weight by weight in their own shapes, where
        gradients in half precision are copied."""
        return [
            {"params": [group.master] if flat else list(_one_by_one(group)), "lr": group.lr} for group in self._groups
        ]

    def collect(self) -> None:
        """Add the gradients of a backward pass to the masters', and be ready for the next pass."""
        for group in self._groups:
            if group.is_cast and group.master.grad is not None:
                group.master.grad.add_(group.computing_grad)
                group.computing_grad.zero_()

    def cast(self) -> None:
        """Let the model compute with the masters as they are now, and forget their gradients."""
        for group in self._groups:
            if group.is_cast:
                group.computing.copy_(group.master.detach())
            group.gradient.zero_()

    def forget(self) -> None:
        """Zero all gradients."""
        for group in self._groups:
            group.gradient.zero_()
            group.computing_grad.zero_()

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """The model holds the masters themselves inside the block: to save them, or to look at them."""
        try:
            for group in self._groups:
                group.hold(group.master.data, None)
            yield
        finally:
            for group in self._groups:
                group.hold(group.computing, group.computing_grad)
            self.cast()

    def state_dict(self) -> dict[str, Any]:
        """The masters."""
        return {"masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for master, kept in zip(self.masters, state["masters"], strict=True):
            master.copy_(kept)
        self.cast()


def _flattened(parameters: list[torch.nn.Parameter], lr: float, dtype: torch.dtype) -> _Flat:
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(end)
        end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    device = parameters[0].device
    master = torch.nn.Parameter(torch.zeros(end, device=device))
    master.grad = torch.zeros(end, device=device)
    half = dtype is not torch.float32
    computing = torch.zeros(end, device=device, dtype=dtype) if half else master.data
    grad = torch.zeros_like(computing) if half else master.grad
    group = _Flat(parameters, offsets, master, computing, grad, half, lr)
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            group.view(master.data, number).copy_(parameter)
            group.view(computing, number).copy_(parameter)
            # At once, so that no more than one weight is there twice.
            parameter.data = group.view(computing, number)
    group.hold(computing, grad)
    return group


def _one_by_one(group: _Flat) -> Iterator[torch.nn.Parameter]:
    for number in range(len(group.parameters)):
        one = torch.nn.Parameter(group.view(group.master.data, number))
        one.grad = group.view(group.gradient, number).to(one.dtype)
        yield one
