"""The checkpoints of a run: what is left where writing fails, on a disk or in a bucket, and what processes agree on."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtune import events
from sdtune.errors import RecipeError, TrainingError
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.methods.resuming import Asked, name_of
from sdtune.training import checkpoints, interrupts
from sdtune.training.agreement import Agreed, Agreement
from sdtune.training.checkpoints import Checkpoints
from sdtune.training.components import checkpoint_store, store
from sdtune.training.components.checkpoint_files import DISK, Disk, damage, read_manifest, steps_in
from sdtune.training.components.checkpoint_state import read_state
from sdtune.training.components.checkpoint_store import CheckpointStore, Uploads
from sdtune.training.components.processes import ALL
from sdtune.training.destinations import Destinations, find_checkpoints
from sdtune.training.restarts import Beginning, find_beginning
from tests.servers.storage import StorageServer
from tests.survival.test_checkpoint_files import FaultyDisk

ADDRESS = "gs://pets/cat/checkpoints"
STEPS = 5


class Counting:
    """A training whose weights are the number of its steps."""

    def __init__(self) -> None:
        self.step = 0
        self.weights = torch.zeros(1000)

    def train(self) -> None:
        self.step += 1
        self.weights += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "weights": self.weights, "random": {"cpu": torch.get_rng_state()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.weights = state["step"], state["weights"]
        torch.set_rng_state(state["random"]["cpu"])


def a_method(**more: Any) -> DreamBoothLora:
    return DreamBoothLora.from_settings(
        {"instance_prompt": "a cat", "max_train_steps": STEPS, "checkpointing_steps": 1, **more}
    )


def begun(folder: Path, disk: Disk = DISK, goes_on: Any = None, **more: Any) -> Checkpoints:
    beginning = Beginning(Asked("/pictures"), goes_on)
    return Checkpoints(a_method(**more), beginning, folder, ALL, torch.device("cpu"), "no", disk)


def trained(checkpoints: Checkpoints, training: Counting | None = None) -> Counting:
    """To the end."""
    training = training or Counting()
    checkpoints.told = told_nothing
    with checkpoints:
        checkpoints.begin()
        checkpoints.restore(training)
        while training.step < STEPS:
            training.train()
            checkpoints.after(training)
    return training


def told_nothing() -> dict[str, Any]:
    return {"samples": {}, "measures": [], "seconds": 1.0}


@pytest.fixture(params=["in the background", "at once"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How checkpoints are written: while training goes on, or where memory has no room for a copy."""
    monkeypatch.setattr(checkpoints, "has_room", lambda *_: request.param == "in the background")
    return str(request.param)


def newest_good(folder: Path) -> int:
    """The step of the newest checkpoint, which must be what was written after it; 0 if there is none."""
    for step in steps_in(folder):
        manifest = read_manifest(folder / name_of(step))
        if manifest and damage(folder / name_of(step), manifest) is None:
            state = read_state(folder / name_of(step))
            assert (state["step"], state["weights"].unique().tolist()) == (step, [step])
            return step
    return 0


# --- a disk that fails ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
def test_a_disk_that_fails_at_any_call_loses_nothing(tmp_path: Path) -> None:
    counted = FaultyDisk(0)
    trained(begun(tmp_path / "counted", counted))
    ended, warned = set[str](), list[str]()
    for at in range(1, counted.calls + 1):
        folder, disk = tmp_path / str(at), FaultyDisk(at)
        told: list[events.Event] = []
        run = begun(folder, disk)
        run.tell = told.append
        try:
            trained(run)
        except TrainingError as error:
            told.append(events.Failed(error.kind, str(error)))
        said = [event.text for event in told if isinstance(event, events.Note | events.Failed)]
        failed = [int(step) for text in said for step in re.findall(r"that of step (\d+) cannot be written", text)]
        # All before the step whose checkpoint could not be written; what was told is there.
        reached = failed[0] - 1 if failed else STEPS
        assert newest_good(folder) == reached, at
        assert max((event.step for event in told if isinstance(event, events.Checkpoint)), default=0) == reached
        assert not list(folder.glob(".*"))
        ended |= {text for text in said if "cannot be written" in text}
        warned += [text for text in said if "Older checkpoints in" in text]
        # And another process goes on from there, on a disk that works.
        goes_on = read_manifest(folder / name_of(reached)) if reached else None
        assert trained(begun(folder, goes_on=goes_on)).weights.unique().tolist() == [STEPS]
        all_threads_have_ended()
    # Old ones made room for a new one; where there were none to remove, the run ended with a clear error.
    assert any("Make room there, or choose another --output; the same command goes on" in text for text in ended)
    assert warned


def all_threads_have_ended() -> None:
    """Those that write checkpoints; a thread needs a moment after its last word."""
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(30)
            assert not thread.is_alive()


class FullDisk(Disk):
    """Has room for so many checkpoints."""

    def __init__(self, room: int) -> None:
        self._room = room

    def rename(self, source: Path, target: Path) -> None:
        if len(steps_in(target.parent)) >= self._room:
            raise OSError(28, "No space left on device")
        super().rename(source, target)


def test_on_a_full_disk_older_ones_make_room(tmp_path: Path) -> None:
    trained(begun(tmp_path, FullDisk(3), checkpoints_total_limit=9))
    assert steps_in(tmp_path) == [5, 4, 3]


def test_and_where_they_cannot_the_newest_is_kept(tmp_path: Path) -> None:
    training = Counting()
    with pytest.raises(
        TrainingError, match=r"that of step 2 cannot be written to .*No space left.*that of step 1 is kept"
    ):
        trained(begun(tmp_path, FullDisk(1)), training)
    assert newest_good(tmp_path) == 1


def test_a_folder_that_may_only_be_read(tmp_path: Path) -> None:
    class ReadOnly(Disk):
        def make(self, folder: Path) -> None:
            raise OSError(30, "Read-only file system")

    with pytest.raises(TrainingError, match=r"Read-only file system\); there is none yet. Make room there, or choose"):
        trained(begun(tmp_path / "out", ReadOnly()))


def test_a_signal_is_obeyed_although_nothing_can_be_written(tmp_path: Path) -> None:
    told: list[events.Event] = []
    checkpoints = begun(tmp_path, FaultyDisk(2), checkpointing_steps=0)
    checkpoints.tell, checkpoints.told = told.append, lambda: {"samples": {}, "measures": [], "seconds": 1.0}
    training = Counting()
    before = signal.getsignal(signal.SIGTERM)
    interrupts.listen()
    try:
        with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012
            training.train()
            signal.raise_signal(signal.SIGTERM)
            checkpoints.after(training)
    finally:
        interrupts.listen()
        signal.signal(signal.SIGTERM, before)
    assert "cannot be written" in told[-1].text  # type: ignore[union-attr]


# --- a checkpoint of another run or version ---------------------------------------------------------------------------


def test_another_precision_is_refused(tmp_path: Path) -> None:
    trained(begun(tmp_path))
    goes_on = read_manifest(tmp_path / name_of(STEPS))
    with pytest.raises(RecipeError, match="mixed_precision: no then, bf16 now"):
        Checkpoints(a_method(), Beginning(Asked(), goes_on), tmp_path, ALL, torch.device("cpu"), "bf16")


def test_a_state_that_does_not_fit_is_told(tmp_path: Path) -> None:
    trained(begun(tmp_path))
    goes_on = read_manifest(tmp_path / name_of(STEPS))

    class Other(Counting):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("average")

    with pytest.raises(TrainingError, match=r"that of step 5 does not fit \(KeyError: 'average'\).* --overwrite"):
        begun(tmp_path, goes_on=goes_on).restore(Other())


def test_what_another_version_wrote_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "1.0")
    trained(begun(tmp_path))
    monkeypatch.undo()
    told: list[events.Event] = []
    checkpoints = begun(tmp_path, goes_on=read_manifest(tmp_path / name_of(STEPS)))
    checkpoints.tell = told.append
    checkpoints.restore(Counting())
    assert told[0] == events.Note("Going on from the checkpoint of step 5 of 5.")
    assert f"torch 1.0, now {torch.__version__}: the rest may come out different" in told[1].text  # type: ignore[union-attr]


# --- a bucket ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(storage: StorageServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageServer]:
    monkeypatch.setattr(store, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(checkpoint_store, "SECONDS_TO_RETRY", 0.2)
    storage.put("pets", "cat/mine.txt", b"mine")
    yield storage
    assert storage.buckets["pets"]["cat/mine.txt"].data == b"mine"


def uploaded(folder: Path, **more: Any) -> tuple[Checkpoints, list[str]]:
    """A run into a bucket, each of whose checkpoints has arrived before the next is written; what went wrong."""
    told: list[str] = []
    with Uploads(CheckpointStore(ADDRESS), folder, 2, told.append) as uploads:
        checkpoints = begun(folder, **more)
        checkpoints.uploads = uploads
        put = uploads.put

        def put_and_wait(step: int) -> None:
            put(step)
            uploads.drain()

        uploads.put = put_and_wait  # type: ignore[method-assign]
        trained(checkpoints)
    return checkpoints, told


def names(bucket: StorageServer) -> set[str]:
    return {name.removeprefix("cat/checkpoints/") for name in bucket.buckets["pets"] if "checkpoints/" in name}


def test_whole_objects_arrive_and_the_manifest_last(
    bucket: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[str] = []
    put = bucket.put
    monkeypatch.setattr(
        bucket, "put", lambda place, name, *rest, **more: (stored.append(name), put(place, name, *rest, **more))[1]
    )
    _, told = uploaded(tmp_path / "here")
    assert told == []
    for step in range(1, STEPS + 1):
        of_step = [name for name in stored if name_of(step) in name]
        assert of_step[-1].endswith("manifest.json")
        assert len(of_step) == 4
    kept = {f"{name_of(step)}/{name}" for step in (4, 5) for name in FILES}
    assert names(bucket) == kept


FILES = ("manifest.json", "random.safetensors", "state.json", "weights.safetensors")


def fetched(folder: Path) -> int:
    """The step that another machine would go on from, and it has what it needs."""
    found = find_beginning(a_method(), Asked("/pictures"), folder, Destinations(checkpoints=ADDRESS)).goes_on
    assert newest_good(folder / "checkpoints") == (found.step if found else 0)
    return found.step if found else 0


class FaultyBucket:
    """Fails at one request to the bucket."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.calls, self._at, self._lock = 0, at, threading.Lock()
        for name in ("upload", "delete", "files"):
            monkeypatch.setattr(store.Folder, name, self._failing(getattr(store.Folder, name)))

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **more: Any) -> Any:
            with self._lock:
                self.calls += 1
                fails = self.calls == self._at
            if fails:
                raise TrainingError("checkpoint: gs://pets cannot be written (503)")
            return call(*args, **more)

        return failing


def test_a_bucket_that_fails_at_any_call_loses_nothing(
    bucket: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        counted = FaultyBucket(patched, 0)
        uploaded(tmp_path / "counted")
    at = 0
    for at in range(3, counted.calls + 1):
        for name in [name for name in bucket.buckets["pets"] if "checkpoints/" in name]:
            del bucket.buckets["pets"][name]
        with monkeypatch.context() as patched:
            FaultyBucket(patched, at)
            _, told = uploaded(tmp_path / f"{at}")
        # The run has not been disturbed, and its user is told.
        assert newest_good(tmp_path / f"{at}") == STEPS
        assert len(told) == 1
        assert "could not be uploaded" in told[0]
        # What is not there is the last at most, if it was its turn.
        assert fetched(tmp_path / f"elsewhere-{at}") >= STEPS - 1, at
    assert at > 20


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damaged", [b"", b"something else"])
def test_a_damaged_object_falls_back_to_the_one_before(
    bucket: StorageServer, tmp_path: Path, name: str, damaged: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    uploaded(tmp_path / "here")
    bucket.put("pets", f"cat/checkpoints/{name_of(STEPS)}/{name}", damaged)
    assert fetched(tmp_path / "elsewhere") == STEPS - 1
    assert f"The checkpoint of step {STEPS} " in capsys.readouterr().out
    del bucket.buckets["pets"][f"cat/checkpoints/{name_of(STEPS - 1)}/{name}"]
    assert fetched(tmp_path / "nowhere") == 0


def test_a_slow_upload_is_overtaken_by_the_newest(bucket: StorageServer, tmp_path: Path) -> None:
    with Uploads(CheckpointStore(ADDRESS), tmp_path, 2, lambda text: pytest.fail(text)) as uploads:
        go = threading.Event()
        upload = uploads._store.upload
        seen: list[int] = []

        def slow(step: int, folder: Path, stop: threading.Event) -> None:
            seen.append(step)
            assert go.wait(30)
            upload(step, folder, stop)

        uploads._store.upload = slow  # type: ignore[method-assign]
        checkpoints = begun(tmp_path, checkpoints_total_limit=1)
        checkpoints.uploads = uploads
        trained(checkpoints)
        # What is being read stays until it has been, whatever the limit.
        assert steps_in(tmp_path) == [5, 1]
        go.set()
        uploads.drain()
        assert seen == [1, 5]
        assert {name.partition("/")[0] for name in names(bucket)} == {name_of(1), name_of(5)}
        checkpoints.finish()
    assert names(bucket) == set()
    assert not tmp_path.exists()


def test_what_is_kept_is_in_the_bucket_when_the_run_has_finished(bucket: StorageServer, tmp_path: Path) -> None:
    with Uploads(CheckpointStore(ADDRESS), tmp_path, 2, lambda text: pytest.fail(text)) as uploads:
        checkpoints = begun(tmp_path, keep_checkpoints=True)
        checkpoints.uploads = uploads
        trained(checkpoints)
        checkpoints.finish()
        assert fetched(tmp_path / "elsewhere") == STEPS


@pytest.mark.parametrize(
    ("output", "named", "environment", "where"),
    [
        ("gs://my-bucket/cat", True, {}, "gs://my-bucket/cat/checkpoints"),
        (
            "gs://my-bucket/cat",
            True,
            {"AIP_CHECKPOINT_DIR": "gs://my-bucket/job/checkpoints/"},
            "gs://my-bucket/cat/checkpoints",
        ),
        (
            "gs://my-bucket/job/model",
            False,
            {"AIP_CHECKPOINT_DIR": "gs://my-bucket/job/checkpoints/"},
            "gs://my-bucket/job/checkpoints",
        ),
        ("gs://my-bucket/job/model", False, {}, "gs://my-bucket/job/model/checkpoints"),
        ("/out/cat", True, {"AIP_CHECKPOINT_DIR": "gs://my-bucket/job/checkpoints/"}, None),
    ],
)
def test_where_checkpoints_go(output: str, named: bool, environment: dict[str, str], where: str | None) -> None:
    assert find_checkpoints(output, named, environment) == where


# --- what processes agree on ------------------------------------------------------------------------------------------


def together(
    processes: int, wishes: Callable[[int, int], tuple[bool, bool]], steps: int
) -> list[list[tuple[int, Agreed]]]:
    """What each of so many processes was told to do, as threads that meet as processes do."""
    barrier = threading.Barrier(processes)
    given: list[torch.Tensor] = [torch.empty(0)] * processes
    found: list[list[tuple[int, Agreed]]] = [[] for _ in range(processes)]

    def run(number: int) -> None:
        def exchange(wanted: torch.Tensor) -> torch.Tensor:
            given[number] = wanted
            barrier.wait(30)
            most = torch.stack(given).max(dim=0).values
            barrier.wait(30)
            return most

        agreement = Agreement(number == 0, processes, torch.device("cpu"), exchange)
        for step in range(1, steps + 1):
            save, stop = wishes(number, step)
            agreed = agreement.after(step, save=save, stop=stop, ask=step == steps)
            if agreed:
                found[number].append((step, agreed))
                if agreed.stop:
                    return

    threads = [threading.Thread(target=run, args=(number,)) for number in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def test_all_stop_after_the_same_step_whoever_was_told_first() -> None:
    # Signals reach them after different steps.
    found = together(3, lambda number, step: (False, step >= (400, 90, 700)[number]), 5000)
    assert found[0] == found[1] == found[2]
    ((step, agreed),) = found[0]
    assert agreed == Agreed(save=False, stop=True)
    assert 90 <= step <= 90 + 1000


def test_the_first_alone_decides_when_to_save_by_the_clock() -> None:
    found = together(2, lambda number, step: (number == 0 and step == 1, False), 40)
    assert found[0] == found[1] == [(1, Agreed(save=True, stop=False))]
    assert together(2, lambda number, step: (number == 1, False), 40) == [[], []]


def test_one_alone_asks_nobody() -> None:
    agreement = Agreement(True, 1, torch.device("cpu"), lambda wanted: pytest.fail("asked"))
    assert agreement.after(1, save=False, stop=False) is None
    assert agreement.after(2, save=True, stop=False) == Agreed(save=True, stop=False)
    assert agreement.after(3, save=False, stop=True) == Agreed(save=False, stop=True)
