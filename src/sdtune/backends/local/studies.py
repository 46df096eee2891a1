"""A search on this machine: trials as processes, side by side, chosen by Optuna and kept in the output folder.

Its launcher drives it. Stopped, by Ctrl-C or by force, it goes on when it is submitted again with the same settings.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdtune.backends.local.backend import LocalBackend
from sdtune.backends.local.sampling import grid
from sdtune.backends.local.trial_process import Said, TrialProcess, end_orphan, job_of_trial
from sdtune.errors import JobError, ProjectError, RecipeError
from sdtune.jobs.backend import Submitted
from sdtune.jobs.study import TRIAL_VARIABLE, Study, StudyRecord
from sdtune.methods.base import HELD_OUT_LOSS, MARK
from sdtune.methods.places import in_bucket

if TYPE_CHECKING:
    from sdtune.backends.local.optuna_study import OptunaStudy

DATABASE, LOCK = "study.db", "study.lock"
LEAST_FAILURES = 3
"""Where the place is to decide how many trials may fail: half of them, but the first few alone prove nothing."""
TRIES_TO_LOCK = 5
SECONDS_TO_STOP = 60.0
SECONDS_BETWEEN_LOOKS = 1.0


class LocalStudies:
    """StudyBackend of this machine. A study is called by its output folder."""

    name: ClassVar[str] = "local"
    outlives: ClassVar[bool] = False

    def __init__(self) -> None:
        self._submitted: dict[str, _Driver] = {}
        self._driven: dict[str, _Driver] = {}

    def render(self, study: Study) -> dict[str, Any]:
        """The first trial's command; what is tuned follows it."""
        rendered = LocalBackend(offline=True).render(job_of_trial(study, {}))
        return {
            "storage": f"sqlite:///{Path(study.output) / DATABASE}",
            "parallel_trials": len(slots(study)),
            "command": rendered["command"],
            "environment": {**rendered["environment"], TRIAL_VARIABLE: "1"},
            "parameters": {one.name: one.words for one in study.space},
        }

    def as_text(self, rendered: dict[str, Any]) -> str:
        lines = [f"  {name}: {words}" for name, words in rendered["parameters"].items()]
        command = LocalBackend(offline=True).as_text(rendered)
        beside = f"  {rendered['parallel_trials']} at a time, kept in {rendered['storage']}"
        return "\n".join([command, "  and for each trial its own number, and values of", *lines, beside])

    def check(self, study: Study) -> list[str]:
        """Notes on what will be otherwise than asked. RecipeError, ProjectError: it cannot run here."""
        if in_bucket(study.output):
            raise RecipeError(
                f"output: {study.output} is in a bucket; a search on this machine is kept in a folder of its disk."
            )
        if missing := [name for name in ("optuna", "scipy") if importlib.util.find_spec(name) is None]:
            raise ProjectError(
                f"a search on this machine needs Optuna, and this Python does not have {' and '.join(missing)}; "
                "install it with: pip install 'sdtune[hpo]'"
            )
        from sdtune.backends.local.optuna_study import OptunaStudy, recipe_of

        recipe = recipe_of(study)
        at_end_alone = study.metric == HELD_OUT_LOSS and not 0 < recipe.held_out_every < recipe.max_train_steps
        if study.early_stopping != "none" and at_end_alone:
            raise RecipeError(
                f"early_stopping: {study.early_stopping} needs what trials report on their way, and with "
                f"held_out_every {recipe.held_out_every} they report at their end alone; give --held-out-every, such "
                f"as {max(1, recipe.max_train_steps // 20)}."
            )
        notes: list[str] = []
        if study.algorithm == "grid" and (points := len(grid(study.space, 0))) != study.max_trials:
            if points < study.max_trials:
                notes.append(f"The grid has {points} points, so there will be {points} trials.")
            else:
                notes.append(f"The grid has {points} points; {study.max_trials} of them are tried, spread over it.")
        if (places := len(slots(study))) < study.parallel_trials:
            gpus = "1 GPU" if places == 1 else f"{places} GPUs"
            notes.append(f"This machine has {gpus}, so {places} at a time, not {study.parallel_trials}.")
        if (Path(study.output) / DATABASE).is_file():
            earlier = OptunaStudy(Path(study.output))
            earlier.check_same(study)
            if ended := earlier.ended():
                notes.append(f"{study.output} holds this search already: it goes on after {ended} trials.")
        return notes

    def submit(self, study: Study) -> Submitted:
        """Take the folder and note the study down; its trials run while it is followed."""
        self.check(study)
        output = str(Path(study.output))
        self._submitted[output] = _Driver(study)
        return Submitted(output, output, "", "")

    def find(self, study: str) -> StudyRecord:
        folder = Path(study).expanduser().resolve()
        if not (folder / DATABASE).is_file():
            raise JobError(f"no search is kept in {folder}: no {DATABASE} there; wanted the output folder of one.")
        return _open(folder).record(is_locked(folder))

    def studies(self) -> Iterator[StudyRecord]:
        """Those in the folders here and below, newest first."""
        found = {
            file.parent.resolve() for pattern in ("", "*/", "*/*/") for file in Path.cwd().glob(pattern + DATABASE)
        }
        for folder in sorted(found, key=lambda folder: (folder / DATABASE).stat().st_mtime, reverse=True):
            with suppress(JobError):
                yield self.find(str(folder))

    def follow(self, study_id: str) -> Generator[StudyRecord, None, None]:
        driver = self._submitted.pop(str(Path(study_id)), None)
        if driver is not None:
            self._driven[str(Path(study_id))] = driver
            try:
                yield from driver.run()
            finally:
                del self._driven[str(Path(study_id))]
            return
        shown: StudyRecord | None = None
        while True:
            found = self.find(study_id)
            if found != shown:
                yield found
            if found.has_ended:
                return
            shown = found
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def cancel(self, study_id: str) -> None:
        folder = Path(study_id).expanduser().resolve()
        found = self.find(study_id)
        if found.has_ended:
            raise JobError(f"the search in {folder} is not running: {found.state}.")
        if driver := self._driven.get(str(folder)):
            # Another thread of this process follows it: a signal would end more than the search.
            driver.leave()
            return
        try:
            os.kill(int((folder / LOCK).read_text(encoding="ascii")), signal.SIGTERM)
        except (OSError, ValueError) as error:
            raise JobError(f"the search in {folder} cannot be stopped: {error}.") from None
        until = time.monotonic() + SECONDS_TO_STOP
        while is_locked(folder):
            if time.monotonic() > until:
                raise JobError(f"the search in {folder} does not stop; its launcher's number is in {folder / LOCK}.")
            time.sleep(0.05)
        # Those of a launcher that had no time to stop them.
        for pid, began in _open(folder).processes():
            end_orphan(pid, began)


class _Driver:
    """One study at work. The folder is its own from now on until it has run."""

    def __init__(self, study: Study) -> None:
        self._study = study
        folder = Path(study.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _take(folder)
        except OSError as error:
            raise RecipeError(f"output: {folder} cannot be written ({error}); choose another --output.") from None
        try:
            if not (folder / MARK).exists():
                (folder / MARK).write_text("The output of a search of sdtune.\n", encoding="utf-8")
            self._kept = _open(folder)
            self._kept.begin(study)
        except BaseException:
            os.close(self._lock)
            raise
        self._running: dict[str, tuple[TrialProcess, dict[str, str]]] = {}
        self._stopping: list[threading.Thread] = []
        self._said: queue.Queue[Said | None] = queue.Queue()

    def leave(self) -> None:
        """Let ``run``, which another thread is in, stop the trials and return; they are left to be run again."""
        self._said.put(None)

    def run(self) -> Generator[StudyRecord, None, None]:
        """Run the trials that are left; the study whenever something changed."""
        free = slots(self._study)
        try:
            yield self._record()
            while not (why := self._too_many_failed()):
                while free and (asked := self._kept.ask()):
                    place = free.pop(0)
                    try:
                        process = TrialProcess(self._study, asked.trial_id, asked.values, place, self._said.put)
                    except BaseException:
                        self._kept.leave(asked.trial_id)
                        raise
                    self._running[asked.trial_id] = (process, place)
                    self._kept.started(asked.trial_id, process.pid, process.identity)
                    yield self._record()
                if not self._running:
                    break
                said = self._said.get()
                if said is None:
                    return
                place = self._running[said.trial_id][1]
                self._hear(said)
                if said.ended:
                    free.append(place)
                yield self._record()
            self._stop_all()
            self._end(why)
            yield self._kept.record(is_running=False)
        finally:
            try:
                self._stop_all()
            finally:
                os.close(self._lock)

    def _record(self) -> StudyRecord:
        return self._kept.record(is_running=True)

    def _hear(self, said: Said) -> None:
        process, _ = self._running[said.trial_id]
        if self._kept.report(said.trial_id, process.measurements()) and not said.ended:
            # Not here: the process has some seconds to end, in which others may have something to say.
            stopping = threading.Thread(target=process.cancel)
            stopping.start()
            self._stopping.append(stopping)
        if said.ended:
            del self._running[said.trial_id]
            self._kept.end(said.trial_id, said.reason)

    def _too_many_failed(self) -> str:
        """Why the search gives up; empty if it does not."""
        failures = self._kept.failures()
        limit = self._study.max_failed_trials or max(LEAST_FAILURES, -(-self._study.max_trials // 2))
        if len(failures) < limit:
            return ""
        return (
            f"{len(failures)} trials failed; with max_failed_trials {self._study.max_failed_trials} the search ends at "
            f"{limit}. The last: {failures[-1]} Mend that and start it again with a larger --max-failed-trials."
        )

    def _end(self, why: str) -> None:
        if not why and not self._record().ranked:
            failures = self._kept.failures()
            why = f"no trial reported {self._study.metric}." + (f" The last: {failures[-1]}" if failures else "")
        self._kept.close("failed" if why else "succeeded", why)

    def _stop_all(self) -> None:
        """Every trial that runs, at once; they are left to be run again."""
        if self._running:
            with ThreadPoolExecutor(len(self._running)) as pool:
                for process, _ in self._running.values():
                    pool.submit(process.cancel)
        for stopping in self._stopping:
            stopping.join()
        # One may have ended by itself in the meantime.
        while not self._said.empty():
            said = self._said.get()
            if (
                said
                and said.trial_id in self._running
                and (not said.ended or not said.reason or self._kept.is_stopped_early(said.trial_id))
            ):
                self._hear(said)
        for trial_id in list(self._running):
            del self._running[trial_id]
            self._kept.leave(trial_id)


def slots(study: Study) -> list[dict[str, str]]:
    """The environment of each place where a trial can run: a GPU for each; without any, a share of the cores."""
    gpus = visible_gpus()
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[: study.parallel_trials]]
    threads = max(1, (os.cpu_count() or 1) // study.parallel_trials)
    # Else each takes all the cores, and they wait for each other.
    environment = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    return [dict(environment) for _ in range(study.parallel_trials)]


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them: those it allows already, or all that the driver lists."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
    return listed if allowed is None else [gpu.strip() for gpu in allowed.split(",") if gpu.strip()]


def is_locked(folder: Path) -> bool:
    """Whether a launcher is at work on the study there."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _take(folder: Path) -> int:
    """The lock of the folder, which the system takes back when this process is gone. JobError: another has it."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    # Who only looks has it for a moment.
    for _ in range(TRIES_TO_LOCK):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            time.sleep(0.05)
    else:
        os.close(descriptor)
        raise JobError(
            f"a search is at work in {folder}; look at it with sdtune hpo status {folder}, or choose another --output."
        )
    os.truncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _open(folder: Path) -> OptunaStudy:
    from sdtune.backends.local.optuna_study import OptunaStudy

    return OptunaStudy(folder)
