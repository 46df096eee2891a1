"""How a run begins: where it was stopped, at the checkpoint before a damaged one, not at all, or with a refusal."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdtune import events
from sdtune.methods.resuming import CHECKPOINTS, MANIFEST
from sdtune.training import restarts
from sdtune.training.components.checkpoint_files import steps_in
from tests.survival.forks import Forks
from tests.survival.runs import KINDS, STEPS, all_is_whole, result_of, words_of

Train = Callable[..., tuple[int, list[events.Event]]]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


@pytest.fixture
def train(forks: Forks, tmp_path: Path) -> Train:
    """Trains to the end, or to a signal when a step is reached: exit code and events."""

    def run(
        words: list[str], stop_at: int | None = None, number: int = signal.SIGTERM
    ) -> tuple[int, list[events.Event]]:
        training = forks.start(words, tmp_path / "log")
        code = training.kill_when(number, lambda event: stop_at is not None and is_at(event, stop_at))
        return code, training.told()

    return run


@pytest.fixture(scope="module")
def stopped(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that was stopped, with checkpoints of steps 2 and 4, and no later one."""
    folder = tmp_path_factory.mktemp("stopped")
    training = forks.start(
        words_of("lora", folder / "out", checkpointing_steps=2, num_samples=0, sample_every=0), folder / "log"
    )
    training.kill_when(signal.SIGKILL, lambda event: isinstance(event, events.Checkpoint) and event.step == 4)
    steps = steps_in(folder / "out" / CHECKPOINTS)
    assert steps[:1] >= [4]
    return folder / "out"


@pytest.fixture
def output(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "out"))


def words(output: Path, *more: str, **settings: Any) -> list[str]:
    return words_of(
        "lora", output, *more, **{"checkpointing_steps": 2, "num_samples": 0, "sample_every": 0, **settings}
    )


@pytest.fixture(scope="module")
def undisturbed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    forks.start(words(folder / "out"), folder / "log")
    assert forks.code() == 0
    return result_of(folder / "out")


def is_at(event: events.Event, step: int) -> bool:
    return isinstance(event, events.Step) and event.step >= step


def notes(told: list[events.Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, events.Note)]


def error(told: list[events.Event]) -> str:
    assert isinstance(told[-1], events.Failed), told
    return told[-1].text


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_goes_on_as_if_nothing_had_been(kind: str, train: Train, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole" / "cat", tmp_path / "torn" / "cat"
    code, told = train(words_of(kind, whole))
    assert code == 0, told[-1]
    code, _ = train(words_of(kind, torn), stop_at=4)
    assert code == 143
    all_is_whole(torn)
    newest = steps_in(torn / CHECKPOINTS)[0]
    assert 4 <= newest < STEPS
    code, went_on = train(words_of(kind, torn))
    assert code == 0, went_on[-1]
    assert f"Going on from the checkpoint of step {newest} of {STEPS}." in notes(went_on)
    assert result_of(torn) == result_of(whole)
    # What was told at the end is the same as well, and the card knows what was measured and drawn before.
    (first,), (second,) = ([event for event in each if isinstance(event, events.Finished)] for each in (told, went_on))
    assert (first.loss, first.change, first.steps) == (second.loss, second.change, second.steps)
    assert [event for event in went_on if isinstance(event, events.Measure)][-1] == [
        event for event in told if isinstance(event, events.Measure)
    ][-1]
    assert (torn / "README.md").read_text().count("step-000000") == (whole / "README.md").read_text().count(
        "step-000000"
    )
    assert not (torn / CHECKPOINTS).exists()


# --- a checkpoint that cannot be used ---------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "how", "words_told"),
    [
        ("weights.safetensors", flip, "is damaged: the content of weights.safetensors is not what was written"),
        ("optimizer.safetensors", cut, "is damaged: optimizer.safetensors has"),
        ("random.safetensors", Path.unlink, "is not whole: random.safetensors is missing"),
        ("state.json", flip, "is damaged: the content of state.json"),
        (MANIFEST, cut, "has no manifest that is right"),
        (MANIFEST, Path.unlink, "has no manifest that is right"),
    ],
)
def test_the_one_before_is_taken(
    name: str, how: Callable[[Path], None], words_told: str, output: Path, train: Train, undisturbed: dict[str, str]
) -> None:
    newest, before = steps_in(output / CHECKPOINTS)[:2]
    how(output / CHECKPOINTS / f"step-{newest:06d}" / name)
    code, told = train(words(output))
    assert code == 0
    assert any(f"The checkpoint of step {newest} {words_told}" in note for note in notes(told)), notes(told)
    assert f"Going on from the checkpoint of step {before} of {STEPS}." in notes(told)
    assert result_of(output) == undisturbed


def test_where_none_is_whole_the_run_begins_anew(output: Path, train: Train, undisturbed: dict[str, str]) -> None:
    for step in steps_in(output / CHECKPOINTS):
        (output / CHECKPOINTS / f"step-{step:06d}" / "weights.safetensors").unlink()
    code, told = train(words(output))
    assert code == 0
    assert "No checkpoint is left that is whole, so the run begins anew." in notes(told)
    assert result_of(output) == undisturbed


# --- another run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"learning_rate": 2e-3}, "learning_rate: 0.001 then, 0.002 now"),
        ({"seed": 7}, "seed: 42 then, 7 now"),
        ({"max_train_steps": 2}, f"max_train_steps: {STEPS} then, 2 now"),
        ({"instance_prompt": "a photo of sks dog"}, "instance_prompt: a photo of sks cat then, a photo of sks dog now"),
    ],
)
def test_another_recipe_is_refused(more: dict[str, Any], line: str, output: Path, train: Train) -> None:
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    code, told = train(words(output, **more))
    assert code == 2
    assert f"  {line}\n" in error(told)
    assert "--overwrite to begin anew" in error(told)
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


def test_another_method_and_another_dataset_are(output: Path, train: Train, tmp_path: Path) -> None:
    other = words_of("peft-oft", output)
    assert train(other)[0] == 2
    assert "method: dreambooth-lora then, peft-dreambooth-lora now" in error(train(other)[1])
    pictures = Path(words(output)[2].removeprefix("--dataset="))
    same = shutil.copytree(pictures, tmp_path / "pictures")
    moved = [f"--dataset={same}" if word.startswith("--dataset=") else word for word in words(output)]
    assert f"  dataset: {pictures} then, {same} now\n" in error(train(moved)[1])


def test_pictures_that_have_changed_are(train: Train, tmp_path: Path) -> None:
    pictures = shutil.copytree(words(tmp_path)[2].removeprefix("--dataset="), tmp_path / "pictures")
    asked = words_of("lora", tmp_path / "out", dataset=str(pictures), num_samples=0, sample_every=0)
    assert train(asked, stop_at=3)[0] == 143
    next(Path(pictures).glob("*.jpg")).unlink()
    code, told = train(asked)
    assert code == 2
    assert "  dataset's files: 8 files of " in error(told)


@pytest.mark.parametrize(
    "more",
    [
        {"num_samples": 1, "sample_every": 3, "sample_prompt": ["a drawing of sks cat"], "sample_steps": 1},
        {"held_out_every": 2, "checkpointing_steps": 5, "checkpoints_total_limit": 1},
    ],
)
def test_what_changes_no_weight_may_change(
    more: dict[str, Any], output: Path, train: Train, undisturbed: dict[str, str]
) -> None:
    code, told = train(words(output, **more))
    assert code == 0
    assert any("Going on from" in note for note in notes(told))
    found = result_of(output)
    assert {name: found[name] for name in undisturbed if name.endswith(".safetensors")} == {
        name: digest for name, digest in undisturbed.items() if name.endswith(".safetensors")
    }


def test_overwrite_begins_anew_once(output: Path, train: Train) -> None:
    other = words(output, "--overwrite=first", seed=7)
    code, told = train(other, stop_at=4)
    assert code == 143
    assert not any("Going on from" in note for note in notes(told))
    # Its place starts the same job again: it goes on with what it has begun.
    code, told = train(other)
    assert code == 0
    assert any("Going on from" in note for note in notes(told))
    # And once more, when it had finished.
    code, told = train(other)
    assert code == 0
    assert any("holds this run already, and it has finished" in note for note in notes(told))
    # Whoever types it again, means it.
    code, told = train(words(output, "--overwrite=second", seed=7))
    assert code == 0
    assert any(isinstance(event, events.Step) and event.step <= 3 for event in told)


# --- a finished run ---------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so(train: Train, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, told = train(words(output))
    assert code == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    code, again = train(words(output))
    assert code == 0
    assert notes(again) == [f"{output} holds this run already, and it has finished; --overwrite trains it anew."]
    assert isinstance(again[-1], events.Finished)
    assert again[-1].loss == told[-1].loss  # type: ignore[union-attr]
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before

    code, told = train(words(output, learning_rate=5e-4))
    assert code == 2
    assert "holds a finished run with other settings:\n  learning_rate: 0.001 then, 0.0005 now\n" in error(told)
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


def test_one_that_kept_its_checkpoints_trains_on(train: Train, tmp_path: Path) -> None:
    short, long = tmp_path / "short" / "cat", tmp_path / "long" / "cat"
    assert train(words(short, keep_checkpoints=True, max_train_steps=5))[0] == 0
    assert steps_in(short / CHECKPOINTS) == [5, 4]
    code, told = train(words(short, max_train_steps=9))
    assert code == 0
    assert "Going on from the checkpoint of step 5 of 9." in notes(told)
    assert train(words(long, max_train_steps=9))[0] == 0
    assert result_of(short) == result_of(long)
    assert not (short / CHECKPOINTS).exists()


def test_what_a_stop_after_the_result_has_left_is_taken_away(train: Train, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert train(words(output, keep_checkpoints=True))[0] == 0
    assert steps_in(output / CHECKPOINTS)
    assert train(words(output))[0] == 0
    assert not (output / CHECKPOINTS).exists()


def test_a_result_that_could_not_be_written_is_written_later(
    train: Train, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    output = tmp_path / "out"
    obstacle = output / "out.safetensors" / "in the way"
    obstacle.mkdir(parents=True)
    code, told = train(words(output))
    assert code == 5
    assert steps_in(output / CHECKPOINTS)[0] == STEPS
    shutil.rmtree(obstacle.parent)
    code, told = train(words(output))
    assert code == 0
    # Nothing is trained again.
    assert not [event for event in told if isinstance(event, events.Step)]
    assert result_of(output) == undisturbed


# --- settings ---------------------------------------------------------------------------------------------------------


def test_checkpoints_by_the_clock(train: Train, tmp_path: Path) -> None:
    code, told = train(words(tmp_path / "out", checkpointing_steps=0, checkpointing_minutes=1e-6))
    assert code == 0
    saved = [event.step for event in told if isinstance(event, events.Checkpoint)]
    # The last was told if it was whole before the result was.
    assert saved[: STEPS - 1] == list(range(1, STEPS))


def test_none_at_all(train: Train, tmp_path: Path) -> None:
    plain = {"checkpointing_steps": 0, "checkpointing_minutes": 0}
    code, told = train(words(tmp_path / "out", **plain), stop_at=4)
    assert code == 143
    assert not [event for event in told if isinstance(event, events.Checkpoint)]
    assert not (tmp_path / "out" / CHECKPOINTS).exists()
    code, told = train(words(tmp_path / "out", **plain))
    assert code == 0
    assert not [event for event in told if isinstance(event, events.Checkpoint)]


@pytest.mark.parametrize("limit", [1, 3])
def test_so_many_are_kept(limit: int, train: Train, tmp_path: Path) -> None:
    code, _ = train(
        words(tmp_path / "out", checkpointing_steps=1, checkpoints_total_limit=limit, keep_checkpoints=True)
    )
    assert code == 0
    assert steps_in(tmp_path / "out" / CHECKPOINTS) == list(range(STEPS, STEPS - limit, -1))


def test_a_manifest_tells_what_it_is(output: Path) -> None:
    newest = steps_in(output / CHECKPOINTS)[0]
    said = json.loads((output / CHECKPOINTS / f"step-{newest:06d}" / MANIFEST).read_text())
    assert said["recipe"]["learning_rate"] == 1e-3
    assert said["beside"]["processes"] == 1
    assert said["told"]["measures"][0]["step"] == 0
    assert "hub_model_id" not in said["recipe"]


def test_what_a_dataset_consists_of(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "a.png").write_bytes(b"123")
    (tmp_path / "inside" / "b.png").write_bytes(b"4")
    first = restarts.files_of_dataset(tmp_path)
    assert first.startswith("2 files of 4 bytes (")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert restarts.files_of_dataset(tmp_path) == first
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    assert restarts.files_of_dataset(tmp_path) != first
