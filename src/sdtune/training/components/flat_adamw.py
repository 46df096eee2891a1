"""AdamW that reads the model's own gradients and writes what the model computes with.

Import it only where ``components.fused`` has found that kernels can run.
"""

from __future__ import annotations

from typing import Any

import torch

from sdtune.training.components.weights import Weights
from sdtune.training.kernels.adamw import adamw


class FlatAdamW(torch.optim.AdamW):
    """A step clips the gradients, moves the masters, gives the model its casts and forgets the gradients.

    In state and groups it is torch's AdamW: either goes on where the other has stopped.
    """

    def __init__(self, weights: Weights, max_grad_norm: float, **options: Any) -> None:
        """``weights`` are left without float32 gradients: one backward pass for each step."""
        weights.stop_accumulating()
        super().__init__(weights.groups(flat=True), foreach=False, fused=False, **options)
        self._weights, self._max_grad_norm = weights, max_grad_norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """The host does not wait: the norm stays on the device. It is that of all groups together."""
        gradients = self._weights.gradients
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        for group, gradient, computing in zip(self.param_groups, gradients, self._weights.computing, strict=True):
            [master], (beta1, beta2) = group["params"], group["betas"]
            state = self.state[master]
            if not state:
                # On the CPU, as torch has it where nothing is captured, so that reading it waits for nothing.
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            state["step"] += 1
            adamw(
                master, state["exp_avg"], state["exp_avg_sq"], gradient, computing, norm, self._max_grad_norm,
                int(state["step"]), group["lr"], beta1, beta2, group["eps"], group["weight_decay"],
            )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            # Of torch's fused AdamW it comes back on the device.
            state["step"] = state["step"].cpu()
