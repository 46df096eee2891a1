"""``sdtune hpo METHOD``: one command per method, as ``sdtune train`` has them, and those for studies of earlier."""

from __future__ import annotations

import inspect
import os
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from sdtune import events
from sdtune.backends.registry import open_studies
from sdtune.cli import hpo_view, train
from sdtune.cli.options import own_parameters, parameters_of
from sdtune.cli.output import open_console
from sdtune.cli.sections import sectioned
from sdtune.cli.session import JsonOption, ProjectOption, RegionOption, open_session
from sdtune.commands.gathering import archive_placement, dataset_and_output, read_config, typed_settings
from sdtune.commands.hpo import best_of, find_study, plan_study, raise_if_failed, recipe_text, trial_of, winning_recipe
from sdtune.commands.running import uploaded
from sdtune.errors import INTERRUPTED, JobError, RecipeError
from sdtune.jobs.backend import Submitted
from sdtune.jobs.placement import Placement
from sdtune.jobs.study import StudyArchive, StudyRecord
from sdtune.jobs.study_settings import StudySettings
from sdtune.methods.catalog import METHODS
from sdtune.methods.fields import CommonFields

app = typer.Typer(cls=train.Methods, rich_markup_mode=None, no_args_is_help=True, add_completion=False)
JobArgument = Annotated[
    str | None,
    typer.Argument(
        help="Number, name or output of the study; a folder here for one of this machine. Not given: the newest.",
        metavar="[JOB]",
    ),
]


@app.callback()
def group() -> None:
    """Search for better settings of a method, or look at a search: status, trials, best, picture, apply, cancel."""


def run(
    method: type[CommonFields],
    *,
    dataset: str | None,
    output: str | None,
    backend: str | None,
    config: Path | None,
    detach: bool,
    dry_run: bool,
    json: bool,
    **arguments: Any,
) -> None:
    """Check, show the plan, start, follow."""
    recipe = read_config(config, method)
    dataset, output = dataset_and_output(dataset, output, recipe)
    asked = {name: recipe.pop(name) for name in StudySettings.model_fields if name in recipe}
    session = open_session(arguments, recipe, backend=backend, output=output, json=json, dry_run=dry_run)
    studies = open_studies("vertex" if session.placement else "local", session.placement or Placement())
    if detach and not studies.outlives:
        raise RecipeError("detach: a search on this machine ends with the command that started it; leave it out.")
    settings = {**recipe, **typed_settings(method, arguments)}
    asked |= typed_settings(StudySettings, arguments)
    with session.console.checking() as progress:
        plan = plan_study(
            method, settings, asked, dataset, output, session.backend, studies,
            placement=session.placement, mistakes=session.mistakes,
            progress=progress, show=session.console.ledger, offline=dry_run,
        )  # fmt: skip
    view = hpo_view.open_view(json)
    session.console.plan(plan.training, session.backend.place)
    view.plan(plan)
    if dry_run:
        view.rendered(plan.rendered, studies.as_text(plan.rendered))
        return
    try:
        for upload in plan.uploads:
            session.console.follow(uploaded(upload))
        submitted = studies.submit(plan.study)
    except KeyboardInterrupt as left:
        session.console.left(None, str(left))
        raise typer.Exit(INTERRUPTED) from None
    if studies.outlives:
        view.submitted(submitted)
        if submitted.note:
            session.console.follow([events.Note(submitted.note, "warning")])
    if not detach:
        _follow(studies, submitted, view)


def _follow(archive: StudyArchive, study: Submitted, view: hpo_view.View) -> None:
    """Show the study to its end, or until the user leaves. Ends with its error."""
    try:
        # Closing stops a study that does not outlive its launcher, whatever ends this.
        with closing(archive.follow(study.job_id)) as records:
            last = view.follow(records)
    except KeyboardInterrupt:
        view.left(study if archive.outlives else None)
        raise typer.Exit(INTERRUPTED) from None
    raise_if_failed(last)


@app.command()
def status(
    job: JobArgument = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends; with its exit code.")] = False,
    project: ProjectOption = None,
    region: RegionOption = None,
    json: JsonOption = False,
) -> None:
    """Show a study: its trials, their settings, what they measured."""
    archive, record = _find(job, project, region)
    view = hpo_view.open_view(json)
    if follow:
        _follow(archive, Submitted(record.study_id, record.number, record.region, record.url), view)
    else:
        view.study(record)


@app.command()
def trials(
    job: JobArgument = None, project: ProjectOption = None, region: RegionOption = None, json: JsonOption = False
) -> None:
    """List the trials of a study, the best first, those without a result last."""
    _, record = _find(job, project, region)
    hpo_view.open_view(json).trials(record)


@app.command()
def best(
    job: JobArgument = None, project: ProjectOption = None, region: RegionOption = None, json: JsonOption = False
) -> None:
    """Show the best trial of a study: its settings, its metric, its result."""
    _, record = _find(job, project, region)
    hpo_view.open_view(json).best(record, best_of(record))


@app.command()
def picture(
    job: JobArgument = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.", metavar="DIR")] = Path(),
    project: ProjectOption = None,
    region: RegionOption = None,
    json: JsonOption = False,
) -> None:
    """Draw the metric against each setting and over the steps, as NAME.png and as NAME.html."""
    from sdtune.commands.hpo_picture import draw

    _, record = _find(job, project, region)
    files = [str(file) for file in draw(record, output)]
    open_console(json).say(f"Wrote {' and '.join(files)}", files=files)


@app.command()
def apply(
    job: JobArgument = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.", metavar="FILE")] = Path("best.yaml"),
    trial: Annotated[str | None, typer.Option("--trial", help="Another trial than the best, by its number.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    project: ProjectOption = None,
    region: RegionOption = None,
    json: JsonOption = False,
) -> None:
    """Write the recipe of the best trial, for sdtune train METHOD --config FILE."""
    if output.exists() and not overwrite:
        raise RecipeError(f"output: {output} is there already; choose another file, or add --overwrite.")
    _, record = _find(job, project, region)
    chosen = best_of(record) if trial is None else trial_of(record, trial)
    output.write_text(recipe_text(record, chosen), encoding="utf-8")
    open_console(json).say(
        f"Wrote {output}, trial {chosen.id} of {record.name}. Train it with: "
        f"sdtune train {record.method} --config {output}",
        file=str(output), trial=chosen.id, recipe=winning_recipe(record, chosen),
    )  # fmt: skip


@app.command()
def cancel(
    job: Annotated[str, typer.Argument(help="Number, name or output of the study.", metavar="JOB")],
    project: ProjectOption = None,
    region: RegionOption = None,
    json: JsonOption = False,
) -> None:
    """End a study and the trials that run. What it has found is kept."""
    archive, record = _find(job, project, region)
    archive.cancel(record.study_id)
    open_console(json).say(
        f"Study {record.number} ({record.name}) is being cancelled; this shows when it has ended: "
        f"sdtune hpo status {hpo_view.named(record)}",
        study=record.number,
    )


def _find(job: str | None, project: str | None, region: list[str] | None) -> tuple[StudyArchive, StudyRecord]:
    """The study that was asked for, and the place that remembers it."""
    if job is not None and (folder := Path(job).expanduser()).is_dir():
        here = open_studies("local", Placement())
        try:
            return here, here.find(str(folder.resolve()))
        except JobError:
            # A study in the cloud may be called like some folder that happens to be here.
            if os.sep in job or job.startswith("."):
                raise
    cloud = open_studies("vertex", archive_placement(project, region))
    return cloud, find_study(cloud, job)


JOB_OPTIONS = {
    **{name: option for name, option in train.JOB_OPTIONS.items() if name != "overwrite"},
    "output": Annotated[
        str | None,
        typer.Option(
            "--output",
            help="Folder of the search, here or gs://; each trial writes to trials/NUMBER in it.  [required]",
            metavar="DIR",
        ),
    ],
}


def command(method: type[CommonFields]) -> Any:
    """The command of one method: the job's options, the search's, the method's, then where in the cloud."""

    def search(**arguments: Any) -> None:
        run(method, **arguments)

    of_search = {*JOB_OPTIONS, *StudySettings.model_fields}
    parameters = [
        *own_parameters(JOB_OPTIONS, train.DEFAULTS),
        *parameters_of(StudySettings, taken=set(JOB_OPTIONS)),
        *parameters_of(method, taken={*of_search, *Placement.model_fields}),
        *parameters_of(Placement, taken=of_search),
    ]
    search.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return search


for method in METHODS.values():
    sections = {"Job": set(JOB_OPTIONS), "Search": set(StudySettings.model_fields)}
    sections |= {name: options for name, options in train.sections(method).items() if name != "Job"}
    text = f"Search for better settings. {method.summary}"
    app.command(method.name, help=text, short_help=method.summary, cls=sectioned(sections))(command(method))
