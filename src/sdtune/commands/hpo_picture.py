"""Pictures of a search: the metric against each setting, and over the steps; PNG to look at, HTML to point at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from PIL import Image

from sdtune.errors import JobError, ProjectError
from sdtune.jobs.search_space import Parameter
from sdtune.jobs.study import Measurement, StudyRecord, Trial

ABREAST = 3
"""Panels in a row."""
SIDE, GAP = 260, 30
"""Of a panel, in pixels."""
BEST, OTHER, NOT_ENDED = "best", "other trials", "without a result yet"
COLOURS = {BEST: "#d62728", OTHER: "#1f77b4", NOT_ENDED: "#bbbbbb"}


def draw(record: StudyRecord, folder: Path) -> list[Path]:
    """Write both pictures to ``folder``, which is made. JobError: nothing was measured; ProjectError: no altair."""
    if not any(_row(record, trial) for trial in record.trials):
        raise JobError(f"study {record.number} has not measured {record.metric} yet: there is nothing to draw.")
    try:
        import altair
        import vl_convert  # noqa: F401  # what altair makes files with
    except ImportError:
        raise ProjectError(
            "pictures need altair and vl-convert-python, which this Python does not have; install them with: "
            "pip install -e '.[hpo]' in sdtune's folder"
        ) from None
    chart = _chart(altair, record)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "-", record.name) or "study"
    files = [folder / f"{name}.png", folder / f"{name}.html"]
    chart.save(str(files[0]), scale_factor=2)
    with Image.open(files[0]) as picture:
        # A tenth of the size.
        picture.convert("RGB").quantize(64).save(files[0], optimize=True)
    # With its scripts in it: it can be sent on, and opened without a network.
    chart.save(str(files[1]), inline=True)
    return files


def _chart(altair: Any, record: StudyRecord) -> Any:
    panels = [_against(altair, record, parameter) for parameter in record.space]
    rows = [altair.hconcat(*panels[first : first + ABREAST], spacing=GAP) for first in range(0, len(panels), ABREAST)]
    better = "lower" if record.goal == "minimize" else "higher"
    title = altair.TitleParams(
        f"{record.name}: {record.metric} of {len(record.trials)} trials",
        subtitle=f"{record.method}, {record.state}; {better} is better",
        anchor="start",
    )
    return altair.vconcat(*rows, _over_steps(altair, record), spacing=GAP, title=title)


def _against(altair: Any, record: StudyRecord, parameter: Parameter) -> Any:
    """The metric of each trial over one setting."""
    found = [_row(record, trial) for trial in record.trials if parameter.name in trial.parameters]
    if parameter.values:
        # Every value gets its place, also one that no trial has had yet.
        x = altair.X(
            f"{_column(parameter.name)}:O",
            title=parameter.name,
            scale=altair.Scale(domain=list(parameter.values)),
            axis=altair.Axis(labelAngle=0),
        )
    else:
        kind = "log" if parameter.scale == "log" else "linear"
        scale = altair.Scale(type=kind, domain=[parameter.low, parameter.high], nice=False)
        # 1e-5 is read more easily than 0.00001, but 16 than 1.6e+1.
        axis = altair.Axis(format="~e" if parameter.low < 0.01 and kind == "log" else "~g", tickCount=4)
        x = altair.X(f"{_column(parameter.name)}:Q", title=parameter.name, scale=scale, axis=axis)
    return (
        altair.Chart(altair.Data(values=[row for row in found if row]), width=SIDE, height=SIDE)
        .mark_point(filled=True, size=70, opacity=0.9)
        .encode(
            x=x,
            y=altair.Y("metric:Q", title=record.metric, scale=altair.Scale(zero=False)),
            color=_colour(altair),
            tooltip=["trial:N", "metric:Q", "step:Q", *(f"{_column(one.name)}:N" for one in record.space)],
        )
    )


def _over_steps(altair: Any, record: StudyRecord) -> Any:
    """The metric as each trial measured it."""
    rows = [
        {"trial": trial.id, "step": one.step, "metric": one.metrics[record.metric], "kind": _kind(record, trial)}
        for trial in record.trials
        for one in _measured(trial)
        if record.metric in one.metrics
    ]
    width = min(ABREAST, max(2, len(record.space))) * (SIDE + GAP) - GAP
    return (
        altair.Chart(altair.Data(values=rows), width=width, height=SIDE)
        .mark_line(point=True, opacity=0.8)
        .encode(
            x=altair.X("step:Q", axis=altair.Axis(tickMinStep=1, format="d")),
            y=altair.Y("metric:Q", title=record.metric, scale=altair.Scale(zero=False)),
            detail="trial:N",
            color=_colour(altair),
            tooltip=["trial:N", "step:Q", "metric:Q"],
        )
    )


def _colour(altair: Any) -> Any:
    return altair.Color("kind:N", title=None, scale=altair.Scale(domain=list(COLOURS), range=list(COLOURS.values())))


def _row(record: StudyRecord, trial: Trial) -> dict[str, Any] | None:
    """What a panel knows of a trial; None if it has measured nothing."""
    measured = trial.latest
    if measured is None or record.metric not in measured.metrics:
        return None
    return {
        "trial": trial.id,
        "metric": measured.metrics[record.metric],
        "step": measured.step,
        "kind": _kind(record, trial),
        **{_column(name): value for name, value in trial.parameters.items()},
    }


def _column(parameter: str) -> str:
    """A setting could be called like one of the columns beside it."""
    return f"set_{parameter}"


def _kind(record: StudyRecord, trial: Trial) -> str:
    if record.best and trial.id == record.best.id:
        return BEST
    return OTHER if trial.final else NOT_ENDED


def _measured(trial: Trial) -> tuple[Measurement, ...]:
    return trial.measurements or ((trial.final,) if trial.final else ())
