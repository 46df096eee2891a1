"""The loop: schedule, accumulation, clipping, and a loss that is not finite."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.batches import Batch, Noised
from sdtune.training.components.loop import Training, fit
from sdtune.training.components.lora_weights import Family
from sdtune.training.components.models import Parts
from sdtune.training.components.optim import build_optimizer
from sdtune.training.components.weights import Weights
from sdtune.training.run import Run

NO_BATCH = Noised(Batch(torch.zeros(1), torch.zeros(1), names=("7.png", "9.png")), torch.zeros(1), torch.zeros(1))
NO_MODEL = Parts([], [], None, torch.nn.Identity(), None, Family.SD1)


def method(**settings: Any) -> DreamBoothLora:
    return DreamBoothLora.from_settings({"instance_prompt": "x", "mixed_precision": "no", **settings})


def weights_of(weight: torch.nn.Parameter, the_method: DreamBoothLora) -> Weights:
    return Weights([{"params": [weight], "lr": the_method.learning_rate}], torch.float32)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(method(), tmp_path, tmp_path / "out") as run:
        yield run


def fitted(run: Run, the_method: DreamBoothLora, loss_of: Any, weight: torch.nn.Parameter, **more: Any) -> Any:
    training = Training(weights_of(weight, the_method), repeat(NO_BATCH), the_method, run)  # type: ignore[arg-type]
    return fit(loss_of, NO_MODEL, training, the_method, run, **more)


def steps_told(capsys: pytest.CaptureFixture[str]) -> list[events.Step]:
    told = [events.parse(line) for line in capsys.readouterr().out.splitlines()]
    return [event for event in told if isinstance(event, events.Step)]


def test_it_finds_a_minimum(run: Run) -> None:
    weight = torch.nn.Parameter(torch.tensor([4.0]))
    end = fitted(run, method(max_train_steps=300, learning_rate=0.1), lambda _: (weight - 1).square().sum(), weight)
    assert weight.item() == pytest.approx(1, abs=0.05)
    assert end < 0.01


def test_the_learning_rate_reaches_the_optimizer_and_follows_the_schedule() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    the_method = method(
        learning_rate=5e-5, lr_scheduler="constant_with_warmup", lr_warmup_steps=4, adam_beta1=0.8, adam_beta2=0.9,
        adam_weight_decay=0.3, adam_epsilon=1e-6,
    )  # fmt: skip
    optimizer, schedule = build_optimizer(weights_of(weight, the_method), the_method)
    group = optimizer.param_groups[0]
    assert group["betas"] == (0.8, 0.9)
    assert (group["weight_decay"], group["eps"]) == (0.3, 1e-6)
    rates = []
    for _ in range(6):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 1.25e-5, 2.5e-5, 3.75e-5, 5e-5, 5e-5])


def test_accumulated_batches_are_one_large_batch(run: Run) -> None:
    """Two batches of gradients added up move the weight as their mean does in one."""
    targets = [torch.tensor([0.0, 3.0]), torch.tensor([5.0, -1.0])]
    apart, together = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    queue = iter(targets * 10)
    fitted(
        run, method(max_train_steps=10, gradient_accumulation_steps=2, learning_rate=0.1),
        lambda _: (apart - next(queue)).square().mean(), apart,
    )  # fmt: skip
    fitted(
        run, method(max_train_steps=10, learning_rate=0.1),
        lambda _: torch.stack([(together - target).square().mean() for target in targets]).mean(), together,
    )  # fmt: skip
    torch.testing.assert_close(apart, together)


def test_gradients_are_clipped(run: Run) -> None:
    """AdamW hides the size of a gradient, so look at it as the optimizer gets it."""
    weight = torch.nn.Parameter(torch.ones(4))
    norms = []
    the_method = method(max_train_steps=1, max_grad_norm=0.25)
    training = Training(weights_of(weight, the_method), repeat(NO_BATCH), the_method, run)  # type: ignore[arg-type]
    training.optimizer.register_step_pre_hook(lambda *_: norms.append(weight.grad.norm().item()))  # type: ignore[union-attr]
    fit(lambda _: (1000 * weight).sum(), NO_MODEL, training, the_method, run)
    assert norms == [pytest.approx(0.25, rel=1e-4)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(run: Run, bad: float) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    count = iter(range(1, 100))
    with pytest.raises(TrainingError, match=rf"the loss was {bad} at step 6 \(7.png, 9.png\): .*Lower --learning-rate"):
        fitted(run, method(max_train_steps=20), lambda _: weight.sum() * (bad if next(count) >= 6 else 1), weight)


def test_reports_come_early_and_at_the_end(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    seen: list[int] = []
    the_method = method(max_train_steps=50, train_batch_size=3)
    fitted(run, the_method, lambda _: weight.square().sum(), weight, after_step=[seen.append])
    told = steps_told(capsys)
    assert [step.step for step in told][:1] == [3]
    assert told[-1].step == told[-1].steps == 50
    assert told[-1].seconds_left == 0
    assert all(step.images_per_second > 0 for step in told)
    assert seen == list(range(1, 51))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy", "lion", "adamw8bit"])
def test_every_optimizer_finds_a_minimum(run: Run, name: str) -> None:
    weight = torch.nn.Parameter(torch.full((8, 8), 4.0))
    rate = 1.0 if name == "prodigy" else 0.05
    the_method = method(max_train_steps=300, learning_rate=rate, optimizer=name)
    fitted(run, the_method, lambda _: (weight - 1).square().mean(), weight)
    assert (weight - 1).abs().max().item() < 0.2


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy", "lion", "adamw8bit"])
def test_the_polynomial_schedule_ends_at_1e_7_with_every_optimizer(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    rate = 0.5 if name == "prodigy" else 5e-5
    the_method = method(learning_rate=rate, optimizer=name, lr_scheduler="polynomial", max_train_steps=4)
    optimizer, schedule = build_optimizer(weights_of(weight, the_method), the_method)
    rates = []
    for _ in range(5):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1e-7 + (rate - 1e-7) * left for left in (1, 0.75, 0.5, 0.25, 0)], rel=1e-6)


def test_a_missing_optimizer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(TrainingError, match=r"the library lion_pytorch is not installed.*\[optimizers\]"):
        build_optimizer(weights_of(torch.nn.Parameter(torch.ones(1)), method()), method(optimizer="lion"))
