"""benchmarks/train_speed.py: what it starts, what it sees of it, what it makes of that. Speed itself is for a GPU."""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from random_pictures import make_pictures
from speed_process import Card, Seen, read_curve, watch
from speed_table import job_seconds, markdown, seconds_per_step
from speed_work import WORKS, Command, Diffusers, Kohya, Places, Sdtune, Work, git_blob, on_gpus
from torch.utils.tensorboard import SummaryWriter
from train_speed import main, noted, parse, trainers

from sdtune import events
from sdtune.methods.catalog import find_method
from tests.conftest import BASE_MODEL

LORA_1, LORA_4, FULL_4 = WORKS[0], WORKS[1], WORKS[2]
WARM_UP = 20
EXAMPLES = os.environ.get("SDTUNE_DIFFUSERS_EXAMPLES")


# --- what is started -------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> Places:
    base = tmp_path / "for-sd-scripts"
    base.mkdir()
    (base / "base.json").write_text(json.dumps({"model": "/models/base", "tokenizers": "/models/tokenizers"}))
    return Places(BASE_MODEL, tmp_path / "pictures", tmp_path / "kohya", base, tmp_path / "out")


def options_of(command: Command) -> dict[str, str]:
    pairs = (word.removeprefix("--").partition("=") for word in command.words if word.startswith("--"))
    return {name: value for name, _, value in pairs}


@pytest.mark.parametrize("work", [*WORKS, *on_gpus(4)], ids=lambda work: work.name)
def test_sdtune_is_asked_for_the_same_as_its_peers(work: Work, places: Places) -> None:
    ours = Sdtune().command(work, places, WARM_UP)
    given = options_of(ours)
    method = find_method(ours.words[ours.words.index("train") + 1]).from_args([f"--recipe={given['recipe']}"])
    assert given["processes"] == str(work.gpus)
    assert given["dataset"] == str(places.pictures)
    assert method.max_train_steps == ours.steps == WARM_UP + work.ours
    assert method.num_samples == 0
    assert not method.gradient_checkpointing
    # One that is ended after its last step must not write gigabytes first.
    assert method.checkpointing == work.whole
    for peer in (Diffusers(Path("/examples")), Kohya(Path("/sd-scripts"), "python3")):
        if not peer.script(work):
            continue
        theirs = options_of(peer.command(work, places, WARM_UP))
        for name in ("resolution", "train_batch_size", "mixed_precision", "lr_scheduler"):
            assert theirs[name] == str(getattr(method, name))
        assert float(theirs["learning_rate"]) == method.learning_rate
        assert int(theirs["max_train_steps"]) == WARM_UP + work.theirs
        if not work.whole_model:
            assert theirs.get("rank", theirs.get("network_dim")) == str(method.rank)


def test_each_work_has_its_script() -> None:
    def names(peer: Diffusers | Kohya) -> dict[str, str]:
        return {work.name: script.name for work in WORKS if (script := peer.script(work))}

    assert names(Diffusers(Path("examples"))) == {
        "lora-1": "train_dreambooth_lora.py", "lora-4": "train_dreambooth_lora.py", "full-4": "train_dreambooth.py",
        "sdxl-1": "train_dreambooth_lora_sdxl.py", "lora-16": "train_dreambooth_lora.py",
        "sdxl-4": "train_dreambooth_lora_sdxl.py",
    }  # fmt: skip
    assert "full-4" not in names(Kohya(Path("sd-scripts"), "python3"))


def test_peers_are_those_whose_scripts_are_given(tmp_path: Path) -> None:
    (tmp_path / "dreambooth").mkdir()
    (tmp_path / "dreambooth" / "train_dreambooth_lora.py").touch()

    def names(work: Work, *words: str) -> list[str]:
        return [trainer.name for trainer in trainers(parse(list(words)), work)]

    given = ["--diffusers-examples", str(tmp_path)]
    assert names(LORA_1) == ["sdtune"]
    assert names(LORA_1, *given) == ["diffusers", "sdtune"]
    assert names(LORA_1, *given, "--peers", "none") == ["sdtune"]
    assert names(on_gpus(2)[0], *given) == ["sdtune"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "lora-2"], "no row lora-2; there are lora-1, lora-4"),
        (["--only", "gpus-2"], "no row gpus-2"),
        (["--diffusers-examples", "nowhere"], "nowhere has no dreambooth/train_dreambooth_lora.py"),
    ],
)
def test_what_is_not_there_is_told_before_anything_runs(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(words)
    assert told in capsys.readouterr().err


def test_gpus_double() -> None:
    assert [work.gpus for work in on_gpus(5)] == [2, 4]
    assert on_gpus(1) == []


def test_a_round_of_pictures_is_five_full_batches(tmp_path: Path) -> None:
    make_pictures(tmp_path / "made", 5, copies=4)
    files = sorted((tmp_path / "made").iterdir())
    assert len(files) == 20
    assert len({file.read_bytes() for file in files}) == 5
    assert Image.open(files[0]).size == (1024, 1024)


def test_a_script_is_known_by_its_name_in_git(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_bytes(b"hello\n")
    assert git_blob(tmp_path / "script.py") == "ce013625030ba8dba906f756967f9e9ca394464a"


# --- what is seen ----------------------------------------------------------------------------------------------------


def started(tmp_path: Path, code: str, curve: str | None = None, *, whole: bool = False, seconds: float = 120) -> Seen:
    """What is seen of a trainer of ten steps with this code, in whose folder a stand-in for torch lies."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("from torch import cuda\n")
    (tmp_path / "torch" / "cuda.py").write_text(
        "is_initialized = lambda: True\n"
        "device_count = lambda: 2\n"
        "max_memory_allocated = lambda gpu: (gpu + 1) * 2**30\n"
        "max_memory_reserved = lambda gpu: (gpu + 1) * 2**31\n"
    )
    output = tmp_path / "out"
    output.mkdir()
    path = os.pathsep.join([str(tmp_path), str(Path(events.__file__).parents[1])])
    words = [sys.executable, "-c", textwrap.dedent(code), str(output)]
    command = Command(words, {"PYTHONPATH": path}, 10, curve, "*.safetensors", tmp_path)
    with Card(1) as card:
        until = time.monotonic() + seconds
        return watch(command, output, tmp_path / "trainer.log", card, 1, until, whole=whole)


STEPS = """
    import sys, time, pathlib, torch
    from sdtune import events
    for step in range(2, 11, 2):
        sys.stderr.write(f"a bar that does not end its line {step}")
        events.emit(events.Step(step, 10, 0.5, 1e-4, 1.0, 1.0))
        time.sleep(0.01)
"""


def test_a_trainer_ends_when_its_steps_are_done_and_tells_its_memory(tmp_path: Path) -> None:
    # It is asked twice a second: the last step comes when it has been.
    told = 'while not pathlib.Path("trainer.memory").exists(): time.sleep(0.1)'
    seen = started(
        tmp_path, STEPS.replace("time.sleep(0.01)", f"step == 8 and exec({told!r})") + "    time.sleep(600)\n"
    )
    assert seen.stopped == "measured"
    assert seen.failed is None
    assert [step for step, _ in seen.points] == [2, 4, 6, 8, 10]
    assert [at for _, at in seen.points] == sorted(at for _, at in seen.points)
    assert 0 < seen.points[0][1] < seen.seconds < 300
    assert (seen.allocated, seen.reserved) == (2.0, 4.0)
    assert seen.on_disk is None


def test_a_whole_job_goes_to_its_end(tmp_path: Path) -> None:
    seen = started(tmp_path, STEPS + "    pathlib.Path(sys.argv[1], 'lora.safetensors').touch()\n", whole=True)
    assert (seen.stopped, seen.failed) == (None, None)
    assert seen.on_disk is not None
    assert seen.points[-1][1] <= seen.on_disk + 0.1
    assert seen.on_disk <= seen.seconds + 0.1


def test_why_a_trainer_failed_is_kept(tmp_path: Path) -> None:
    seen = started(tmp_path, "raise SystemExit('no such model')")
    assert seen.failed == "exit code 1: no such model\n"


def test_sdtune_says_itself_why(tmp_path: Path) -> None:
    code = "from sdtune import events; events.emit(events.Failed('training', 'the loss was nan')); raise SystemExit(5)"
    assert started(tmp_path, code).failed == "exit code 5: the loss was nan"


def test_nothing_runs_longer_than_it_may(tmp_path: Path) -> None:
    seen = started(tmp_path, "import time; time.sleep(600)", seconds=1)
    assert seen.stopped == "time"
    assert seen.failed is None
    assert seen.seconds < 300


def test_what_a_trainer_started_ends_with_it(tmp_path: Path) -> None:
    code = """
        import subprocess, sys, pathlib
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
    """
    started(tmp_path, code)
    status = Path("/proc", (tmp_path / "out" / "child").read_text(), "stat")
    until = time.monotonic() + 60
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)


def test_memory_is_what_a_trainer_took_beyond_what_was_taken_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for nvidia-smi that says of two GPUs what two files say."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(
        "#!/bin/sh\n"
        'case "$*" in *name,driver_version*) echo "NVIDIA H100 80GB HBM3, 580.159.04"; exit;; esac\n'
        f'while cat "{tmp_path}/used"; do sleep 0.05; done\n'
    )
    smi.chmod(0o755)

    def used(first: int, second: int) -> None:
        (tmp_path / "part").write_text(f"0, {first}\n1, {second}\n")
        (tmp_path / "part").rename(tmp_path / "used")

    used(512, 1024)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with Card(2) as card:
        assert card.name == "NVIDIA H100 80GB HBM3, 580.159.04"
        assert card.before == 1.0
        used(3072, 5120)
        until = time.monotonic() + 60
        while card.peak() != 4.0:
            assert time.monotonic() < until
            time.sleep(0.02)
        used(512, 1024)
        card.forget()
        while card.peak() is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert card.peak() == 0.0


def test_peers_are_timed_by_the_curve_of_their_loss(tmp_path: Path) -> None:
    for folder, steps in (("logs/a", 2), ("logs/b", 4)):
        with SummaryWriter(tmp_path / folder) as writer:
            for step in range(1, steps + 1):
                writer.add_scalar("loss", 0.5, step, walltime=1000.0 + step / 4)
    assert read_curve(tmp_path, "loss", 1000.0) == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert read_curve(tmp_path, "loss/current", 1000.0) == []


# --- what is made of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "pace"),
    [
        ([(step, 10 + step / 4) for step in range(1, 61)], 0.25),
        # Reports come when they come: only what lies between the first and the last counts.
        ([(3, 5.0), (19, 9.0), (41, 10.0), (83, 11.0), (141, 12.0)], 0.02),
        ([(3, 5.0), (19, 9.0), (41, 10.0)], None),
        ([], None),
    ],
)
def test_pace(points: list[tuple[int, float]], pace: float | None) -> None:
    assert seconds_per_step(points, WARM_UP) == pytest.approx(pace)


def run(work: Work, trainer: Any, pace: float, **seen: Any) -> dict[str, Any]:
    """A run as the JSON has it, at a steady pace."""
    steps = WARM_UP + (work.ours if trainer.name == "sdtune" else work.theirs)
    points = [(step, 20 + pace * step) for step in range(1, steps + 1)]
    command = Command(["python", "train.py"], {}, steps, None, "")
    return noted(trainer, work, command, Seen(points=points, **seen), WARM_UP)


class Peer:
    """diffusers, without its scripts on this disk."""

    name = "diffusers"

    def script(self, work: Work) -> None:
        return None


def report(*runs: dict[str, Any]) -> dict[str, Any]:
    told = {
        "date": "2026-11-26", "machine": "NVIDIA H100", "cores": 16, "versions": {"torch": "2.11.0"},
        "warm_up": WARM_UP, "tiny": False, "model_seconds": {}, "runs": list(runs),
    }  # fmt: skip
    # As it comes back from the file.
    return dict(json.loads(json.dumps(told)))


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"][2:]


def test_the_table_compares() -> None:
    peer = run(LORA_4, Peer(), 0.25, stopped="measured", allocated=8.0, driver=10.0)
    ours = run(LORA_4, Sdtune(), 0.05, stopped="measured", allocated=4.0, driver=7.5)
    several = run(on_gpus(2)[0], Sdtune(), 0.0625, stopped="measured", allocated=4.0, driver=7.5)
    first, second, third = cells(markdown(report(peer, ours, several)))
    title = "SD 1.5 LoRA, 512 px, batch 4"
    assert first == [title, "diffusers", "0.2500 s/step", "16.0", "2.9%", "8.0", "10.0", "", "", ""]
    assert second == [
        title, "sdtune", "0.0500 s/step", "80.0", "14.4%", "4.0", "7.5",
        "5.00 × diffusers", "0.50 × diffusers", "0.75 × diffusers",
    ]  # fmt: skip
    assert third[:5] == [f"{title} on each of 2 GPUs", "sdtune", "0.0625 s/step", "128.0", "11.5%"]
    assert third[7] == "1.60 × one GPU"


def test_ours_stands_below_its_peer_also_where_it_ran_first() -> None:
    peer, ours = run(FULL_4, Peer(), 0.25), run(FULL_4, Sdtune(), 0.1)
    assert [row[1] for row in cells(markdown(report(ours, peer)))] == ["diffusers", "sdtune"]
    # How much arithmetic a step takes is known of LoRA alone.
    assert {row[4] for row in cells(markdown(report(ours, peer)))} == {""}


def test_a_job_that_was_not_run_to_its_length_says_so() -> None:
    # 80 of its steps at a quarter of a second are 20 of these seconds; 500 are 125.
    peer = run(LORA_1, Peer(), 0.25, seconds=52.0, on_disk=45.0)
    ours = run(LORA_1, Sdtune(), 0.02, seconds=31.0, on_disk=30.0)
    assert job_seconds(peer, 500, "seconds") == pytest.approx(157.0)
    assert job_seconds(ours, 500, "seconds") == 31.0
    told = {(row[0], row[1]): (row[2], row[7]) for row in cells(markdown(report(peer, ours)))[2:]}
    assert told == {
        ("the same, 500 steps, until the LoRA is on disk", "diffusers"): ("150.0 s (of 80 steps)", ""),
        ("the same, 500 steps, until the LoRA is on disk", "sdtune"): ("30.0 s", "5.00 × diffusers"),
        ("the same, 500 steps, until the process ends", "diffusers"): ("157.0 s (of 80 steps)", ""),
        ("the same, 500 steps, until the process ends", "sdtune"): ("31.0 s", "5.06 × diffusers"),
    }


@pytest.mark.parametrize("seen", [{"stopped": "time"}, {"failed": "exit code 1: out of memory"}, {"on_disk": None}])
def test_a_job_that_did_not_end_has_no_length(seen: dict[str, Any]) -> None:
    told = run(LORA_1, Sdtune(), 0.02, **{"seconds": 31.0, "on_disk": 30.0, **seen})
    assert job_seconds(told, 500, "on_disk") is None


def test_what_failed_is_in_the_table_and_compares_with_nothing() -> None:
    peer = run(LORA_4, Peer(), 0.25, failed="exit code 1: Traceback\n  ...\ntorch.OutOfMemoryError: no more\n")
    table = markdown(report(peer, run(LORA_4, Sdtune(), 0.05, stopped="measured")))
    first, second = cells(table)
    assert first[2] == "failed"
    assert second[7] == ""
    assert table.endswith("SD 1.5 LoRA, 512 px, batch 4, diffusers: torch.OutOfMemoryError: no more")


def test_a_run_that_was_cut_off_early_is_not_a_failure() -> None:
    cut = noted(Sdtune(), LORA_4, Command([], {}, 220, None, ""), Seen(points=[(3, 9.0)], stopped="time"), WARM_UP)
    assert cut["failed"] is None
    assert cells(markdown(report(cut)))[0][2] == "out of time"


@pytest.mark.parametrize("stopped", ["measured", None])
def test_a_run_that_told_too_little_is_a_failure(stopped: str | None) -> None:
    seen = Seen(points=[(3, 9.0), (22, 10.0)], stopped=stopped)
    told = noted(Sdtune(), replace(LORA_4, ours=2), Command([], {}, 22, None, ""), seen, WARM_UP)
    assert told["failed"] == "told only 2 points; wanted two after 20 steps of warm-up: give more --steps"


def test_the_json_has_what_the_figures_were_made_of() -> None:
    told = run(replace(LORA_4, ours=2), Sdtune(), 0.05)
    assert len(told["points"]) == WARM_UP + 2
    assert told["command"] == shlex.join(["python", "train.py"])
    assert asdict(LORA_4).keys() < told.keys()


# --- all of it, on a CPU ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ours_on_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--only", "lora-1", "--json", str(tmp_path / "speed.json")]) == 0
    told = json.loads((tmp_path / "speed.json").read_text())
    assert [one["trainer"] for one in told["runs"]] == ["sdtune"]
    assert told["runs"][0]["on_disk"] > told["runs"][0]["points"][-1][1]
    assert "until the LoRA is on disk" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not EXAMPLES, reason="SDTUNE_DIFFUSERS_EXAMPLES names no examples/ of diffusers")
def test_every_row_beside_diffusers(tmp_path: Path) -> None:
    """Wants torchvision in this Python, as its scripts do."""
    file = tmp_path / "speed.json"
    assert main(["--tiny", "--diffusers-examples", str(EXAMPLES), "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert len(told["runs"]) == 2 * len(WORKS)
    assert all(one["images_per_second"] > 0 for one in told["runs"])
