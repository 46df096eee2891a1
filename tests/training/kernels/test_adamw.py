"""AdamW in one kernel: against torch's AdamW, clipping and cast, over several steps, and in runs that go on."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.methods.resuming import Manifest
from sdtune.training.components.batches import Batch, Noised
from sdtune.training.components.checkpoint_state import read_state, write_checkpoint
from sdtune.training.components.flat_adamw import FlatAdamW
from sdtune.training.components.loop import Training, fit
from sdtune.training.components.lora_weights import Family
from sdtune.training.components.models import Parts
from sdtune.training.components.optim import Update
from sdtune.training.components.processes import Share
from sdtune.training.components.weights import Weights
from sdtune.training.kernels.adamw import ELEMENTS, adamw, adamw_reference
from sdtune.training.run import Run
from tests.training.kernels.comparing import errors

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def casts_that_round(monkeypatch):
    """To the nearest, as a GPU and torch do; the interpreter cuts off."""
    cut = InterpreterBuilder.create_fp_trunc

    def rounded(builder, source, kind):
        if source.dtype.scalar.name != "fp32" or kind.scalar.name != "bf16":
            return cut(builder, source, kind)
        numbers = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(numbers.view(torch.uint16).numpy().reshape(source.data.shape), kind.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)


def models(dtype=torch.bfloat16, rates=(1e-2,)):
    """As many layers as rates, their weights, and the like that torch trains in float32."""
    layers = [torch.nn.Linear(70, 33) for _ in rates]
    twins = copy.deepcopy(layers)
    groups = [{"params": list(one.parameters()), "lr": rate} for one, rate in zip(layers, rates, strict=True)]
    theirs = [{"params": list(one.parameters()), "lr": rate} for one, rate in zip(twins, rates, strict=True)]
    return layers, Weights(groups, dtype), twins, theirs


def learn(layers, twins, size=1.0):
    """Gradients of both, of the same half precision values."""
    for layer, twin in zip(layers, twins, strict=True):
        for parameter, other in zip(layer.parameters(), twin.parameters(), strict=True):
            gradient = (size * torch.randn(parameter.shape)).to(parameter.dtype)
            parameter.grad += gradient
            other.grad = gradient.float()


@pytest.mark.parametrize("count", [64, ELEMENTS, 3 * ELEMENTS + 64, 100])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("norm", [0.3, 40.0])
def test_kernel_against_its_reference(count, weight_decay, norm):
    """Several programs, the last of them not full; gradients that are clipped and not."""
    ours = [torch.randn(count), torch.randn(count), torch.rand(count)]
    ours += [torch.randn(count).bfloat16(), torch.zeros(count, dtype=torch.bfloat16)]
    exact = [one.double() for one in ours]
    scalars = (1.0, 3, 1e-2, 0.9, 0.99, 1e-8, weight_decay)
    adamw(*ours, torch.tensor(norm), *scalars)
    adamw_reference(*exact, torch.tensor(norm, dtype=torch.float64), *scalars)
    assert max(errors(ours[:3], exact[:3])) < 1e-6
    assert torch.equal(ours[4], ours[0].bfloat16())
    assert not ours[3].any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("rates", [(1e-2,), (1e-2, 3e-4)], ids=["one group", "two groups"])
def test_steps_are_those_of_torch(weight_decay, rates):
    layers, weights, twins, theirs = models(rates=rates)
    options = {**OPTIONS, "weight_decay": weight_decay}
    ours, plain = FlatAdamW(weights, 1.0, **options), torch.optim.AdamW(theirs, **options)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step)) for one in (ours, plain)]
    parameters = [parameter for twin in twins for parameter in twin.parameters()]
    started = [parameter.detach().clone() for parameter in parameters]
    for step in range(6):
        # The second half is not clipped.
        learn(layers, twins, 1.0 if step < 3 else 1e-3)
        ours.step()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        plain.step()
        for schedule in schedules:
            schedule.step()
        assert all(not parameter.grad.any() for layer in layers for parameter in layer.parameters())
    masters = [one for group in weights.groups(flat=False) for one in group["params"]]
    for master, parameter, before in zip(masters, parameters, started, strict=True):
        moved = (parameter - before).abs().max()
        assert moved > 1e-3 * min(rates) / max(rates)
        assert (master - parameter).abs().max() < 1e-4 * moved
    model = [parameter for layer in layers for parameter in layer.parameters()]
    assert all(torch.equal(one, master.bfloat16()) for one, master in zip(model, masters, strict=True))
    assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in plain.param_groups]


def test_groups_are_clipped_together():
    """Both are as long as 3 and 4: together 5, so that each is multiplied with a fifth."""
    _, weights, _, _ = models(rates=(1e-2, 1e-2))
    ours = FlatAdamW(weights, 1.0, **OPTIONS)
    for gradient, length in zip(weights.gradients, (3.0, 4.0), strict=True):
        gradient[0] = length
    ours.step()
    means = [ours.state[master]["exp_avg"][0].item() for master in weights.masters]
    assert means == pytest.approx([0.1 * 0.6, 0.1 * 0.8], rel=1e-5)


def test_masters_have_no_gradients_of_their_own():
    layers, weights, twins, _ = models()
    FlatAdamW(weights, 1.0, **OPTIONS)
    learn(layers, twins)
    weights.collect()
    assert [master.grad for master in weights.masters] == [None]
    assert weights.gradients[0].dtype is torch.bfloat16
    [one, _] = weights.groups(flat=False)[0]["params"]
    assert torch.equal(one.grad, twins[0].weight.grad)
    with weights.full_precision():
        assert layers[0].weight.dtype is torch.float32
    assert not weights.gradients[0].any()


def test_a_decay_close_to_1_is_not_rounded():
    """1 - 0.99999 is off by a thousandth in float32, and the first steps with it."""
    weight, mean, square = torch.zeros(64), torch.zeros(64), torch.zeros(64)
    gradient, model = torch.ones(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
    adamw(weight, mean, square, gradient, model, torch.tensor(0.0), 1.0, 1, 1e-3, 0.9, 0.99999, 1e-8, 0.0)
    assert square[0].item() == pytest.approx(1e-5, rel=1e-6)
    assert weight[0].item() == pytest.approx(-1e-3, rel=1e-5)


def test_updates_smaller_than_half_precision_resolves_survive():
    """A hundred steps, each about a 64th of the smallest that bfloat16 can take from 1, are seen in the end."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    weights = Weights([{"params": list(model.parameters()), "lr": 2.0**-14}], torch.bfloat16)
    ours = FlatAdamW(weights, 1.0, lr=2.0**-14, weight_decay=0.0)
    model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    ours.step()
    assert model.weight.item() == 1
    for _ in range(99):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        ours.step()
    assert weights.masters[0][0].item() == pytest.approx(1 - 100 * 2.0**-14, abs=1e-5)
    assert model.weight.item() < 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    """As with torch's clipping: one such gradient makes all weights NaN, or leaves them where infinity divides them."""
    layers, weights, twins, theirs = models()
    ours, plain = FlatAdamW(weights, 1.0, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    learn(layers, twins)
    for one in (layers[0], twins[0]):
        one.weight.grad[3, 5] = bad
    ours.step()
    torch.nn.utils.clip_grad_norm_(twins[0].parameters(), 1.0)
    plain.step()
    [weight, bias] = weights.groups(flat=False)[0]["params"]
    assert torch.equal(weight.isnan(), twins[0].weight.isnan())
    assert torch.equal(bias.isnan(), twins[0].bias.isnan())
    assert weight.isnan().any()


def run_of(steps, layers, weights, optimizer):
    """``steps`` in which the gradients depend on the model's weights, as half precision has them."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 70, generator=generator).bfloat16()
        (layers[0](x).float().square().mean() * 30).backward()
        weights.collect()
        optimizer.step()


def test_it_goes_on_exactly(tmp_path):
    layers, weights, _, _ = models()
    others, again, _, _ = models()
    optimizer = FlatAdamW(weights, 1.0, **OPTIONS)
    run_of(range(4), layers, weights, optimizer)
    state = {"weights": weights.state_dict(), "optimizer": optimizer.state_dict()}
    kept = copy.deepcopy(state)
    run_of(range(4, 9), layers, weights, optimizer)
    resumed = FlatAdamW(again, 1.0, **{**OPTIONS, "lr": 0.5})
    again.load_state_dict(kept["weights"])
    resumed.load_state_dict(kept["optimizer"])
    run_of(range(4, 9), others, again, resumed)
    assert torch.equal(again.masters[0], weights.masters[0])
    assert torch.equal(others[0].weight, layers[0].weight)


@pytest.mark.parametrize("fused", [True, False])
def test_torchs_adamw_and_ours_take_up_each_others_states(fused):
    layers, weights, twins, _ = models()
    flat = [{"params": [torch.nn.Parameter(weights.masters[0].detach().clone())], "lr": 1e-2}]
    plain = torch.optim.AdamW(flat, fused=fused, **OPTIONS)
    for _ in range(2):
        flat[0]["params"][0].grad = torch.randn(weights.masters[0].shape)
        plain.step()
    ours = FlatAdamW(weights, 1.0, **OPTIONS)
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    learn(layers, twins)
    ours.step()
    [state] = ours.state.values()
    assert state["step"].item() == 3
    assert state["step"].device.type == "cpu"
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(plain.state_dict()["state"][0]["exp_avg"], state["exp_avg"])
    plain.step()
    assert plain.state_dict()["state"][0]["step"].item() == 4


# --- where it is used -------------------------------------------------------------------------------------------------


def a_method(**settings):
    return DreamBoothLora.from_settings(
        {"instance_prompt": "x", "mixed_precision": "bf16", "max_train_steps": 8, "learning_rate": 0.05, **settings}
    )


@pytest.fixture
def bf16_run(tmp_path):
    with Run.open(a_method(), tmp_path, tmp_path / "out") as run:
        yield run


class Pictures:
    """Draws of their own, which can go on."""

    def __init__(self):
        self.number = 0

    def __next__(self):
        self.number += 1
        x = torch.randn(4, 70, generator=torch.Generator().manual_seed(self.number))
        return Noised(Batch(x, torch.zeros(1), names=(f"{self.number}.png",)), torch.zeros(1), torch.zeros(1))

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def trained(run, method, after_step=(), state=None):
    """A layer that was trained by the loop."""
    layers, weights, _, _ = models(run.weight_dtype)
    training = Training(weights, Pictures(), method, run)
    if state:
        training.load_state_dict(state)
    parts = Parts([], [], None, torch.nn.Identity(), None, Family.SD1)

    def loss_of(noised):
        return layers[0](noised.batch.latents.to(run.weight_dtype)).float().square().mean()

    fit(loss_of, parts, training, method, run, [lambda step: [one(training, step) for one in after_step]])
    return training, layers[0]


def test_the_loop_trains_with_it_as_without(bf16_run, monkeypatch):
    torch.manual_seed(0)
    with_it, layer = trained(bf16_run, a_method())
    assert type(with_it.optimizer) is FlatAdamW
    monkeypatch.setattr("sdtune.training.components.optim.can_fuse", lambda _: False)
    torch.manual_seed(0)
    without, other = trained(bf16_run, a_method())
    assert type(without.optimizer) is torch.optim.AdamW
    assert with_it.losses == pytest.approx(without.losses, rel=1e-2)
    assert (layer.weight - other.weight).abs().max() < 0.02
    assert layer.weight.dtype is other.weight.dtype is torch.bfloat16
    assert with_it.schedule.get_last_lr() == without.schedule.get_last_lr()


def test_a_run_goes_on_exactly_from_its_checkpoint(bf16_run, tmp_path):
    method = a_method(lr_scheduler="cosine", lr_warmup_steps=2)
    states = {}

    def keep(training, step):
        if step == 3:
            states.update(copy.deepcopy(training.state_dict()))

    whole, layer = trained(bf16_run, method, [keep])
    folder = write_checkpoint(tmp_path, Manifest(3, "", {}, ""), states)
    resumed, other = trained(bf16_run, method, state=read_state(folder))
    assert torch.equal(whole.weights.masters[0], resumed.weights.masters[0])
    assert torch.equal(layer.weight, other.weight)
    assert whole.losses == resumed.losses


@pytest.mark.parametrize(
    ("settings", "dtype", "processes"),
    [
        ({"optimizer": "lion"}, torch.bfloat16, 1),
        ({"gradient_accumulation_steps": 2}, torch.bfloat16, 1),
        ({}, torch.bfloat16, 2),
        ({}, torch.float16, 1),
        ({}, torch.float32, 1),
    ],
)
def test_elsewhere_gradients_are_added_up_in_float32(settings, dtype, processes, bf16_run, monkeypatch):
    monkeypatch.setattr(Run, "share", Share(0, processes))
    _, weights, _, _ = models(dtype)
    update = Update(weights, a_method(**settings), bf16_run)
    assert type(update.optimizer) is not FlatAdamW
    assert weights.gradients[0].dtype is weights.masters[0].grad.dtype is torch.float32
