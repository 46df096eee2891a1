"""StudySettings: how a search is made, declared once; options of ``sdtune hpo METHOD`` and keys of a recipe alike."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from sdtune.jobs.study import Algorithm, EarlyStopping, MeasurementSelection
from sdtune.methods.settings import Settings


class StudySettings(Settings):
    """What is varied, how often, and how it is judged."""

    name = "hpo"

    tune: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(
            description="What to vary: SETTING=LOW:HIGH, SETTING=LOW:HIGH:log (or linear, reverse-log), SETTING=A,B,C, "
            "or SETTING for its own range; repeatable. Not given: what the method declares."
        ),
    ] = ()
    metric: Annotated[
        str | None,
        Field(
            min_length=1,
            description="What is minimised: held_out_loss, or avr_loss of kohya's methods. Not given: held_out_loss.",
        ),
    ] = None
    max_trials: Annotated[int, Field(ge=1, description="Trials in all.")] = 12
    parallel_trials: Annotated[
        int | None,
        Field(ge=1, description="Trials at a time; more of them learn less from each other. Not given: 3 at most."),
    ] = None
    max_failed_trials: Annotated[
        int, Field(ge=0, description="End the search once so many trials have failed; 0: the place decides.")
    ] = 2
    algorithm: Annotated[
        Algorithm,
        Field(description="How the next trial is chosen: default learns from those before it; grid needs values."),
    ] = "default"
    early_stopping: Annotated[
        EarlyStopping,
        Field(description="End trials that do worse than the median of the others, or whose curve promises little."),
    ] = "none"
    measurement: Annotated[
        MeasurementSelection,
        Field(description="What counts of a trial: its last measurement, or its best, which may be luck."),
    ] = "last"
    seed_per_trial: Annotated[
        bool, Field(description="Add the trial's number to the seed. Without, trials differ in what is varied alone.")
    ] = False

    @classmethod
    def help_command(cls) -> str:
        return "sdtune hpo METHOD --help"

    @field_validator("parallel_trials")
    @classmethod
    def _no_more_than_there_are(cls, number: int | None, info: ValidationInfo) -> int | None:
        total = info.data.get("max_trials")
        if number is not None and total is not None and number > total:
            raise ValueError(f"found {number}, but there are {total} trials in all (max_trials); use at most that.")
        return number

    @property
    def parallel(self) -> int:
        """``parallel_trials``, or its default."""
        return self.parallel_trials or min(3, self.max_trials)
