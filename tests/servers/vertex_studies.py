"""Hyperparameter tuning jobs of the loopback Vertex AI: their trials RUN as processes, as many at a time as they say.

A trial gets ``--<parameter>=<value>`` behind its arguments, CLOUD_ML_TRIAL_ID and CLOUD_ML_HP_METRIC_FILE, and what it
writes to that file (as the package cloudml-hypertune does) becomes its measurements. Suggested is at random, or from
the grid: Bayesian optimisation is not there, nor are the decay curve and convex stopping. Median stopping is.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import random
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.cloud.aiplatform_v1.types import JobState, StudySpec, Trial

from tests.servers.vertex_jobs import CANCELLED, INVALID_ARGUMENT, TERMINAL, Job, now
from tests.servers.vertex_json import ApiError, matches, parse, to_json
from tests.servers.vertex_study_rules import Scale, check_study, new_study, trial_job

if TYPE_CHECKING:
    from tests.servers.vertex import Request, VertexServer

COLLECTION = "hyperparameterTuningJobs"
ENOUGH_TO_JUDGE = 2
"""Completed trials before the median says anything."""
State, TrialState = JobState, Trial.State
Values = dict[str, Any]


class Study:
    """message: the HyperparameterTuningJob as it is answered, under ``lock``; most: trials that ran at one time."""

    def __init__(self, message: Any, project: str, number: str, region: str, study_id: str, server: VertexServer):
        self.message, self.project, self.number, self.region, self.id = message, project, number, region, study_id
        self.lock = threading.RLock()
        self.jobs: dict[str, Job] = {}
        self.most = 0
        self._server = server
        self._cancelled = threading.Event()
        self._suggestions = suggestions(message.study_spec, int(study_id))
        message.name = f"projects/{number}/locations/{region}/{COLLECTION}/{study_id}"
        message.create_time.CopyFrom(now())
        self._to(State.JOB_STATE_PENDING)
        self._thread = threading.Thread(target=self._live, name=f"study-{study_id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def state(self) -> str:
        with self.lock:
            return str(JobState(self.message.state).name)

    @property
    def ended(self) -> bool:
        return self.message.state in TERMINAL

    def wait(self, timeout: float = 60) -> str:
        """Until it has ended; the state. AssertionError after ``timeout`` seconds."""
        self._thread.join(timeout)
        assert self.ended, f"study {self.id} is still in {self.state} after {timeout} s"
        return self.state

    def cancel(self) -> None:
        with self.lock:
            if not self.ended:
                self._to(State.JOB_STATE_CANCELLING)
                self._cancelled.set()

    def close(self) -> None:
        self._cancelled.set()

    def join(self) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    # Its life --------------------------------------------------------------------------------------------------------

    def _to(self, state: JobState, code: int = 0, text: str = "") -> None:
        with self.lock:
            self.message.state = int(state)
            self.message.update_time.CopyFrom(now())
            if state is State.JOB_STATE_RUNNING:
                self.message.start_time.CopyFrom(now())
            if state in TERMINAL:
                self.message.end_time.CopyFrom(now())
            if code:
                self.message.error.code, self.message.error.message = code, text

    def _live(self) -> None:
        with tempfile.TemporaryDirectory(prefix="vertex-study-", ignore_cleanup_errors=True) as folder:
            self._to(State.JOB_STATE_RUNNING)
            while not self._cancelled.wait(0.02):
                self._look_at_trials(Path(folder))
                failed = [trial for trial in self.message.trials if trial.state == TrialState.INFEASIBLE]
                if failed and len(failed) >= (self.message.max_failed_trial_count or self.message.max_trial_count):
                    self._stop_trials(Path(folder))
                    text = f"Too many trials failed: {len(failed)}. The last: {failed[-1].infeasible_reason}"
                    return self._to(State.JOB_STATE_FAILED, INVALID_ARGUMENT, text)
                if not self._start_trials(Path(folder)) and not self._active():
                    return self._to(State.JOB_STATE_SUCCEEDED)
            self._stop_trials(Path(folder))
            return self._to(State.JOB_STATE_CANCELLED, CANCELLED, "CANCELED")

    def _active(self) -> list[Any]:
        return [one for one in self.message.trials if one.state in (TrialState.ACTIVE, TrialState.STOPPING)]

    def _start_trials(self, folder: Path) -> bool:
        """Whether there is more to start, later."""
        while len(self.message.trials) < self.message.max_trial_count:
            if len(self._active()) >= self.message.parallel_trial_count:
                return True
            values = next(self._suggestions, None)
            if values is None:
                return False
            self._start_trial(values, folder)
        return False

    def _start_trial(self, values: Values, folder: Path) -> None:
        trial_id = str(len(self.message.trials) + 1)
        message = trial_job(self.message)
        message.display_name = f"{self.message.display_name}_{trial_id}"
        message.ClearField("labels")
        base = message.job_spec.base_output_directory
        if base.output_uri_prefix:
            base.output_uri_prefix = f"{base.output_uri_prefix.rstrip('/')}/{trial_id}"
        for pool in message.job_spec.worker_pool_specs:
            if pool.HasField("container_spec"):
                pool.container_spec.args.extend(f"--{name}={value}" for name, value in values.items())
        variables = {"CLOUD_ML_TRIAL_ID": trial_id, "CLOUD_ML_HP_METRIC_FILE": str(metric_file(folder, trial_id))}
        around = replace(self._server.around, environment={**self._server.around.environment, **variables})
        job_id = str(random.randrange(10**18, 9 * 10**18))
        job = Job(message, self.project, self.number, self.region, job_id, around)
        self.jobs[trial_id] = self._server.jobs[job_id] = job
        with self.lock:
            trial = self.message.trials.add(id=trial_id, state=int(TrialState.ACTIVE), custom_job=message.name)
            trial.name = f"projects/{self.number}/locations/{self.region}/studies/{self.id}/trials/{trial_id}"
            trial.start_time.CopyFrom(now())
            for name, value in values.items():
                parameter = trial.parameters.add(parameter_id=name)
                setattr(parameter.value, "string_value" if isinstance(value, str) else "number_value", value)
        job.start()
        self.most = max(self.most, len(self._active()))

    def _look_at_trials(self, folder: Path) -> None:
        for trial in self._active():
            job = self.jobs[trial.id]
            ended = job.ended
            self._measure(trial, folder)
            if ended:
                self._complete(trial, job)
            elif trial.state == TrialState.ACTIVE and self._is_below_median(trial):
                with self.lock:
                    trial.state = int(TrialState.STOPPING)
                job.cancel()

    def _measure(self, trial: Any, folder: Path) -> None:
        """What the metric file says by now; it may be written just now, so that a line is cut off."""
        names = [metric.metric_id for metric in self.message.study_spec.metrics]
        with suppress(FileNotFoundError), self.lock:
            for line in metric_file(folder, trial.id).read_text().splitlines():
                try:
                    report = json.loads(line)
                    found = {name: float(report[name]) for name in names if name in report}
                    step, of = int(report["global_step"]), report["trial"]
                except (ValueError, KeyError, TypeError):
                    continue
                known = any(one.step_count == step for one in trial.measurements)
                if not found or known or of != trial.id:
                    continue
                measurement = trial.measurements.add(step_count=step)
                for name, value in found.items():
                    measurement.metrics.add(metric_id=name, value=value)

    def _complete(self, trial: Any, job: Job) -> None:
        with self.lock:
            stopped = trial.state == TrialState.STOPPING
            trial.end_time.CopyFrom(now())
            if trial.measurements and (stopped or job.state == "JOB_STATE_SUCCEEDED"):
                best = self.message.study_spec.measurement_selection_type == 2
                chosen = min(trial.measurements, key=self._loss) if best else trial.measurements[-1]
                trial.final_measurement.CopyFrom(chosen)
                trial.state = int(TrialState.SUCCEEDED)
                return
            trial.state = int(TrialState.INFEASIBLE)
            trial.infeasible_reason = job.message.error.message or "The trial did not report the metric."

    def _stop_trials(self, folder: Path) -> None:
        active = self._active()
        for trial in active:
            self.jobs[trial.id].cancel()
        for trial in active:
            self.jobs[trial.id].join()
            self._measure(trial, folder)
            with self.lock:
                trial.state = int(TrialState.INFEASIBLE)
                trial.infeasible_reason = "The study was stopped."
                trial.end_time.CopyFrom(now())

    def _loss(self, measurement: Any) -> float:
        """The first metric, so that less is better."""
        metric = self.message.study_spec.metrics[0]
        value = next(float(one.value) for one in measurement.metrics if one.metric_id == metric.metric_id)
        return value if metric.goal == StudySpec.MetricSpec.GoalType.MINIMIZE else -value

    def _is_below_median(self, trial: Any) -> bool:
        """Its best so far is worse than the median of the others' averages up to the same step."""
        if not self.message.study_spec.HasField("median_automated_stopping_spec") or not trial.measurements:
            return False
        step = trial.measurements[-1].step_count
        averages = []
        for other in self.message.trials:
            losses = [self._loss(one) for one in other.measurements if one.step_count <= step]
            if other.state == TrialState.SUCCEEDED and losses:
                averages.append(statistics.fmean(losses))
        best = min(map(self._loss, trial.measurements))
        return len(averages) >= ENOUGH_TO_JUDGE and best > statistics.median(averages)


def metric_file(folder: Path, trial_id: str) -> Path:
    (folder / trial_id).mkdir(exist_ok=True)
    return folder / trial_id / "output.metrics"


# Suggestions ---------------------------------------------------------------------------------------------------------


def suggestions(spec: Any, seed: int) -> Iterator[Values]:
    """Settings to try; the grid ends, chance does not."""
    if spec.algorithm == StudySpec.Algorithm.GRID_SEARCH:
        yield from _grid(list(spec.parameters))
        return
    chance = random.Random(seed)
    while True:
        yield _draw(spec.parameters, chance)


def _draw(parameters: Any, chance: random.Random) -> Values:
    found: Values = {}
    for parameter in parameters:
        value = found[parameter.parameter_id] = _one(parameter, chance)
        for under in _children(parameter, value):
            found |= _draw([under], chance)
    return found


def _children(parameter: Any, value: Any) -> list[Any]:
    """The parameters that matter under this value of their parent."""
    return [
        one.parameter_spec
        for one in parameter.conditional_parameter_specs
        if value in getattr(one, one.WhichOneof("parent_value_condition")).values
    ]


def _one(parameter: Any, chance: random.Random) -> Any:
    kind = parameter.WhichOneof("parameter_value_spec")
    spec = getattr(parameter, kind)
    if kind in ("categorical_value_spec", "discrete_value_spec"):
        return chance.choice(list(spec.values))
    low, high, share = spec.min_value, spec.max_value, chance.random()
    if parameter.scale_type == Scale.UNIT_LOG_SCALE:
        value = low * math.exp(share * math.log(high / low))
    elif parameter.scale_type == Scale.UNIT_REVERSE_LOG_SCALE:
        value = high + low - low * math.exp((1 - share) * math.log(high / low))
    else:
        value = low + share * (high - low)
    return min(max(round(value), low), high) if kind == "integer_value_spec" else value


def _grid(parameters: list[Any]) -> Iterator[Values]:
    if not parameters:
        yield {}
        return
    first, *rest = parameters
    for value in _all(first):
        for others in _grid([*_children(first, value), *rest]):
            yield {first.parameter_id: value, **others}


def _all(parameter: Any) -> list[Any]:
    kind = parameter.WhichOneof("parameter_value_spec")
    spec = getattr(parameter, kind)
    return list(range(spec.min_value, spec.max_value + 1)) if kind == "integer_value_spec" else list(spec.values)


# What clients ask for ------------------------------------------------------------------------------------------------


class Studies:
    """The studies of a server, by id, in the order of their making."""

    def __init__(self, server: VertexServer) -> None:
        self.made: dict[str, Study] = {}
        self._server = server
        self._ids = itertools.count(random.randrange(10**18, 5 * 10**18))

    def answer(self, request: Request, project: str, region: str, study_id: str, verb: str) -> dict[str, Any]:
        """The answer as JSON. ApiError otherwise."""
        action = _ACTIONS.get((request.method, bool(study_id), verb))
        if action is None:
            raise ApiError(404, f"Method not found: {request.method} {request.path}")
        made: dict[str, Any] = action(self, request, project, region, study_id)
        return made

    def permission(self, request: Request, study_id: str, verb: str) -> str:
        names = {"POST": "create", "GET": "get" if study_id else "list", "DELETE": "delete"}
        return f"aiplatform.{COLLECTION}." + (verb.lstrip(":") or names.get(request.method, "get"))

    def close(self) -> None:
        for study in self.made.values():
            study.close()
        for study in self.made.values():
            study.join()

    def create(self, request: Request, project: str, region: str, _: str) -> dict[str, Any]:
        message = new_study()
        parse(request.body, message, "hyperparameter_tuning_job")
        for output in ("name", "trials", "state", "create_time", "start_time", "end_time", "update_time", "error"):
            message.ClearField(output)
        number = self._server.number_of(project)
        check_study(message, region, number)
        self._server.check_job_spec(message.trial_job_spec, number, region)
        study_id = str(next(self._ids))
        study = self.made[study_id] = Study(message, project, number, region, study_id, self._server)
        answer = to_json(message, request.query)
        study.start()
        return answer

    def get(self, request: Request, project: str, region: str, study_id: str) -> dict[str, Any]:
        study = self._find(project, region, study_id)
        with study.lock:
            return to_json(study.message, request.query)

    def cancel(self, request: Request, project: str, region: str, study_id: str) -> dict[str, Any]:
        study = self._find(project, region, study_id)
        if study.ended:
            text = f"The HyperparameterTuningJob {study.message.name} is in state {study.state}."
            raise ApiError(400, text, "FAILED_PRECONDITION")
        study.cancel()
        return {}

    def list(self, request: Request, project: str, region: str, _: str) -> dict[str, Any]:
        query, number = request.query, self._server.number_of(project)
        wanted = matches(query["filter"]) if query.get("filter") else lambda study: True
        size = int(query.get("pageSize") or 100)
        start = int(base64.b64decode(query.get("pageToken", "")) or 0)
        newest = [one for one in reversed(self.made.copy().values()) if (one.number, one.region) == (number, region)]
        found = [one for one in newest if wanted(one.message)][start:]
        page = [self.get(request, project, region, one.id) for one in found[:size]]
        more = {"nextPageToken": base64.b64encode(str(start + size).encode()).decode()}
        return {**({COLLECTION: page} if page else {}), **(more if len(found) > size else {})}

    def _find(self, project: str, region: str, study_id: str) -> Study:
        study = self.made.get(study_id)
        if study is None or (study.number, study.region) != (self._server.number_of(project), region):
            name = f"projects/{project}/locations/{region}/{COLLECTION}/{study_id}"
            raise ApiError(404, f"The HyperparameterTuningJob {name} does not exist.")
        return study


_ACTIONS: dict[tuple[str, bool, str], Any] = {
    ("POST", False, ""): Studies.create,
    ("GET", False, ""): Studies.list,
    ("GET", True, ""): Studies.get,
    ("POST", True, ":cancel"): Studies.cancel,
}
