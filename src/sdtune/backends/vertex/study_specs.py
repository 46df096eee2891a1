"""From a Study to the HyperparameterTuningJob that Vertex AI is sent, and back from what it returns. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

from sdtune.backends.vertex.names import job_url
from sdtune.backends.vertex.records import state_of
from sdtune.backends.vertex.specs import METHOD_LABEL, TASK_LABEL, custom_job
from sdtune.jobs.placement import Placement
from sdtune.jobs.search_space import Kind, Parameter, Parent, Scale, SearchSpace, Value
from sdtune.jobs.study import (
    TRIALS_FOLDER,
    Algorithm,
    EarlyStopping,
    Measurement,
    MeasurementSelection,
    Study,
    StudyRecord,
    Trial,
    TrialState,
)

TASK = "hpo"
COLLECTION = "hyperparameterTuningJobs"
SCALES: dict[Scale, str] = {
    "linear": "UNIT_LINEAR_SCALE",
    "log": "UNIT_LOG_SCALE",
    "reverse-log": "UNIT_REVERSE_LOG_SCALE",
}
ALGORITHMS: dict[Algorithm, str] = {"default": "", "random": "RANDOM_SEARCH", "grid": "GRID_SEARCH"}
EARLY_STOPPING: dict[EarlyStopping, str] = {
    "none": "",
    "median": "medianAutomatedStoppingSpec",
    "decay-curve": "decayCurveStoppingSpec",
}
MEASUREMENTS: dict[MeasurementSelection, str] = {"last": "LAST_MEASUREMENT", "best": "BEST_MEASUREMENT"}
TRIAL_STATES: dict[str, TrialState] = {
    "REQUESTED": "requested",
    "ACTIVE": "active",
    "STOPPING": "stopping",
    "SUCCEEDED": "succeeded",
    "INFEASIBLE": "infeasible",
}
# Of a discrete or categorical parent; integers and doubles are none (search_space.py).
PARENT_VALUES = {"categorical": "parentCategoricalValues", "discrete": "parentDiscreteValues"}
Key = TypeVar("Key", bound=str)


def tuning_job(study: Study, placement: Placement) -> dict[str, Any]:
    """The HyperparameterTuningJob of ``study``, as JSON."""
    # AIP_TENSORBOARD_LOG_DIR and the like are then those of the trial: Vertex AI appends its id.
    job = replace(study.trial_job, output=f"{study.output}/{TRIALS_FOLDER}")
    trial = custom_job(job, placement)
    rendered: dict[str, Any] = {
        "displayName": study.name[:128],
        "labels": {**trial["labels"], TASK_LABEL: TASK},
        "maxTrialCount": study.max_trials,
        "parallelTrialCount": study.parallel_trials,
        "studySpec": study_spec(study),
        "trialJobSpec": trial["jobSpec"],
    }
    if study.max_failed_trials:
        rendered["maxFailedTrialCount"] = study.max_failed_trials
    if "encryptionSpec" in trial:
        rendered["encryptionSpec"] = trial["encryptionSpec"]
    return rendered


def study_spec(study: Study) -> dict[str, Any]:
    """The StudySpec."""
    spec: dict[str, Any] = {
        "metrics": [{"metricId": study.metric, "goal": study.goal.upper()}],
        "parameters": [_parameter_spec(one, study.space) for one in study.space if one.parent is None],
        "measurementSelectionType": MEASUREMENTS[study.measurement],
    }
    if algorithm := ALGORITHMS[study.algorithm]:
        spec["algorithm"] = algorithm
    if stopping := EARLY_STOPPING[study.early_stopping]:
        # By steps: machines differ in speed.
        spec[stopping] = {"useElapsedDuration": False}
    return spec


def _parameter_spec(parameter: Parameter, space: SearchSpace) -> dict[str, Any]:
    """The ParameterSpec, with those of the parameters that matter only under it."""
    spec: dict[str, Any] = {"parameterId": parameter.name}
    match parameter.kind:
        case "double":
            spec["doubleValueSpec"] = {"minValue": float(parameter.low), "maxValue": float(parameter.high)}
        case "integer":
            # 64-bit integers are texts in Google's JSON.
            spec["integerValueSpec"] = {"minValue": str(int(parameter.low)), "maxValue": str(int(parameter.high))}
        case "discrete":
            spec["discreteValueSpec"] = {"values": [float(value) for value in parameter.values]}
        case "categorical":
            spec["categoricalValueSpec"] = {"values": list(parameter.values)}
    if parameter.kind != "categorical":
        spec["scaleType"] = SCALES[parameter.scale]
    if children := space.children(parameter.name):
        spec["conditionalParameterSpecs"] = [
            {
                PARENT_VALUES[parameter.kind]: {"values": list(child.parent.values if child.parent else ())},
                "parameterSpec": _parameter_spec(child, space),
            }
            for child in children
        ]
    return spec


def study_record(job: Mapping[str, Any]) -> StudyRecord:
    """A HyperparameterTuningJob, as Vertex AI returns it, as a StudyRecord."""
    job_id, spec = job["name"], job["studySpec"]
    pool = job["trialJobSpec"].get("workerPoolSpecs", [{}])[0]
    args = tuple(pool.get("containerSpec", {}).get("args", ()))
    metric = spec["metrics"][0]
    space = SearchSpace(tuple(_parameters(spec.get("parameters", ()))))
    return StudyRecord(
        study_id=job_id,
        number=job_id.rpartition("/")[2],
        name=job.get("displayName", ""),
        state=state_of(job),
        method=job.get("labels", {}).get(METHOD_LABEL, ""),
        output=next((arg.partition("=")[2] for arg in args if arg.startswith("--output=")), ""),
        space=space,
        metric=metric["metricId"],
        goal="minimize" if metric.get("goal") == "MINIMIZE" else "maximize",
        max_trials=int(job.get("maxTrialCount", 1)),
        parallel_trials=int(job.get("parallelTrialCount", 1)),
        max_failed_trials=int(job.get("maxFailedTrialCount", 0)),
        algorithm=_key(ALGORITHMS, spec.get("algorithm", ""), "default"),
        early_stopping=next((name for name, field in EARLY_STOPPING.items() if field in spec), "none"),
        measurement=_key(MEASUREMENTS, spec.get("measurementSelectionType", ""), "last"),
        args=args,
        trials=tuple(sorted((_trial(one, space) for one in job.get("trials", ())), key=_by_id)),
        region=job_id.split("/")[3],
        created=_time(job.get("createTime")),
        started=_time(job.get("startTime")),
        ended=_time(job.get("endTime")),
        error=job.get("error", {}).get("message", ""),
        url=job_url(job_id),
        places=_places(job_id.split("/")[3], job["trialJobSpec"].get("workerPoolSpecs", ())),
    )


def _places(region: str, pools: Any) -> dict[str, Any]:
    """Where the trials run, as settings of a Placement."""
    machine = pools[0].get("machineSpec", {}) if pools else {}
    found: dict[str, Any] = {"region": [region], "machine_type": machine.get("machineType")}
    if machine.get("acceleratorType"):
        found |= {"gpu": machine["acceleratorType"], "gpus": int(machine.get("acceleratorCount", 1))}
    replicas = sum(int(pool.get("replicaCount", 1)) for pool in pools)
    return {name: value for name, value in found.items() if value} | ({"replicas": replicas} if replicas > 1 else {})


def _parameters(specs: Any, parent: Parent | None = None) -> list[Parameter]:
    """The parameters of some ParameterSpecs, each before its children."""
    found = []
    for spec in specs:
        one = _parameter(spec, parent)
        found.append(one)
        for conditional in spec.get("conditionalParameterSpecs", ()):
            values = next((conditional[name]["values"] for name in PARENT_VALUES.values() if name in conditional), ())
            under = Parent(one.name, tuple(one.value_of(value) for value in values))
            found += _parameters([conditional["parameterSpec"]], under)
    return found


def _parameter(spec: Mapping[str, Any], parent: Parent | None) -> Parameter:
    name, scale = spec["parameterId"], _key(SCALES, spec.get("scaleType", ""), "linear")
    bounded: tuple[tuple[Kind, str], ...] = (("double", "doubleValueSpec"), ("integer", "integerValueSpec"))
    for kind, field in bounded:
        if field in spec:
            # A bound of 0 is not in the answer.
            low, high = (float(spec[field].get(bound, 0)) for bound in ("minValue", "maxValue"))
            return Parameter(name, kind, low=low, high=high, scale=scale, parent=parent)
    if "discreteValueSpec" in spec:
        values = [float(value) for value in spec["discreteValueSpec"]["values"]]
        whole = all(value.is_integer() for value in values)
        shown: tuple[Value, ...] = tuple(int(value) if whole else value for value in values)
        return Parameter(name, "discrete", values=shown, scale=scale, parent=parent)
    texts = spec.get("categoricalValueSpec", {}).get("values", ())
    return Parameter(name, "categorical", values=tuple(texts), parent=parent)


def _trial(trial: Mapping[str, Any], space: SearchSpace) -> Trial:
    given = {one["parameterId"]: one.get("value", 0) for one in trial.get("parameters", ())}
    known = [one.name for one in space]
    return Trial(
        id=str(trial.get("id", "")),
        state=TRIAL_STATES.get(trial.get("state", ""), "requested"),
        # In the order of the space, which is that of every table.
        parameters={name: space[name].value_of(given[name]) for name in known if name in given},
        measurements=tuple(_measurement(one) for one in trial.get("measurements", ())),
        final=_measurement(trial["finalMeasurement"]) if trial.get("finalMeasurement", {}).get("metrics") else None,
        reason=trial.get("infeasibleReason", ""),
        started=_time(trial.get("startTime")),
        ended=_time(trial.get("endTime")),
        job_id=trial.get("customJob", ""),
    )


def _measurement(found: Mapping[str, Any]) -> Measurement:
    metrics = {one["metricId"]: float(one.get("value", 0.0)) for one in found.get("metrics", ())}
    return Measurement(int(found.get("stepCount", 0)), metrics)


def _by_id(trial: Trial) -> tuple[int, str]:
    return (int(trial.id) if trial.id.isdigit() else 0, trial.id)


def _key(names: Mapping[Key, str], value: str, default: Key) -> Key:
    return next((key for key, name in names.items() if name == value), default)


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
