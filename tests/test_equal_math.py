"""benchmarks/equal_math.py: what it finds wrong is found wrong. Whether the GPU's path is right is for a GPU to say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import equal_arms
import pytest
import torch
from equal_arms import AGAIN, OURS, PLAIN, REFERENCE, RESUMED, Seen, compared, survey_update, train
from equal_math import BASE_MODEL, CASES, LIMITS, Case, Plan, loss_errors, main, parse, rows_of, tiny

from sdtune.training.components import loop
from sdtune.training.components.loss import diffusion_loss
from sdtune.training.trainers import text_to_image_lora

LORA_4, FULL_4 = tiny(CASES[1]), tiny(CASES[4])
STEPS = 8


def test_the_command_passes_on_a_cpu_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    assert main(["--tiny", "--steps", "4", "--only", "lora-4", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [(row["arm"], row["against"], row["failed"]) for row in report["rows"]] == [
        (OURS.name, REFERENCE.name, []),
        (PLAIN.name, REFERENCE.name, []),
        (AGAIN.name, OURS.name, []),
        (RESUMED.name, OURS.name, []),
        (RESUMED.name, AGAIN.name, []),
    ]
    arms = report["cases"]["lora-4"]["arms"]
    assert list(arms[OURS.name]["losses"]) == ["1", "2", "3", "4"]
    assert list(arms[RESUMED.name]["losses"]) == ["3", "4"]
    # A CPU adds up in the same order every time, so that here nothing may differ at all.
    assert all(row["largest"] == 0 for row in report["rows"] if row["against"] != REFERENCE.name)
    assert 0 < report["rows"][0]["largest"] < 0.03
    assert "| lora-4 | captured and fused " in capsys.readouterr().out


# --- what is wrong is found ------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan([LORA_4], STEPS, {"sd1": BASE_MODEL}, tmp_path, float("inf"), tiny=True)


def failures(case: Case, arms: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with arms, by their names, after their way through JSON."""
    rows = rows_of(case.name, json.loads(json.dumps(arms)), LIMITS, gpu=False)
    return [why for row in rows for why in row["failed"]]


def test_a_loss_that_is_another_one_is_found(plan: Plan) -> None:
    reference = train(LORA_4, REFERENCE, plan)
    with patch.object(text_to_image_lora, "diffusion_loss", lambda *given: diffusion_loss(*given) * 1.02):
        ours = train(LORA_4, OURS, plan)
    found = failures(LORA_4, {REFERENCE.name: reference.told(), OURS.name: ours.told() | compared(ours, reference)})
    assert len(found) == 1
    assert "loss off by 2." in found[0]


def test_weights_that_are_kept_in_bfloat16_are_found(plan: Plan) -> None:
    cast = loop.Weights.cast

    def rounding(weights: loop.Weights) -> None:
        for master in weights.masters:
            master.data.copy_(master.data.bfloat16())
        cast(weights)

    reference = train(FULL_4, REFERENCE, plan)
    ours = train(FULL_4, OURS, plan)
    assert ours.below is not None
    assert ours.below > 0.3
    assert not failures(FULL_4, {REFERENCE.name: reference.told(), OURS.name: ours.told()})
    with patch.object(loop.Weights, "cast", rounding), patch.object(equal_arms, "survey_update", survey_rounded):
        rounded = train(FULL_4, OURS, plan)
    assert rounded.survived is not None
    assert rounded.survived < 0.01
    found = failures(FULL_4, {REFERENCE.name: reference.told(), OURS.name: rounded.told()})
    assert any("of small updates kept, fewer than 99%" in why for why in found)


def survey_rounded(training: loop.Training, before: list[torch.Tensor]) -> tuple[float, float]:
    """The hook is called before ``cast``, in which the test rounds."""
    for master in training.weights.masters:
        master.data.copy_(master.data.bfloat16())
    return survey_update(training, before)


def lose_the_optimizer(training: loop.Training, state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "optimizer": training.optimizer.state_dict()}


def draw_the_same_again(training: loop.Training, state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "draws": training.draws.state_dict()}


@pytest.mark.parametrize("lost", [lose_the_optimizer, draw_the_same_again])
def test_a_run_that_goes_on_with_less_than_it_had_is_found(plan: Plan, lost: Callable[..., dict[str, Any]]) -> None:
    restore = loop.Training.load_state_dict
    ours = train(LORA_4, OURS, plan).told()
    with patch.object(loop.Training, "load_state_dict", lambda self, state: restore(self, lost(self, state))):
        resumed = train(LORA_4, RESUMED, plan).told()
    # Any two undisturbed runs are alike here; the float32 one does not matter.
    found = failures(LORA_4, {REFERENCE.name: ours, OURS.name: ours, AGAIN.name: ours, RESUMED.name: resumed})
    assert len(found) == 2
    assert all("loss off by" in why and "more than 0.10%" in why for why in found)


def test_gradients_that_point_elsewhere_are_found() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(1000)
    one = Seen(gradients={1: [gradient], 2: [gradient]}, trained=[gradient])
    other = Seen(gradients={1: [gradient + 0.1 * torch.randn(1000)], 2: [gradient]}, trained=[gradient - 1])
    found = compared(one, other)
    assert found["cosines"][1] == pytest.approx(0.995, abs=1e-3)
    assert found["cosines"][2] == pytest.approx(1)
    assert found["apart"] == pytest.approx(1)
    arm = {**one.told(), "losses": {"1": 1.0}}
    why = failures(LORA_4, {REFERENCE.name: arm, OURS.name: arm | found})
    assert len(why) == 1
    assert why[0].startswith("cosine at step 1 is 0.99")


def test_on_a_gpu_what_was_not_captured_or_fused_is_found() -> None:
    arm = {**Seen().told(), "losses": {"1": 1.0}}
    (row,) = rows_of("lora-1", {REFERENCE.name: arm, OURS.name: arm}, LIMITS, gpu=True)
    assert row["failed"] == ["no CUDA graph was recorded", "the kernels are not in the UNet"]
    (row,) = rows_of("lora-1", {REFERENCE.name: arm, OURS.name: {**arm, "graphs": 1, "fused": True}}, LIMITS, gpu=True)
    assert row["failed"] == []


def test_a_step_of_fp16_that_overflowed_has_no_gradient_to_compare() -> None:
    arm = {**Seen(overflowed=[1]).told(), "losses": {"1": 1.0}}
    left = {**arm, "cosines": {"1": float("nan"), "2": 0.9999}}
    assert not failures(LORA_4, {REFERENCE.name: arm, OURS.name: left})
    none = {**left, "overflowed": [1, 2]}
    assert failures(LORA_4, {REFERENCE.name: arm, OURS.name: none}) == [
        "the gradients of all steps that are looked at overflowed"
    ]


def test_losses_are_compared_where_both_have_them() -> None:
    largest, mean = loss_errors({"losses": {"3": 1.1, "4": 2.0}}, {"losses": {"1": 5.0, "3": 1.0, "4": 2.0}})
    assert (largest, mean) == (pytest.approx(0.1), pytest.approx(0.05))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "lora-2"], "no case lora-2; there are lora-1, lora-4"),
        (["--steps", "5"], "found 5, wanted an even number from 4 on"),
        (["--model", "nowhere"], "nowhere has no model_index.json"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(words)
    assert told in capsys.readouterr().err
