"""Study: a search for better settings, planned; its trials as they come; and what a place must do to run one."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, ClassVar, Literal, Protocol

from sdtune.jobs.archive import ENDED
from sdtune.jobs.backend import Submitted
from sdtune.jobs.search_space import SearchSpace, Value
from sdtune.jobs.spec import JobSpec

Goal = Literal["minimize", "maximize"]
Algorithm = Literal["default", "random", "grid"]
EarlyStopping = Literal["none", "median", "decay-curve"]
MeasurementSelection = Literal["last", "best"]
TrialState = Literal["requested", "active", "stopping", "succeeded", "infeasible"]

TRIALS_FLAG = "--trials"
"""Told to the training process of a trial: its output is ``<output>/trials/<CLOUD_ML_TRIAL_ID>``."""
SEED_FLAG = "--seed-per-trial"
"""Told beside it: the trial's id is added to the seed."""
TRIALS_FOLDER = "trials"
TRIAL_VARIABLE = "CLOUD_ML_TRIAL_ID"
METRIC_FILE_VARIABLE = "CLOUD_ML_HP_METRIC_FILE"


@dataclass(frozen=True)
class Study:
    """What is searched, and how. The trials' job reports ``metric``.

    job: of each trial, with the study's folder as its output; ``trial_args`` says what a trial is started with.
    max_failed_trials: so many trials without a metric are one too many; 0: the place decides.
    measurement: which of a trial's measurements counts.
    """

    name: str
    method: str
    space: SearchSpace
    metric: str
    job: JobSpec
    goal: Goal = "minimize"
    max_trials: int = 12
    parallel_trials: int = 3
    max_failed_trials: int = 2
    algorithm: Algorithm = "default"
    early_stopping: EarlyStopping = "none"
    measurement: MeasurementSelection = "last"
    seed_per_trial: bool = False

    @property
    def output(self) -> str:
        return self.job.output

    @property
    def trial_job(self) -> JobSpec:
        """The job of every trial; what differs between trials comes after its arguments, and in its environment."""
        flags = [TRIALS_FLAG, *([SEED_FLAG] if self.seed_per_trial else [])]
        task, method, *rest = self.job.args
        return replace(self.job, args=(task, method, *flags, *rest))

    def trial_args(self, values: Mapping[str, Value]) -> tuple[str, ...]:
        """The arguments of one trial: those of all, then ``--<parameter>=<value>``, as Vertex AI appends them."""
        return (*self.trial_job.args, *(f"--{name}={value}" for name, value in values.items()))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a trial reported at a step."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a search. final: what counts of its measurements, None until it is known, or where there is none.

    measurements: in the order of their steps. reason: why it is infeasible, or was stopped early.
    job_id: what its place calls the run, if it says.
    """

    id: str
    state: TrialState
    parameters: Mapping[str, Value]
    measurements: tuple[Measurement, ...] = ()
    final: Measurement | None = None
    reason: str = ""
    started: datetime | None = None
    ended: datetime | None = None
    job_id: str = ""

    @property
    def latest(self) -> Measurement | None:
        """What is known of it by now."""
        return self.final or (self.measurements[-1] if self.measurements else None)


@dataclass(frozen=True)
class StudyRecord:
    """A study as its place remembers it. state: in the words of JobRecord.

    args: of the trials' job, without parameters; the recipe that all started from is read from them.
    places: on what machines the trials run, as settings of a Placement; none on this machine.
    """

    study_id: str
    number: str
    name: str
    state: str
    method: str
    output: str
    space: SearchSpace
    metric: str
    goal: Goal
    max_trials: int
    parallel_trials: int
    max_failed_trials: int = 0
    algorithm: Algorithm = "default"
    early_stopping: EarlyStopping = "none"
    measurement: MeasurementSelection = "last"
    args: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = field(default=())
    region: str = ""
    created: datetime | None = None
    started: datetime | None = None
    ended: datetime | None = None
    error: str = ""
    url: str = ""
    places: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def seed_per_trial(self) -> bool:
        return SEED_FLAG in self.args

    @property
    def best(self) -> Trial | None:
        """The trial with the best final metric; None if none has one."""
        return next(iter(self.ranked), None)

    @property
    def ranked(self) -> list[Trial]:
        """The trials that succeeded and have a final metric, best first; of equals, the earlier."""
        counted = [trial for trial in self.trials if trial.state == "succeeded" and self.value_of(trial) is not None]
        sign = 1.0 if self.goal == "minimize" else -1.0
        return sorted(counted, key=lambda trial: sign * (self.value_of(trial) or 0.0))

    def value_of(self, trial: Trial) -> float | None:
        """The metric that counts for ``trial``."""
        return trial.final.metrics.get(self.metric) if trial.final else None

    def folder_of(self, trial: Trial) -> str:
        """Where the trial's result is."""
        return trial_folder(self.output, trial.id)


def trial_folder(output: str, trial_id: str) -> str:
    """Where a trial of the study at ``output`` writes."""
    return f"{output.rstrip('/')}/{TRIALS_FOLDER}/{trial_id}"


class StudyArchive(Protocol):
    """A place that remembers studies, also those that it still runs."""

    outlives: ClassVar[bool]
    """Studies go on when the launcher leaves them."""

    def find(self, study: str) -> StudyRecord:
        """The study of this number, name or output folder; the newest of several. JobError: there is none."""
        ...

    def studies(self) -> Iterator[StudyRecord]:
        """sdtune's own studies, newest first. Their trials may be left out."""
        ...

    def follow(self, study_id: str) -> Generator[StudyRecord, None, None]:
        """The study whenever something changed, the last time when it has ended.

        A study that does not outlive its launcher is stopped when this is left early (closed), and goes on when a
        study with the same output is submitted again.
        """
        ...

    def cancel(self, study_id: str) -> None:
        """Stop it and its trials. JobError: it has ended already."""
        ...


class StudyBackend(StudyArchive, Protocol):
    """A place where studies run."""

    def render(self, study: Study) -> dict[str, Any]:
        """What ``submit`` would start, as plain data. Starts nothing."""
        ...

    def as_text(self, rendered: dict[str, Any]) -> str:
        """The same as people read it."""
        ...

    def check(self, study: Study) -> list[str]:
        """What should be known before it starts. RecipeError: it cannot run here, and why; asks where that is needed.

        Vertex AI holds the GPUs of all parallel trials against the project's quota; here, a missing package is told.
        """
        ...

    def submit(self, study: Study) -> Submitted:
        """Start the study. A folder of this machine is marked with MARK, so that a study in it may go on."""
        ...
