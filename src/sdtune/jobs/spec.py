"""JobSpec: one run, planned but not yet placed anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from sdtune.methods.base import Method


@dataclass(frozen=True)
class JobSpec:
    """What every backend starts. ``args`` is cargo: no backend reads or changes it."""

    name: str
    method: str
    container: str
    output: str
    args: tuple[str, ...]


def plan_training(method: Method, dataset: str, output: str) -> JobSpec:
    """The run of ``method`` on ``dataset``; both places as the training process will see them."""
    return JobSpec(
        name=output.rstrip("/").rpartition("/")[2],
        method=method.name,
        container=method.container,
        output=output,
        args=("train", method.name, f"--dataset={dataset}", f"--output={output}", *method.to_args()),
    )
