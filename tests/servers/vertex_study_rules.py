"""What Vertex AI refuses in a hyperparameter tuning job. Written from the comments of the published messages alone.

That of a trial's job is what is refused in a custom job (vertex_rules.py). Of most wordings only the form is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from google.cloud.aiplatform_v1.types import HyperparameterTuningJob, StudySpec

from tests.servers.vertex_json import Violation, bad_request
from tests.servers.vertex_rules import check, new_job

Scale = StudySpec.ParameterSpec.ScaleType
LOGARITHMIC = {Scale.UNIT_LOG_SCALE, Scale.UNIT_REVERSE_LOG_SCALE}
PARENTS = {
    "parent_discrete_values": "discrete_value_spec",
    "parent_int_values": "integer_value_spec",
    "parent_categorical_values": "categorical_value_spec",
}


def new_study() -> Any:
    """An empty HyperparameterTuningJob, as protobuf's own message."""
    return HyperparameterTuningJob.pb(HyperparameterTuningJob())


def check_study(study: Any, region: str, project_number: str) -> None:
    """ApiError if Vertex AI would refuse the study, a HyperparameterTuningJob message of protobuf."""
    found = [*_counts(study), *_spec_mistakes(study.study_spec)]
    if found:
        listed = "\t".join(f"{number}.Field: {field}; Message: {text}" for number, (field, text) in enumerate(found, 1))
        raise bad_request(f"List of found errors:\t{listed}\t", found)
    check(trial_job(study), region, project_number)


def trial_job(study: Any) -> Any:
    """The custom job of a trial, without what only the trial has."""
    job = new_job()
    job.display_name = study.display_name
    job.job_spec.CopyFrom(study.trial_job_spec)
    if study.HasField("encryption_spec"):
        job.encryption_spec.CopyFrom(study.encryption_spec)
    for name, value in study.labels.items():
        job.labels[name] = value
    return job


def _counts(study: Any) -> Iterator[Violation]:
    at = "hyperparameter_tuning_job"
    if study.max_trial_count < 1:
        yield f"{at}.max_trial_count", "The maximum number of trials must be greater than 0."
    if study.parallel_trial_count < 1:
        yield f"{at}.parallel_trial_count", "The number of parallel trials must be greater than 0."
    if study.parallel_trial_count > study.max_trial_count:
        yield f"{at}.parallel_trial_count", "There can be no more parallel trials than trials."
    if not 0 <= study.max_failed_trial_count <= study.max_trial_count:
        yield f"{at}.max_failed_trial_count", "It must be between 0 and the maximum number of trials."


def _spec_mistakes(spec: Any) -> Iterator[Violation]:
    names = [metric.metric_id for metric in spec.metrics]
    if not names:
        yield "study_spec.metrics", "Required field is not set."
    if len(set(names)) < len(names) or any(not name or any(map(str.isspace, name)) for name in names):
        yield "study_spec.metrics", "Metric IDs must be unique, and must not contain whitespace."
    if not spec.parameters:
        yield "study_spec.parameters", "Required field is not set."
    if spec.observation_noise:
        yield "study_spec.observation_noise", "It is only supported by Vertex AI Vizier."
    seen: set[str] = set()
    for number, parameter in enumerate(spec.parameters):
        yield from _parameter_mistakes(parameter, f"study_spec.parameters[{number}]", seen, spec.algorithm)


def _parameter_mistakes(parameter: Any, at: str, seen: set[str], algorithm: int) -> Iterator[Violation]:
    if not parameter.parameter_id or parameter.parameter_id in seen:
        yield f"{at}.parameter_id", "Parameter IDs must be set and unique."
    seen.add(parameter.parameter_id)
    kind = parameter.WhichOneof("parameter_value_spec")
    if kind is None:
        yield at, "One of the value specs must be set."
        return
    values = getattr(parameter, kind)
    if kind == "double_value_spec" and algorithm == StudySpec.Algorithm.GRID_SEARCH:
        yield f"{at}.{kind}", "GRID_SEARCH does not support parameters of type DOUBLE."
    if values.HasField("default_value"):
        yield f"{at}.{kind}.default_value", "It is only supported by Vertex AI Vizier."
    yield from _value_mistakes(parameter, kind, f"{at}.{kind}")
    for number, conditional in enumerate(parameter.conditional_parameter_specs):
        inner = f"{at}.conditional_parameter_specs[{number}]"
        condition = conditional.WhichOneof("parent_value_condition")
        if condition is None or PARENTS[condition] != kind:
            yield inner, "The condition must be of the type of the parent."
            continue
        wanted = list(getattr(conditional, condition).values)
        if not wanted or any(not _has(values, kind, value) for value in wanted):
            yield f"{inner}.{condition}", "The values must be values of the parent."
        yield from _parameter_mistakes(conditional.parameter_spec, f"{inner}.parameter_spec", seen, algorithm)


def _value_mistakes(parameter: Any, kind: str, at: str) -> Iterator[Violation]:
    spec, scale = getattr(parameter, kind), parameter.scale_type
    if kind == "categorical_value_spec":
        if not spec.values or len(set(spec.values)) < len(spec.values):
            yield f"{at}.values", "Values must be set and unique."
        if scale:
            yield at, "A CATEGORICAL parameter has no scale type."
        return
    if kind == "discrete_value_spec":
        numbers = list(spec.values)
        if not numbers or len(numbers) > 1000 or any(b - a < 1e-10 for a, b in pairwise(numbers)):
            yield f"{at}.values", "At most 1000 values in increasing order, at least 1e-10 apart."
    else:
        numbers = [spec.min_value, spec.max_value]
        if not all(map(math.isfinite, numbers)) or numbers[0] > numbers[1]:
            yield at, "min_value must not be greater than max_value."
    if scale in LOGARITHMIC and numbers and min(numbers) <= 0:
        yield at, "Values must be strictly positive with a logarithmic scale."


def _has(spec: Any, kind: str, value: Any) -> bool:
    return spec.min_value <= value <= spec.max_value if kind == "integer_value_spec" else value in spec.values
