"""A step before the first leaves nothing behind it; what compiles in it is kernels/test_rehearsal.py's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from sdtune import events
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.batches import Batch, Noised
from sdtune.training.components.loop import Training
from sdtune.training.components.lora_weights import Family
from sdtune.training.components.models import Parts
from sdtune.training.components.rehearsal import rehearse
from sdtune.training.components.weights import Weights
from sdtune.training.run import Run

PARTS = Parts([], [], None, torch.nn.Linear(1, 1), None, Family.SD1, fused=True)


class Counting(Iterator[Noised]):
    """Draws of numbers that rise."""

    def __init__(self) -> None:
        self.number = 0

    def __next__(self) -> Noised:
        self.number += 1
        number = torch.full((1,), float(self.number))
        return Noised(Batch(number, torch.zeros(1, dtype=torch.int64)), number, torch.zeros(1, dtype=torch.int64))

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


class Measure:
    measured = 0

    def rehearse(self) -> None:
        self.measured += 1


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(DreamBoothLora.from_settings({"instance_prompt": "x"}), tmp_path, tmp_path / "out") as run:
        yield run


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_it_is_left(run: Run, capsys: pytest.CaptureFixture[str], fused: bool, dtype: torch.dtype) -> None:
    method = DreamBoothLora.from_settings({"instance_prompt": "x"})
    weight = torch.nn.Parameter(torch.ones(3))
    weights = Weights([{"params": [weight], "lr": 1.0}], dtype)
    training = Training(weights, cast(Any, Counting()), method, run)
    seen: list[float] = []

    def loss_of(noised: Noised) -> torch.Tensor:
        seen.append(noised.batch.latents.item())
        return (weight.float() * torch.rand(3) * float("nan")).sum()

    torch.manual_seed(5)
    following = torch.rand(4)
    torch.manual_seed(5)
    held_out = Measure()
    rehearse(loss_of, cast(Any, held_out), replace(PARTS, fused=fused), training, method, run)
    assert (seen, held_out.measured) == (([1.0], 1) if fused else ([], 0))
    assert torch.equal(torch.rand(4), following)
    assert next(training.draws).batch.latents.item() == 1
    assert all(not gradient.any() for gradient in weights.gradients)
    assert weight.grad is not None
    assert not weight.grad.any()
    assert torch.equal(weight.float(), torch.ones(3))
    told = [event for line in capsys.readouterr().out.splitlines() if (event := events.parse(line))]
    assert bool([event for event in told if isinstance(event, events.Phase)]) is fused
