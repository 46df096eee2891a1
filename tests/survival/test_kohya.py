"""kohya's methods go on exactly, too: around the stand-in for sd-scripts, and around sd-scripts itself where one is."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdtune import events
from sdtune.methods.resuming import CHECKPOINTS
from sdtune.training.components.checkpoint_files import read_manifest, steps_in
from sdtune.training.kohya.process import FOLDER, PYTHON
from tests.survival.forks import Forks
from tests.survival.kohya_runs import KINDS, STEPS, lay_out, words_of
from tests.survival.runs import all_is_whole, result_of

FAKE = Path(__file__).parent.parent / "kohya" / "fake"
STAND_IN = {FOLDER: str(FAKE), PYTHON: sys.executable}
real = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER not in os.environ, reason=f"{FOLDER} names no copy of sd-scripts"),
    pytest.mark.timeout(3600),
]

Reached = Callable[[events.Event], bool]


class Runs:
    """Runs in ``folder``, each to its end or to a signal."""

    def __init__(self, forks: Forks, folder: Path, environment: dict[str, str]) -> None:
        self.forks, self.folder, self.environment = forks, folder, environment
        self.datasets = folder / "datasets"
        lay_out(self.datasets)

    def words(self, kind: str, name: str, *more: str, **settings: Any) -> list[str]:
        return words_of(kind, self.datasets, self.folder / name / "cat", *more, **settings)

    def train(
        self, words: list[str], when: Reached | None = None, number: int = signal.SIGTERM, **environment: str
    ) -> tuple[int, list[events.Event]]:
        """The exit code and what was told. Where the stand-in pauses, it is sent the signal then."""
        temporary, go = self.folder / "temporary", self.folder / "go"
        temporary.mkdir(exist_ok=True)
        go.unlink(missing_ok=True)
        more = {"FAKE": "train", "FAKE_PAUSE": "0", "FAKE_GO": str(go), "TMPDIR": str(temporary)}
        training = self.forks.start(words, self.folder / "log", **{**self.environment, **more, **environment})
        if "FAKE_PAUSE" in environment:
            while not self.forks.has_answered(0.01):
                if training.log.exists() and "\npaused at step" in training.log.read_text(errors="replace"):
                    training.kill(number)
                    go.touch()
                    break
        code = training.kill_when(number, when) if when else self.forks.code()
        told = training.told()
        if code == -signal.SIGKILL:
            wait_until(lambda: not others_in(temporary))
        assert not others_in(temporary), "sd-scripts runs on"
        assert told, training.log.read_text()
        return code, told

    def result(self, name: str) -> dict[str, str]:
        return result_of(self.folder / name / "cat")


def others_in(folder: Path) -> list[str]:
    """The processes that were started with a file in ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words:
            found.append(words)
    return found


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)


def checkpoint_of(step: int) -> Reached:
    return lambda event: isinstance(event, events.Checkpoint) and event.step >= step


def step(number: int) -> Reached:
    return lambda event: isinstance(event, events.Step) and event.step >= number


def draws_after(number: int) -> Reached:
    return lambda event: isinstance(event, events.Phase) and event.text == f"Drawing samples after step {number}"


def newest_in(output: Path) -> int:
    """The step of the newest checkpoint; one that was being removed when the process was killed is none any more."""
    folder = output / CHECKPOINTS
    return next(step for step in steps_in(folder) if read_manifest(folder / f"step-{step:06d}"))


def notes(told: list[events.Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, events.Note)]


def measures(told: list[events.Event]) -> dict[int, float]:
    return {event.step: event.value for event in told if isinstance(event, events.Measure)}


def finished(told: list[events.Event]) -> events.Finished:
    assert isinstance(told[-1], events.Finished), told[-1]
    return told[-1]


def loses_the_same(told: list[events.Event], each: list[list[events.Event]]) -> None:
    """The end, the measures and the last told loss are the same; so are all the files, which others look at."""
    last = each[-1]
    assert (finished(told).loss, finished(told).change) == (finished(last).loss, finished(last).change)
    assert {at: value for events_of in each for at, value in measures(events_of).items()} == measures(told)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Forks(**STAND_IN) as forks:
        yield Runs(forks, tmp_path_factory.mktemp("kohya"), STAND_IN)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "stops", "settings"),
    [
        # In the middle of an epoch, and after the last step, before the result is saved.
        ("kohya-regularised", [(signal.SIGTERM, 5), (signal.SIGINT, STEPS)], {"checkpointing_steps": 0}),
        # Between two epochs, of three steps each, and in the middle of one.
        ("kohya-captioned", [(signal.SIGKILL, 5), (signal.SIGTERM, 9)], {}),
        ("kohya-cropped", [(signal.SIGKILL, 10)], {}),
    ],
)
def test_a_run_ends_as_if_nothing_had_been(
    kind: str, stops: list[tuple[int, int]], settings: dict[str, Any], stand_in: Runs
) -> None:
    goes_on_exactly(stand_in, kind, kind, stops, **settings)


@pytest.mark.timeout(900)
def test_two_processes_do(stand_in: Runs) -> None:
    stops: list[tuple[int, int]] = [(signal.SIGTERM, 4), (signal.SIGKILL, 9)]
    goes_on_exactly(stand_in, "kohya-captioned", "together", stops, "--processes=2")


def goes_on_exactly(
    stand_in: Runs, kind: str, name: str, stops: list[tuple[int, int]], *more: str, **settings: Any
) -> None:
    """stops: signals, and the steps after which they come."""
    code, told = stand_in.train(stand_in.words(kind, f"{name}-whole", *more))
    assert code == 0, told[-1]
    words, output = stand_in.words(kind, f"{name}-torn", *more, **settings), stand_in.folder / f"{name}-torn" / "cat"
    each = []
    for number, stop in stops:
        code, torn = stand_in.train(words, number=number, FAKE_PAUSE=str(stop))
        assert code == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[signal.Signals(number)], torn[-1]
        if number != signal.SIGKILL:
            all_is_whole(output)
        each.append(torn)
        newest = newest_in(output)
        assert 0 < newest < stop if number == signal.SIGKILL else newest == stop
    code, went_on = stand_in.train(words)
    assert code == 0, went_on[-1]
    assert f"Going on from the checkpoint of step {newest} of {STEPS}." in notes(went_on)
    assert all(event.step > newest for event in went_on if isinstance(event, events.Step))
    assert stand_in.result(f"{name}-torn") == stand_in.result(f"{name}-whole")
    loses_the_same(told, [*each, went_on])
    assert not (output / CHECKPOINTS).exists()
    assert (output / "README.md").read_text().count("samples/step-") == (
        stand_in.folder / f"{name}-whole" / "cat" / "README.md"
    ).read_text().count("samples/step-")


@pytest.mark.timeout(900)
def test_what_was_drawn_when_the_signal_came_is_drawn_again(stand_in: Runs) -> None:
    assert stand_in.train(stand_in.words("kohya-lion", "drawn-whole"))[0] == 0
    words, output = stand_in.words("kohya-lion", "drawn"), stand_in.folder / "drawn" / "cat"
    # The stand-in takes a minute to draw that.
    code, told = stand_in.train(words, draws_after(5), FAKE="draws")
    assert code == 143, told[-1]
    assert steps_in(output / CHECKPOINTS)[0] == 5
    assert not (output / "samples" / "step-000005").exists()
    assert stand_in.train(words)[0] == 0
    assert stand_in.result("drawn") == stand_in.result("drawn-whole")


@pytest.mark.timeout(900)
def test_a_damaged_checkpoint_another_recipe_and_more_steps(stand_in: Runs) -> None:
    constant = {"lr_scheduler": "constant", "keep_checkpoints": True, "num_samples": 0, "sample_every": 0}
    kind = "kohya-lion"
    assert stand_in.train(stand_in.words(kind, "longer", **constant, max_train_steps=STEPS + 6))[0] == 0
    words, output = stand_in.words(kind, "kept", **constant), stand_in.folder / "kept" / "cat"
    assert stand_in.train(words, number=signal.SIGKILL, FAKE_PAUSE="9")[0] == -signal.SIGKILL
    newest, before = steps_in(output / CHECKPOINTS)[:2]
    code, told = stand_in.train(stand_in.words(kind, "kept", **constant, network_dim=8))
    assert code == 2
    assert isinstance(told[-1], events.Failed)
    assert "network_dim: 4 then, 8 now" in told[-1].text
    for file in (output / CHECKPOINTS / f"step-{newest:06d}").glob("weights*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)
    code, told = stand_in.train(words)
    assert code == 0, told[-1]
    assert any(f"The checkpoint of step {newest} is damaged" in note for note in notes(told))
    assert f"Going on from the checkpoint of step {before} of {STEPS}." in notes(told)
    assert steps_in(output / CHECKPOINTS)[0] == STEPS
    code, told = stand_in.train(stand_in.words(kind, "kept", **constant, max_train_steps=STEPS + 6))
    assert code == 0, told[-1]
    assert f"Going on from the checkpoint of step {STEPS} of {STEPS + 6}." in notes(told)
    weights = [stand_in.result(name)["pytorch_lora_weights.safetensors"] for name in ("kept", "longer")]
    assert weights[0] == weights[1]


# --- sd-scripts itself ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def itself(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Forks() as forks:
        yield Runs(forks, tmp_path_factory.mktemp("kohya-itself"), {})


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=real) for kind in KINDS])
def test_sd_scripts_itself_goes_on_exactly(kind: str, itself: Runs) -> None:
    code, told = itself.train(itself.words(kind, f"{kind}-whole"))
    assert code == 0, told[-1]
    words, each = itself.words(kind, f"{kind}-torn"), []
    for number, when in ((signal.SIGKILL, checkpoint_of(2)), (signal.SIGTERM, step(7)), (signal.SIGTERM, step(11))):
        code, torn = itself.train(words, when, number)
        assert code in (143, -signal.SIGKILL), torn[-1]
        each.append(torn)
    code, went_on = itself.train(words)
    assert code == 0, went_on[-1]
    assert any("Going on from the checkpoint of step" in note for note in notes(went_on))
    assert itself.result(f"{kind}-torn") == itself.result(f"{kind}-whole")
    loses_the_same(told, [*each, went_on])
