"""Hpo: plan a search for better settings, find it again, and make a recipe of its best trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdtune.commands.checks import Mistakes
from sdtune.commands.train import TrainingPlan, plan_train
from sdtune.commands.validate import Progress
from sdtune.errors import JobError, RecipeError
from sdtune.jobs.backend import Backend, Upload
from sdtune.jobs.memory import memory_advice
from sdtune.jobs.placement import Placement
from sdtune.jobs.search_space import SearchSpace, search_space
from sdtune.jobs.study import TRIALS_FOLDER, Study, StudyArchive, StudyBackend, StudyRecord, Trial
from sdtune.jobs.study_settings import StudySettings
from sdtune.methods.base import HELD_OUT_LOSS, MORE, RECIPE
from sdtune.methods.catalog import find_method
from sdtune.methods.fields import CommonFields
from sdtune.methods.ledger import Ledger
from sdtune.methods.settings import as_yaml

BEST_FOLDER = "best"
"""Beside the trials: where a run of the winning recipe goes unless told."""


@dataclass(frozen=True)
class StudyPlan:
    """A search that passed every check and can be started. notes: beside those of the trials' run."""

    study: Study
    training: TrainingPlan
    rendered: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def uploads(self) -> tuple[Upload, ...]:
        return self.training.uploads


def plan_study(
    method: type[CommonFields],
    settings: Mapping[str, Any],
    asked: Mapping[str, Any],
    dataset: str | None,
    output: str | None,
    backend: Backend,
    studies: StudyBackend,
    *,
    placement: Placement | None = None,
    mistakes: Mistakes | None = None,
    progress: Progress | None = None,
    show: Callable[[Ledger], None] | None = None,
    offline: bool = False,
) -> StudyPlan:
    """The plan of a search. Writes nothing; one error tells every mistake.

    settings: of the method, in which trials are alike; asked: of the search. offline: its place is not asked either.
    """
    mistakes = mistakes or Mistakes()
    options: StudySettings | None = None
    space: SearchSpace | None = None
    with mistakes:
        options = StudySettings.from_settings(asked)
    base = _valid(method, settings)
    with mistakes:
        space = search_space(method, options.tune if options else _texts(asked.get("tune")), base)
    if base:
        with mistakes:
            _check_trials_apart(base, placement)
    if options:
        with mistakes:
            _check_metric(method, options, base)
        if space:
            with mistakes:
                _check_grid(options, space)
    training = plan_train(
        method, settings, dataset, output, backend, placement=placement, mistakes=mistakes,
        progress=progress, show=show,
    )  # fmt: skip
    assert options
    assert space
    study = Study(
        name=training.job.name,
        method=method.name,
        space=space,
        metric=options.metric or method.metrics[0],
        job=training.job,
        max_trials=options.max_trials,
        parallel_trials=options.parallel,
        max_failed_trials=min(options.max_failed_trials, options.max_trials),
        algorithm=options.algorithm,
        early_stopping=options.early_stopping,
        measurement=options.measurement,
        seed_per_trial=options.seed_per_trial,
    )
    notes = list(_notes(study, training))
    if not offline:
        notes += studies.check(study)
    return StudyPlan(study, training, studies.render(study), tuple(notes))


def _valid(method: type[CommonFields], settings: Mapping[str, Any]) -> CommonFields | None:
    """The recipe that trials start from; None if it has mistakes, which planning its run tells."""
    try:
        return method.from_settings(settings)
    except RecipeError:
        return None


def _texts(tune: object) -> tuple[str, ...]:
    """What was to be varied, where other settings of the search are wrong."""
    return tuple(map(str, tune)) if isinstance(tune, list | tuple) else ()


def _check_trials_apart(base: CommonFields, placement: Placement | None) -> None:
    """RecipeError: what every trial would write to one place, the last over all others."""
    if base.push_to_hub:
        raise RecipeError(
            "push_to_hub: every trial would upload its result over the last one's; leave it out, and add it to the "
            "run of the winning recipe."
        )
    if placement and placement.save_nfs:
        raise RecipeError(
            "save_nfs: every trial would copy its models over the last one's; leave it out, and copy the best with "
            "sdtune sync-nfs."
        )


def _check_metric(method: type[CommonFields], options: StudySettings, base: CommonFields | None) -> None:
    metric = options.metric or method.metrics[0]
    if metric not in method.metrics:
        raise RecipeError(
            f"metric: found {metric!r}, which {method.name} does not report; wanted {' or '.join(method.metrics)}."
        )
    if base and options.early_stopping != "none" and metric == HELD_OUT_LOSS and not base.held_out_every:
        raise RecipeError(
            f"early_stopping: found {options.early_stopping}, but the held-out loss is measured at the end alone; add "
            f"--held-out-every {max(1, base.max_train_steps // 8)}, or use none."
        )


def _check_grid(options: StudySettings, space: SearchSpace) -> None:
    if options.algorithm != "grid":
        return
    if ranges := [one.name for one in space if one.kind == "double"]:
        raise RecipeError(
            f"algorithm: found grid, but {' and '.join(ranges)} can be any number between its bounds; name its values: "
            f"--tune {ranges[0]}=A,B,C."
        )


def _notes(study: Study, training: TrainingPlan) -> Iterator[str]:
    if study.metric == HELD_OUT_LOSS and not training.method.held_out_images:
        yield (
            "no picture is held out, so settings win that learn the training pictures by heart; keep some out with "
            "--held-out-images."
        )
    if advice := _memory_of_the_largest(study, training):
        yield advice


def _memory_of_the_largest(study: Study, training: TrainingPlan) -> str | None:
    """A warning if the trial with the most of everything will not fit the GPU, although the recipe does."""
    machine = training.job.machine
    if machine is None or machine.gpu is None:
        return None
    most = {one.name: "true" if "true" in one.values else one.extremes[-1] for one in study.space}
    values = study.space.active(most)
    largest = _valid(type(training.method), {**training.method.settings(), **values})
    advice = memory_advice(largest, training.base_model, machine.gpu) if largest else None
    if advice is None or advice in training.notes:
        return None
    return f"of the trial with {', '.join(f'{name} {value}' for name, value in values.items())}: {advice}"


def find_study(archive: StudyArchive, study: str | None) -> StudyRecord:
    """The study that was named; the newest if none was."""
    if study is not None:
        return archive.find(study)
    newest = next(archive.studies(), None)
    if newest is None:
        raise JobError("there is no study of sdtune here yet; sdtune hpo METHOD makes one.")
    return archive.find(newest.study_id)


def raise_if_failed(record: StudyRecord) -> None:
    """JobError if the study has ended without having tried what it was to try, or without a best trial."""
    if record.state in ("failed", "expired"):
        raise JobError(f"the study ended as {record.state}: {record.error or _why_not(record)}")
    if record.state == "cancelled":
        raise JobError("the study was cancelled; what its trials found is kept, and sdtune hpo best shows the best.")
    if record.has_ended and record.best is None:
        raise JobError(f"no trial has a {record.metric}: {_why_not(record)}")


def best_of(record: StudyRecord) -> Trial:
    """The best trial so far. JobError if no trial has a metric that counts."""
    if record.best is None:
        more = _why_not(record) if record.has_ended else "the study still runs; ask again later."
        raise JobError(f"study {record.number} has no trial with a {record.metric} that counts: {more}")
    return record.best


def trial_of(record: StudyRecord, trial: str) -> Trial:
    """The trial of this number. RecipeError if there is none."""
    for one in record.trials:
        if one.id == trial:
            return one
    raise RecipeError(f"trial: study {record.number} has no trial {trial}; sdtune hpo trials lists them.")


def winning_recipe(record: StudyRecord, trial: Trial) -> dict[str, Any]:
    """The settings of ``trial``, where its pictures are and where it ran, as a recipe that ``sdtune train`` runs."""
    options = {name: value for name, equals, value in (arg.partition("=") for arg in record.args) if equals}
    recipe = [arg for arg in record.args if arg.startswith((RECIPE, MORE))]
    if not record.method or not recipe:
        raise JobError(f"study {record.number} was not made by sdtune, so its recipe is not known.")
    varied = [f"--{name}={value}" for name, value in trial.parameters.items()]
    method = find_method(record.method).from_args([*recipe, *varied])
    if record.seed_per_trial:
        # As the trial itself did.
        method = method.model_copy(update={"seed": (method.seed + int(trial.id)) % 2**32})
    return {
        "method": method.name,
        "dataset": options.get("--dataset"),
        "output": f"{record.output}/{BEST_FOLDER}",
        **record.places,
        **method.recipe(),
    }


def recipe_text(record: StudyRecord, trial: Trial) -> str:
    """The same as the YAML file that ``sdtune hpo apply`` writes."""
    value = record.value_of(trial)
    varied = ", ".join(f"{name} {value}" for name, value in trial.parameters.items())
    measured = "without a metric" if value is None else f"{record.metric} {value:.6g}"
    head = (
        f"# Trial {trial.id} of the study {record.name!r}, {measured}: {varied}.\n"
        f"# Its own result is at {record.folder_of(trial)}\n"
        f"# Train it again with: sdtune train {record.method} --config THIS_FILE\n"
    )
    return head + as_yaml(winning_recipe(record, trial))


def _why_not(record: StudyRecord) -> str:
    """What the last trial that failed said of it."""
    reasons = [trial.reason for trial in record.trials if trial.reason]
    return reasons[-1] if reasons else f"its results, if any, are in {record.output}/{TRIALS_FOLDER}"
