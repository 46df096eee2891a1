"""``sdtune machines`` as a user meets it."""

from __future__ import annotations

import json
from functools import partial

import pytest
from rich.console import Console

from sdtune.cli import machines_view
from sdtune.jobs.machine_table import GPUS
from sdtune.jobs.memory import estimate, fits
from sdtune.methods.catalog import find_method
from tests.conftest import Command


@pytest.fixture
def machines(sdtune: Command) -> Command:
    """Runs ``sdtune machines``."""
    return partial(sdtune, "machines")


def test_the_table_has_every_gpu_with_its_machines(machines: Command) -> None:
    code, out, _ = machines()
    assert code == 0
    lines = out.splitlines()
    for gpu in GPUS:
        (row,) = [line for line in lines if line.startswith(f"{gpu.name} ")]
        assert f" {gpu.memory_gib} " in row
        assert "…" not in row
    assert any(line.split()[:6] == ["l4", "24", "yes", "1", "g2-standard-8", "8"] for line in lines)
    assert "refused: Arm CPU" in out
    assert max(map(len, lines)) <= 120


def test_a_batch_in_the_table_fits_and_the_next_does_not(machines: Command) -> None:
    _, out, _ = machines("--gpu", "T4", "--json")
    (gpu,) = map(json.loads, out.splitlines())
    t4 = next(one for one in GPUS if one.name == "t4")
    told = 0
    for row in gpu["largest_batches"]:
        size = row["train_batch_size"]
        if not 0 < size < machines_view.MOST:
            continue
        told += 1
        method = find_method(row["method"]).from_settings({"instance_prompt": "a cat", **row["settings"]})
        batches = [method.model_copy(update={"train_batch_size": batch}) for batch in (size, size + 1)]
        sizes = [estimate(one, row["family"], row["resolution"], fused=False) for one in batches]
        assert [fits(one, t4) for one in sizes] == [True, False]
    assert told >= 3


def test_one_gpu_in_full(machines: Command) -> None:
    code, out, _ = machines("--gpu", "NVIDIA_TESLA_T4")
    assert code == 0
    assert "custom_model_training_preemptible_nvidia_t4_gpus" in out
    assert "n1-highcpu-96" in out
    assert "SDXL at 1024 px, dreambooth-lora" in out
    assert "g2-standard-8" not in out


def test_json_has_a_line_for_each_gpu(machines: Command) -> None:
    code, out, _ = machines("--json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["name"] for line in lines] == [gpu.name for gpu in GPUS]
    assert {line["event"] for line in lines} == {"machine"}
    l4 = next(line for line in lines if line["name"] == "l4")
    assert l4["accelerator_type"] == "NVIDIA_L4"
    assert l4["quotas"]["spot"] == "custom_model_training_preemptible_nvidia_l4_gpus"
    assert {"name": "g2-standard-24", "vcpus": 24, "memory_gb": 96, "gpus": [2], "documented_for_training": True} in (
        l4["machine_types"]
    )


def test_one_that_cannot_be_used_is_an_error(machines: Command) -> None:
    code, _, err = machines("--gpu", "gb200")
    assert code == 2
    assert "gb200 cannot be used: its CPU is Arm" in err
    code, out, _ = machines("--gpu", "l5", "--json")
    assert code == 2
    assert json.loads(out)["event"] == "error"


def test_a_narrow_terminal_gets_the_table_without_what_matters_least() -> None:
    def shown(width: int) -> str:
        out = Console(width=width, force_terminal=True, color_system=None, highlight=False)
        with out.capture() as captured:
            machines_view.show_all(out, list(GPUS))
        return captured.get()

    assert "few regions" in shown(118)
    assert "few regions" not in shown(100)
    assert "vCPU" in shown(100)
    for width in (80, 90):
        assert "vCPU" not in shown(width)
        assert "g2-standard-8" in shown(width)
        assert "…" not in shown(width)
