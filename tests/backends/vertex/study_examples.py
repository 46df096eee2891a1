"""Studies for tests, and how to plan and read one."""

from __future__ import annotations

from typing import Any

from google.cloud.aiplatform_v1 import types

from sdtune.jobs.machines import choose_machine
from sdtune.jobs.placement import Placement
from sdtune.jobs.search_space import Parameter, SearchSpace
from sdtune.jobs.spec import plan_training
from sdtune.jobs.study import Study
from sdtune.methods.catalog import METHODS

SPACE = SearchSpace(
    (
        Parameter("learning_rate", "double", low=1e-6, high=1e-2, scale="log"),
        Parameter("rank", "discrete", values=(4, 8)),
    )
)
GRID = SearchSpace(
    (Parameter("learning_rate", "discrete", values=(1e-4, 1e-3, 1e-2)), Parameter("rank", "integer", low=4, high=5))
)


def placement(**settings: Any) -> Placement:
    return Placement.from_settings({"project": "my-project", "gpu": "l4", **settings})


def study(name: str, space: SearchSpace = SPACE, method: str = "dreambooth-lora", **options: Any) -> Study:
    required = {"instance_prompt": "a photo of sks cat"} if "dreambooth" in method and "kohya" not in method else {}
    recipe = METHODS[method].from_settings(required)
    job = plan_training(recipe, "gs://bkt/data", f"gs://bkt/{name}", choose_machine("l4", None, None))
    made = {"max_trials": 4, "parallel_trials": 2, "max_failed_trials": 0, "metric": "held_out_loss", **options}
    return Study(name=name, method=method, space=space, job=job, **made)


def plain(job: Any) -> dict[str, Any]:
    found: dict[str, Any] = types.HyperparameterTuningJob.to_dict(
        job,
        use_integers_for_enums=False,
        preserving_proto_field_name=False,
        always_print_fields_with_no_presence=False,
    )
    return found
