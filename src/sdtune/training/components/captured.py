"""A step as one CUDA graph: recorded once for each shape, then started with a single call.

A pass through the UNet and back is thousands of kernels, most of them shorter than Python needs to start one, so that
an eager step of batch 1 takes as long as one of batch 4. What is recorded has no Python in it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from sdtune import events
from sdtune.training.components.batches import Noised

Pass: TypeAlias = Callable[[Noised], torch.Tensor]


class Captured:
    """``forward_and_backward``, recorded for each shape of its batch where that is possible.

    The first batch of a shape runs as it is, which also lets cuDNN look for its fastest algorithms; the second is
    recorded. What cannot be recorded runs as it is from then on, and that is said once.
    """

    def __init__(
        self,
        forward_and_backward: Pass,
        device: torch.device,
        tell: Callable[[events.Event], None],
        graphs: type | None,
    ) -> None:
        """graphs: what records, ``CudaGraph`` or nothing."""
        self._pass, self._device, self._tell, self._graphs = forward_and_backward, device, tell, graphs
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, Any] = {}

    def __call__(self, noised: Noised) -> torch.Tensor:
        """The loss of the batch, a scalar on the device, which the next call may overwrite."""
        key = (tuple(noised.batch.latents.shape), noised.batch.prior)
        if self._graphs and key in self._seen and key not in self._recorded:
            self._record(key, noised)
        if graph := self._recorded.get(key):
            loss: torch.Tensor = graph.replay(_tensors(noised))
            return loss
        self._seen.add(key)
        with searching():
            return self._pass(on_device(noised, self._device))

    def _record(self, key: Hashable, noised: Noised) -> None:
        assert self._graphs
        inputs = on_device(noised, self._device)
        try:
            beside = next(iter(self._recorded.values()), None)
            self._recorded[key] = self._graphs(lambda: self._pass(inputs), _tensors(inputs), beside)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._graphs = None
            self._recorded.clear()
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self._tell(
                events.Note(f"The step cannot be recorded as a CUDA graph, so it runs slower: {first_line}", "warning")
            )


class CudaGraph:
    """One recording. Its memory is shared with that of the others, of which no two run at once."""

    def __init__(
        self, function: Callable[[], torch.Tensor], inputs: list[torch.Tensor], beside: CudaGraph | None
    ) -> None:
        """function: what is recorded; it reads ``inputs``, which stay where they are. beside: one of the others."""
        self._inputs = inputs
        # A memory is gone with the last recording in it, so it is none of the process: that may train again.
        self._pool: Any = beside._pool if beside else torch.cuda.graph_pool_handle()
        self._graph = torch.cuda.CUDAGraph()
        with (
            searching(),
            torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            self._loss = function()

    def replay(self, given: list[torch.Tensor]) -> torch.Tensor:
        """Run it on ``given``, from the CPU; the host does not wait."""
        for kept, new in zip(self._inputs, given, strict=True):
            kept.copy_(new.pin_memory(), non_blocking=True)
        self._graph.replay()
        return self._loss


def searching() -> AbstractContextManager[None]:
    """cuDNN looks for its fastest algorithms inside. ``flags`` turns off what it is not told, cuDNN itself included."""
    now = torch.backends.cudnn.allow_tf32
    context: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=now)
    return context


def _tensors(noised: Noised) -> list[torch.Tensor]:
    batch = noised.batch
    conditioning = [] if batch.conditioning is None else batch.conditioning.tensors
    return [batch.latents, batch.captions, noised.noise, noised.timesteps, *conditioning]


def on_device(noised: Noised, device: torch.device) -> Noised:
    """All of it on the device; where that is the CPU, as it is."""
    batch = noised.batch
    conditioning = None if batch.conditioning is None else batch.conditioning.to(device)
    there = replace(
        batch, latents=batch.latents.to(device), captions=batch.captions.to(device), conditioning=conditioning
    )
    return Noised(there, noised.noise.to(device), noised.timesteps.to(device))
