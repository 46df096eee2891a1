"""Which trials are not worth their end: Vertex AI's two rules, on what trials report on their way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist, fmean, median, stdev

from sdtune.jobs.study import Goal

Curve = Mapping[int, float]
"""What a trial reported, by step."""
LEAST_CHANCE = 0.05
TRIALS_TO_JUDGE_BY = 4
"""So many must have come to their end before another is stopped."""


def worse_than_median(curve: Curve, ended: Sequence[Curve], goal: Goal) -> bool:
    """Whether its best value is worse than the median of the others' averages up to the same step.

    Source: MedianAutomatedStoppingSpec of Vertex AI's StudySpec.
    """
    here = max(curve)
    averages = [fmean(values) for other in ended if (values := [other[step] for step in other if step <= here])]
    if len(averages) < TRIALS_TO_JUDGE_BY:
        return False
    return min(curve.values()) > median(averages) if goal == "minimize" else max(curve.values()) < median(averages)


def has_no_chance(curve: Curve, ended: Sequence[Curve], goal: Goal) -> bool:
    """Whether it will hardly come to be the best: the others' way from this step to their end is normally distributed.

    Source: DecayCurveAutomatedStoppingSpec, where a Gaussian process foretells the end.
    """
    here = max(curve)
    ways = [other[max(other)] - other[max(before)] for other in ended if (before := [s for s in other if s <= here])]
    if len(ways) < TRIALS_TO_JUDGE_BY:
        return False
    ends = [other[max(other)] for other in ended]
    # Away from the best, in what remains to be gone.
    short = curve[here] + fmean(ways) - (min(ends) if goal == "minimize" else max(ends))
    if goal == "maximize":
        short = -short
    spread = stdev(ways)
    return short > 0 if spread == 0 else 1 - NormalDist(0, spread).cdf(short) < LEAST_CHANCE


RULES: dict[str, tuple[Callable[[Curve, Sequence[Curve], Goal], bool], str]] = {
    "median": (worse_than_median, "worse than the median of the others"),
    "decay-curve": (has_no_chance, "hardly a chance to become the best"),
}
"""By early_stopping: the rule, and why it stops a trial."""
