"""--torch-compile: the same losses as without, and what becomes of what was compiled.

Most runs here are compiled by ``aot_eager``, which traces and cuts as inductor does, and calls torch's own operators.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from diffusers.models.resnet import ResnetBlock2D

from sdtune import events
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components import compiled
from sdtune.training.components.compiled_code import FOLDER, INDUCTOR_FOLDER, CompiledCode, key, missed
from sdtune.training.components.models import load_parts
from sdtune.training.outbox import Outbox
from sdtune.training.run import Run
from tests.servers.storage import StorageServer
from tests.training.conftest import EntryPoint

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor writes C++ for a CPU: needs g++")
STEPS = 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where sdtune notes what it has written; and torch's threads stay in this process."""
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "sdtune-cache"))
    # As torch sets it when it is asked to compile.
    monkeypatch.setenv(INDUCTOR_FOLDER, str(tmp_path / "left"))
    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


@pytest.fixture
def words(settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a small run."""
    dataset = pictures(3, name="dataset")

    def make(output: str | Path = tmp_path / "out", method: str = "dreambooth-lora", **more: Any) -> list[str]:
        without = {"rank"} if method == "dreambooth" else set()
        recipe = {**settings, "max_train_steps": STEPS, "num_samples": 0, **more}
        recipe = {name: value for name, value in recipe.items() if name not in without}
        return [
            "train", method, f"--dataset={dataset}", f"--output={output}", "--processes=1",
            f"--recipe={json.dumps(recipe)}",
        ]  # fmt: skip

    return make


def phases(told: Sequence[events.Event]) -> list[str]:
    return [event.name for event in told if isinstance(event, events.Phase)]


def warnings(told: Sequence[events.Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, events.Note) and event.level == "warning"]


def finished(told: Sequence[events.Event]) -> events.Finished:
    return next(event for event in told if isinstance(event, events.Finished))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("dreambooth-lora", {"gradient_checkpointing": True, "conv_rank": 2, "train_text_encoder": True}),
        ("dreambooth-lora", {"mixed_precision": "bf16"}),
        ("dreambooth", {"learning_rate": 1e-4}),
        ("peft-dreambooth-lora", {"adapter": "loha"}),
    ],
)
@pytest.mark.usefixtures("traced")
def test_losses_are_those_of_a_run_without(
    entry_point: EntryPoint, words: Callable[..., list[str]], tmp_path: Path, method: str, more: dict[str, Any]
) -> None:
    code, plain, _ = entry_point(words(tmp_path / "plain", method, **more))
    assert code == 0
    code, told, _ = entry_point(words(tmp_path / "compiled", method, torch_compile=True, **more))
    assert code == 0
    assert not warnings(told)
    assert phases(told)[phases(told).index("train") :][:3] == ["train", "compile", "train"]
    tolerance = 2e-3 if more.get("mixed_precision") == "bf16" else 1e-5
    assert finished(told).loss == pytest.approx(finished(plain).loss, rel=tolerance)
    assert finished(told).change == pytest.approx(finished(plain).change, rel=0.1)


@pytest.mark.usefixtures("traced")
def test_blocks_are_compiled_where_they_are_trained_alone(method: DreamBoothLora, run: Run) -> None:
    parts = load_parts(method.model_copy(update={"torch_compile": True}), run)
    calls: list[int] = []
    for block in (module for module in parts.unet.modules() if type(module) in compiled.BLOCKS):
        block.forward._compiled = lambda block, *args, **kwargs: (
            calls.append(1) or type(block).forward(block, *args, **kwargs)
        )
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 77, parts.unet.config.cross_attention_dim))
    parts.unet.eval()(*inputs)
    with torch.no_grad():
        parts.unet.train()(*inputs)
    assert not calls
    parts.unet(*inputs)
    assert len(calls) > 10


def test_without_it_nothing_of_it_is_there(
    entry_point: EntryPoint, words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "compile_blocks", lambda *_, **__: pytest.fail("called"))
    monkeypatch.setattr("sdtune.training.components.models.compile_blocks", lambda *_, **__: pytest.fail("called"))
    code, told, _ = entry_point(words())
    assert code == 0
    assert "compile" not in phases(told)
    assert not (tmp_path / "out" / "cache").exists()
    assert not (tmp_path / "sdtune-cache" / "compiled").exists()
    assert not (tmp_path / "left").exists()


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_what_cannot_be_compiled_is_trained_without(
    entry_point: EntryPoint,
    words: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passes: str,
) -> None:
    """And once is enough to say so: the losses are the same, bit for bit."""
    from torch._dynamo.backends.common import aot_autograd

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler today\nand more of it")

    def fine(graph: Any, _: Any) -> Any:
        return graph

    both = {"fw_compiler": fine, "bw_compiler": fine, f"{passes[0]}w_compiler": failing}
    monkeypatch.setattr(compiled, "BACKEND", aot_autograd(**both))
    _, plain, _ = entry_point(words(tmp_path / "plain"))
    code, told, _ = entry_point(words(tmp_path / "compiled", torch_compile=True))
    assert code == 0
    (warning,) = warnings(told)
    assert re.match(
        "torch_compile: the UNet cannot be compiled, so it computes as without: .*no compiler today", warning
    )
    assert "\n" not in warning
    assert phases(told)[-5:-1].count("compile") <= 1
    assert finished(told).loss == finished(plain).loss
    assert finished(told).change == finished(plain).change


@pytest.mark.usefixtures("traced")
def test_a_run_may_go_on_with_or_without_and_that_is_told(
    entry_point: EntryPoint, words: Callable[..., list[str]]
) -> None:
    code, _, _ = entry_point(words(checkpointing_steps=1, keep_checkpoints=True))
    assert code == 0
    code, told, _ = entry_point(words(checkpointing_steps=1, keep_checkpoints=True, torch_compile=True))
    assert code == 0
    assert phases(told) == []  # it has finished, and is the same run
    longer = {"checkpointing_steps": 1, "keep_checkpoints": True, "max_train_steps": STEPS + 1}
    code, told, _ = entry_point(words(**longer, torch_compile=True))
    assert code == 0
    (warning,) = warnings(told)
    assert warning.startswith("The checkpoint was written without --torch-compile and the run goes on with")
    assert "compile" in phases(told)


# --- what was compiled is kept ---------------------------------------------------------------------------------------


def compile_something(number: float = 1.0) -> torch.Tensor:
    """A graph of its own for each number."""
    weight = torch.ones(8, requires_grad=True)
    torch.compile(lambda x: (x * number).sin().sum(), dynamic=False)(weight).backward()
    assert weight.grad is not None
    return weight.grad


@needs_a_compiler
def test_what_was_compiled_is_found_by_the_next_run(
    method: DreamBoothLora, pictures: Callable[..., Path], tmp_path: Path
) -> None:
    dataset, output = pictures(3, name="dataset"), tmp_path / "out"
    with Run.open(method, dataset, output) as run:
        first = missed()
        code = CompiledCode(run)
        assert not code.found
        gradient = compile_something()
        assert missed() > first
        inside = Path(os.environ[INDUCTOR_FOLDER])
        assert any(inside.rglob("*.so"))
        code.keep()
    assert os.environ[INDUCTOR_FOLDER] == str(tmp_path / "left")
    assert not inside.exists()
    assert not (tmp_path / "left").exists()
    (kept,) = (output / FOLDER).iterdir()
    content = kept.read_bytes()

    with Run.open(method, dataset, output) as run:
        code = CompiledCode(run)
        assert code.found
        second = missed()
        assert compile_something().equal(gradient)
        assert missed() == second
        code.keep()
        assert kept.read_bytes() == content
        # What comes later does not cost what was there.
        compile_something(2.0)
        code.keep()
    with Run.open(method, dataset, output) as run:
        assert CompiledCode(run).found
        third = missed()
        compile_something()
        compile_something(2.0)
        assert missed() == third


class Trap:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a program was run",))


@pytest.mark.parametrize("content", [pickle.dumps(Trap()), b"", b"\0" * 100], ids=["trap", "empty", "zeros"])
def test_what_sdtune_has_not_written_here_is_not_looked_at(
    run: Run, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run.output / FOLDER / f"{key(run.device)}.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert not CompiledCode(run).found
    (event,) = filter(None, map(events.parse, capsys.readouterr().out.splitlines()))
    assert isinstance(event, events.Note)
    assert "was not written by sdtune on this machine, so it is not read" in event.text


def test_what_is_damaged_is_compiled_anew(run: Run, tmp_path: Path) -> None:
    file = run.output / FOLDER / f"{key(run.device)}.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\0" * 100)
    note = tmp_path / "sdtune-cache" / "compiled" / hashlib.sha256(b"\0" * 100).hexdigest()
    note.parent.mkdir(parents=True)
    note.touch()
    assert not CompiledCode(run).found


def test_another_gpu_or_another_torch_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 80GB HBM3/{device.type}")
    first = key(torch.device("cuda", 0))
    assert re.fullmatch(r"NVIDIA-H100-80GB-HBM3-cuda-0-torch-[\w.+-]+-[0-9a-f]{8}", first)
    assert key(torch.device("cuda", 0), 1) == key(torch.device("cuda", 1)) != first
    assert key(torch.device("cpu")) != first
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert key(torch.device("cuda", 0)) != first


def test_a_bucket_has_it_too_and_gives_it_back(storage: StorageServer, run: Run, tmp_path: Path) -> None:
    name = f"{FOLDER}/{key(run.device)}.bin"
    written = tmp_path / "written"
    (written / FOLDER).mkdir(parents=True)
    (written / name).write_bytes(b"code")
    storage.put("pets", "other", b"")
    with Outbox(written, "gs://pets/out") as outbox:
        outbox.finish()
    with Outbox(run.output, "gs://pets/out") as outbox:
        run.outbox = outbox
        CompiledCode(run)
        assert (run.output / name).read_bytes() == b"code"


@needs_a_compiler
@pytest.mark.slow
def test_a_job_that_is_started_again_does_not_compile_again(
    entry_point: EntryPoint, words: Callable[..., list[str]], storage: StorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By inductor, with C++ of its own."""
    monkeypatch.setattr(compiled, "BLOCKS", (ResnetBlock2D,))
    storage.put("pets", "other", b"")
    before = missed()
    code, told, _ = entry_point(words("gs://pets/out", torch_compile=True))
    assert code == 0
    assert not warnings(told)
    first = missed() - before
    assert first > 3
    again = [*words("gs://pets/out", torch_compile=True), "--overwrite=again"]
    code, told_again, _ = entry_point(again)
    assert code == 0
    assert missed() - before == first
    assert finished(told_again).loss == finished(told).loss
    text = next(event.text for event in told_again if isinstance(event, events.Phase) and event.name == "compile")
    assert "from what is kept in gs://pets/out/cache/torch" in text
    _, plain, _ = entry_point(words("gs://pets/plain"))
    assert finished(told).loss == pytest.approx(finished(plain).loss, rel=1e-4)
