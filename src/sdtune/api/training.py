"""``sdtune.train``: ``sdtune train METHOD`` as a function."""

from __future__ import annotations

from typing import Unpack

from sdtune.api.arguments import Config, Place, as_text, checked, recipe_of, warnings_of
from sdtune.api.options import TrainOptions
from sdtune.api.runs import About, Run
from sdtune.api.screens import open_screen
from sdtune.backends.registry import BACKENDS, open_backend, open_builder
from sdtune.commands.build import image_remark
from sdtune.commands.gathering import dataset_and_output, destination, typed_settings
from sdtune.commands.plans import training_rows
from sdtune.commands.running import JobRun
from sdtune.commands.train import TrainingPlan, plan_train
from sdtune.jobs.backend import Backend
from sdtune.jobs.placement import Placement
from sdtune.methods.catalog import find_method


def train(
    method: str,
    *,
    dataset: Place | None = None,
    output: Place | None = None,
    backend: str | None = None,
    config: Config | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    wait: bool = True,
    show: bool = True,
    **options: Unpack[TrainOptions],
) -> Run:
    """Fine-tune a model by ``method``, such as ``"dreambooth-lora"``; ``sdtune train METHOD --help`` tells its options.

    dataset: folder with the training pictures, here or at gs://. output: folder for the result; one at gs:// makes it a
    job on Vertex AI. backend: ``"local"`` or ``"vertex"`` where that is to be said. config: a YAML recipe, or settings
    as a dict; what is given beside it wins. overwrite: begin anew, whatever ``output`` holds of a run; without, what
    was stopped goes on, and of what has finished the result is returned. dry_run: check, show what
    would run, and start nothing. wait: return at the end, and raise the run's error; else return at once, and let it go
    on. show: in the cell, or as lines. options: settings of the method, and where in the cloud, as ``gpu="l4"``.

    RecipeError, DatasetError: every mistake, told before anything is started.
    """
    chosen = find_method(method)
    given = checked(options, chosen, Placement)
    recipe = recipe_of(config, chosen)
    data, target = dataset_and_output(as_text(dataset), as_text(output), recipe)
    to = destination(given, recipe, backend=backend, output=target, dry_run=dry_run, backends=BACKENDS)
    where = open_backend(to.backend, to.placement or Placement(), offline=to.offline)
    plan = plan_train(
        chosen, {**recipe, **typed_settings(chosen, given)}, data, target, where,
        placement=to.placement, mistakes=to.mistakes, overwrite=overwrite, goes_on=True,
        remark=image_remark(to.placement, to.offline, open_builder),
    )  # fmt: skip
    run = Run(
        about(plan, where, dry_run), JobRun(plan.job, plan.uploads, where), where, open_screen(show), where.cancel
    )
    if plan.earlier.finished and not dry_run:
        return run.finished_earlier(plan.earlier.finished)
    return run.show_plan() if dry_run else run.start(wait)


def about(plan: TrainingPlan, backend: Backend, dry_run: bool) -> About:
    """What is shown of the plan."""
    return About(
        plan.method.name,
        plan.job.name,
        plan.job.output,
        backend.place,
        training_rows(plan),
        [*plan.notes, *warnings_of(plan.ledger)],
        plan.method,
        backend.as_text(plan.rendered) if dry_run else "",
        plan.earlier.step,
    )
