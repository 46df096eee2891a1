"""Several processes train as one: two with batches of one do what one does with batches of two."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdtune import events
from sdtune.jobs.spec import plan_training
from sdtune.methods.catalog import find_method
from sdtune.training.__main__ import main
from sdtune.training.components.processes import Share, exchange, share_threads
from tests.conftest import BASE_MODEL, DATASETS
from tests.training.conftest import EntryPoint

SETTINGS = {
    "base_model": str(BASE_MODEL),
    "resolution": 64,
    "max_train_steps": 4,
    "learning_rate": 1e-3,
    "gradient_accumulation_steps": 2,
    "noise_offset": 0.1,
    "num_samples": 0,
}
METHODS: dict[str, dict[str, Any]] = {
    "dreambooth-lora": {"instance_prompt": "a photo of sks cat", "train_text_encoder": True},
    "text-to-image": {"proportion_empty_prompts": 0.3, "use_ema": True, "lr_scheduler": "linear", "lr_warmup_steps": 2},
}


def command(method: str, output: Path, processes: int, **settings: Any) -> list[str]:
    dataset = DATASETS / ("images" if method.startswith("dreambooth") else "captioned")
    wanted = find_method(method).from_settings({**SETTINGS, **METHODS[method], **settings})
    job = plan_training(wanted, str(dataset), str(output))
    return [sys.executable, "-m", "sdtune.training", *job.args, f"--processes={processes}"]


def train(method: str, output: Path, processes: int, **settings: Any) -> tuple[int, list[events.Event]]:
    ran = subprocess.run(command(method, output, processes, **settings), capture_output=True, text=True)
    return ran.returncode, [event for line in ran.stdout.splitlines() if (event := events.parse(line))]


@pytest.fixture(autouse=True)
def few_draws() -> None:
    """All of them, here: processes of their own are compared with this one."""


@pytest.mark.parametrize("method", METHODS)
def test_two_with_batches_of_one_are_one_with_batches_of_two(
    method: str, tmp_path: Path, entry_point: EntryPoint
) -> None:
    weights, told = {}, {}
    for processes, batch in ((1, 2), (2, 1), (1, 1)):
        output = tmp_path / f"{processes}-of-{batch}" / "cat"
        if processes == 1:
            words = command(method, output, processes, train_batch_size=batch)[3:]
            code, told[processes, batch], _ = entry_point(words)
        else:
            code, told[processes, batch] = train(method, output, processes, train_batch_size=batch)
        assert code == 0
        weights[processes, batch] = {
            f"{file.relative_to(output)} {name}": tensor.float()
            for file in output.rglob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
    one, two, alone = weights[1, 2], weights[2, 1], weights[1, 1]
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            two[name], tensor, rtol=1e-2, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    # Half of the batch gives another model, by far more than that: the comparison sees a missing exchange.
    assert max(float((alone[name] - tensor).abs().max()) for name, tensor in one.items()) > 5e-4
    assert results(told[2, 1]) == pytest.approx(results(told[1, 2]), rel=1e-4)
    assert [type(event).__name__ for event in told[2, 1]].count("Finished") == 1


def results(told: list[events.Event]) -> list[float]:
    losses = [event.value for event in told if isinstance(event, events.Measure)]
    return [*losses, *(event.loss for event in told if isinstance(event, events.Finished))]


def test_the_error_of_a_process_is_the_runs(tmp_path: Path) -> None:
    code, told = train("dreambooth-lora", tmp_path / "cat", 2, target_modules=["to_x"])
    assert code == 5
    assert isinstance(told[-1], events.Failed)
    assert "target_modules: to_x match no layer" in told[-1].text


@pytest.mark.parametrize("processes", [0, -1])
def test_there_is_at_least_one(tmp_path: Path, processes: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("dreambooth-lora", tmp_path / "cat", processes)[3:]) == 2
    assert f"processes: found {processes}, wanted at least 1" in capsys.readouterr().out


def test_all_of_them_stop(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("dreambooth-lora", tmp_path / "cat", 2, max_train_steps=100_000),
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"event": "step"') and json.loads(line)["step"] > 0:
            break
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    # The pipe closes when the last of them has ended.
    process.stdout.read()
    assert process.wait(timeout=60) == 143
    assert time.monotonic() - started < 15


def test_shares_are_the_rows_in_their_order() -> None:
    drawn = torch.arange(6)
    assert [Share(number, 3).rows(drawn).tolist() for number in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_gradients_are_exchanged_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtune.training.components.processes.AT_ONCE", 5)
    sizes = []

    class Doubling:
        """Stands for processes whose mean is twice this one's gradients."""

        def reduce(self, flat: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "mean"
            sizes.append(len(flat))
            return flat * 2

    gradients = [torch.arange(12.0), torch.ones(3)]
    exchange(gradients, Doubling())
    assert sizes == [5, 5, 2, 3]
    assert gradients[0].tolist() == [2.0 * number for number in range(12)]
    assert gradients[1].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("given", "device", "processes", "wanted"),
    [(None, "cuda", 1, 4), (None, "cuda", 2, 4), (None, "cuda", 8, 2), (None, "cpu", 1, 16), (None, "cpu", 2, 8),
     (None, "cpu", 99, 1), ("3", "cuda", 2, 16)],
)  # fmt: skip
def test_processes_share_the_threads_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, given: str | None, device: str, processes: int, wanted: int
) -> None:
    threads = [16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    share_threads(torch.device(device), processes)
    assert threads[-1] == wanted
