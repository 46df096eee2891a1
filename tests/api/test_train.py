"""sdtune.train in a script: what it returns, how it is stopped, and what goes wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sdtune
from sdtune.api.going import InterruptedWait
from sdtune.errors import DatasetError, JobError, RecipeError, TrainingError
from tests.conftest import BASE_MODEL

Pictures = Callable[..., Path]


def test_a_run_is_shown_as_lines_and_returned_with_all_it_left(
    pictures: Pictures, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Paths may be Paths.
    given = settings | {"base_model": BASE_MODEL, "sample_every": 2}
    run = sdtune.train("dreambooth-lora", dataset=pictures(), output=tmp_path / "out", **given)
    said = capsys.readouterr().out
    assert "dreambooth-lora out on this machine" in said
    assert "Training 4 steps" in said
    assert re.search(r"step 4/4  loss 0\.\d+", said)
    assert re.search(r"dreambooth-lora out on this machine .*: succeeded\n  4 steps in", said)
    assert (run.state, run.done) == ("succeeded", True)
    assert Path(run.lora_path) == tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert Path(run.files["kohya_lora"]).is_file()
    result = run.result()
    assert (result.steps, result.output) == (4, str(tmp_path / "out"))
    assert result.loss is not None
    assert result.change
    assert run.losses[-1][0] == 4
    assert [step for step, _ in run.measures["held_out_loss"]] == [0, 4]
    assert run.samples.steps == [0, 2, 4]
    assert [sample.prompt for sample in run.samples.latest] == ["a photo of sks cat"]
    assert run.samples.before[0].image.size == (128, 128)
    assert run.samples.sheet().width > 128
    with pytest.raises(JobError, match=r"has ended already \(succeeded\)"):
        run.cancel()

    # The same again is there already; other settings are another run.
    started = time.monotonic()
    again = sdtune.train("dreambooth-lora", dataset=pictures(name="x").parent / "pictures", output=run.output, **given)
    assert again.state == "succeeded"
    assert time.monotonic() - started < 60
    assert "This run has finished already" in capsys.readouterr().out
    assert again.lora_path == run.lora_path
    assert again.samples.steps == [0, 2, 4]
    with pytest.raises(RecipeError, match="output: "):
        sdtune.train("dreambooth-lora", dataset=tmp_path / "pictures", output=run.output, **given | {"rank": 8})


def test_nothing_is_started_by_a_dry_run(
    pictures: Pictures, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sdtune.train("dreambooth-lora", dataset=pictures(), output=tmp_path / "out", dry_run=True, **settings)
    assert run.state == "planned"
    assert "-m sdtune.training train dreambooth-lora" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert len(run.samples) == 0
    for ask in (run.result, run.cancel):
        with pytest.raises(JobError, match="the run out was not started"):
            ask()
    with pytest.raises(JobError, match="has saved no LoRA"):
        _ = run.lora_path


def test_all_mistakes_are_told_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        sdtune.train("dreambooth-lora", dataset=tmp_path / "none", output=tmp_path, rank=0, learning_rate=7)
    for mistake in ("instance_prompt: missing", "rank: found 0", "learning_rate: found 7", "no such folder"):
        assert mistake in str(caught.value)
    with pytest.raises(RecipeError, match="learning_rat: dreambooth-lora has no such setting; did you mean learning_r"):
        sdtune.train("dreambooth-lora", learning_rat=1e-4)  # type: ignore[call-arg]
    with pytest.raises(RecipeError, match="gpu: is for jobs in Google Cloud"):
        sdtune.train("dreambooth-lora", backend="local", gpu="l4")
    with pytest.raises(RecipeError, match="did you mean dreambooth-lora"):
        sdtune.train("dreambooth-lora2")
    with pytest.raises(RecipeError, match="config: is a recipe of dreambooth;"):
        sdtune.train("dreambooth-lora", config={"method": "dreambooth"})


def test_a_recipe_may_be_a_file_or_a_dict_and_what_is_given_wins(
    pictures: Pictures, settings: dict[str, Any], tmp_path: Path
) -> None:
    recipe = settings | {"method": "dreambooth-lora", "dataset": str(pictures()), "output": str(tmp_path / "out")}
    run = sdtune.train("dreambooth-lora", config=recipe, rank=2, dry_run=True, show=False)
    assert run.about.method is not None
    assert run.about.method.settings()["rank"] == 2
    assert run.about.method.learning_rate == 1e-3
    assert run.output == str(tmp_path / "out")
    assert recipe["method"] == "dreambooth-lora"  # left as it was


def test_errors_are_short_in_a_notebook() -> None:
    assert DatasetError("photos: no such folder")._render_traceback_() == [
        "\x1b[1;31mDatasetError\x1b[0m: photos: no such folder"
    ]


def long_run(pictures: Pictures, settings: dict[str, Any], tmp_path: Path, **more: Any) -> sdtune.api.Run:
    endless = settings | {"max_train_steps": 100_000, "num_samples": 0}
    return sdtune.train("dreambooth-lora", dataset=pictures(), output=tmp_path / "out", show=False, **endless, **more)


def until(met: Callable[[], object], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def test_a_run_goes_on_behind_the_cell_until_it_is_cancelled(
    pictures: Pictures, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = long_run(pictures, settings, tmp_path, wait=False)
    until(lambda: run.losses)
    assert run.state == "running"
    with pytest.raises(TimeoutError, match="it goes on"):
        run.result(timeout=0.01)
    run.cancel()
    with pytest.raises(JobError, match="the run out was cancelled"):
        run.result()
    assert run.state == "cancelled"
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_a_run_that_was_stopped_goes_on(pictures: Pictures, settings: dict[str, Any], tmp_path: Path) -> None:
    given = settings | {
        "max_train_steps": 150,
        "checkpointing_steps": 10,
        "dataset": pictures(),
        "output": tmp_path / "out",
    }
    run = sdtune.train("dreambooth-lora", **given, wait=False, show=False)
    until(lambda: run.losses and run.losses[-1][0] > 12)
    run.cancel()
    with pytest.raises(JobError):
        run.result()
    again = sdtune.train("dreambooth-lora", **given, show=False)
    assert again.about.goes_on_from >= 10
    assert again.losses[0][0] > again.about.goes_on_from
    assert again.samples.steps == [0, 150]


def test_interrupting_the_cell_that_waits_ends_the_run(
    pictures: Pictures, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest's own children may have been started with it ignored.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    seen: list[sdtune.api.Run] = []
    start = sdtune.api.Run.start
    monkeypatch.setattr(sdtune.api.Run, "start", lambda run, wait: seen.append(run) or start(run, wait))

    def interrupt() -> None:
        until(lambda: seen and seen[0].losses)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(InterruptedWait, match="the run out was ended and left no result"):
            long_run(pictures, settings, tmp_path)
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert seen[0].state == "cancelled"


def test_a_run_that_fails_says_why(pictures: Pictures, settings: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(BASE_MODEL, tmp_path / "model")
    weights = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100_000])
    given = settings | {"base_model": str(tmp_path / "model")}
    run = sdtune.train("dreambooth-lora", dataset=pictures(), output=tmp_path / "out", wait=False, show=False, **given)
    with pytest.raises(TrainingError, match="base_model") as caught:
        run.result()
    assert run.state == "failed"
    assert str(caught.value) in run.as_text()


def test_python_ends_its_runs_when_it_ends(pictures: Pictures, settings: dict[str, Any], tmp_path: Path) -> None:
    script = f"""
import sdtune, time
run = sdtune.train(
    "dreambooth-lora", dataset={str(pictures())!r}, output={str(tmp_path / "out")!r}, wait=False, show=False,
    **{settings | {"max_train_steps": 100_000, "num_samples": 0}!r},
)
while not run.losses:
    time.sleep(0.1)
print(run._job_id())
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(ran.stdout), 0)
