"""What a trial of a hyperparameter search reports: the file that Vertex AI reads its measurements from.

The format is that of the package cloudml-hypertune 0.1.0.dev6: one JSON object per line. That package writes the whole
file anew at each report, and a reader can meet a torn one; here each report is one line, appended at once.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from sdtune.errors import RecipeError, TrainingError
from sdtune.methods.base import AVERAGE_LOSS, HELD_OUT_LOSS
from sdtune.methods.fields import CommonFields

METRIC_FILE, TRIAL_ID = "CLOUD_ML_HP_METRIC_FILE", "CLOUD_ML_TRIAL_ID"
"""Set by Vertex AI for each trial of a search."""
DEFAULT_FILE = "/tmp/hypertune/output.metrics"
"""Where the package writes, and Vertex AI reads, if no file is named."""
MOST_BYTES = 4096
"""A page of memory: what is appended within it is seen whole or not at all, and across its end sometimes in part. A
file of another name moved over it would be whole too, but a reader may have this one open. Some thirty reports fit,
which also keeps from "Too many hyperparameter tuning metrics were written", as Vertex AI has told its users."""


class Reports:
    """The measurements of one trial, as lines of ``file``; metrics: so many are told. steps: of the run.

    Reports of a metric are so far apart that the file stays within ``MOST_BYTES``. That after the last step is always
    written; that before the first never, because no setting of the trial has had a part in it.
    """

    def __init__(self, file: Path, trial: str, steps: int, metrics: int = 1) -> None:
        self._file, self._trial, self._steps = file, trial, steps
        longest = len(self._line(HELD_OUT_LOSS, 1.2345678901234567e-100, steps)) + 8
        # One more than fits between is written at each end.
        self._apart = -(-steps // max(1, MOST_BYTES // (longest * metrics) - 2))
        self._last: dict[str, int] = {}

    def report(self, metric: str, value: float, step: int) -> None:
        """Add one measurement, if its turn has come.

        TrainingError: it is no number, which a search could take for the best of all; or the file cannot be written.
        """
        if step < 1:
            return
        if not math.isfinite(value):
            raise TrainingError(
                f"the {metric} was {value} at step {step}: the run has diverged, and this trial of the search fails."
            )
        last = self._last.get(metric, 0)
        if step <= last or (step != self._steps and step // self._apart == last // self._apart):
            return
        self._last[metric] = step
        try:
            # The same file throughout, and no buffer that could be written out in pieces.
            with self._file.open("ab", buffering=0) as file:
                file.write(self._line(metric, value, step))
        except OSError as error:
            raise _not_written(self._file, error) from None

    def _line(self, metric: str, value: float, step: int) -> bytes:
        said = {
            "timestamp": time.time(),
            "trial": self._trial,
            metric: str(float(value)),
            "global_step": str(step),
            "checkpoint_path": "",
        }
        return (json.dumps(said, sort_keys=True) + "\n").encode()


def open_reports(method: CommonFields, environment: Mapping[str, str] = os.environ) -> Reports | None:
    """Where this run reports, emptied of what an earlier try of the same trial left; None if it is no trial."""
    file, trial = environment.get(METRIC_FILE), environment.get(TRIAL_ID)
    if not file and not trial:
        return None
    path = Path(file or DEFAULT_FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, 0)
    except OSError as error:
        raise _not_written(path, error) from None
    told = (HELD_OUT_LOSS, AVERAGE_LOSS) if method.container == "kohya" else (HELD_OUT_LOSS,)
    return Reports(path, trial or "0", method.max_train_steps, len(told))


def _not_written(file: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{METRIC_FILE}: {file} cannot be written ({error.strerror or error}), and without it the search learns "
        "nothing of its trials; let it name a file that can."
    )


def trial_id(environment: Mapping[str, str] = os.environ) -> str:
    """Of the trial that this process is. RecipeError if it is none, or not one that can name a folder."""
    trial = environment.get(TRIAL_ID, "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", trial):
        found = repr(trial) if trial else "nothing"
        raise RecipeError(
            f"trials: found {found} in {TRIAL_ID}, wanted the number of a trial, which a search sets; "
            "leave --trials out of a run that is none."
        )
    return trial


def output_of_trial(output: str, trial: str) -> str:
    """The folder of this trial alone, in that of its search."""
    return f"{output.rstrip('/')}/trials/{trial}"


def seed_of_trial(seed: int, trial: str) -> int:
    """Of each trial its own, the same whenever it is tried again. RecipeError if the trial has no number."""
    if not trial.isdecimal():
        raise RecipeError(f"seed-per-trial: found {trial!r} in {TRIAL_ID}, wanted a number to add to the seed.")
    return (seed + int(trial)) % 2**32
