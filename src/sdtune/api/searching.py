"""``sdtune.hpo``: ``sdtune hpo METHOD`` as a function, and a search looked at: its trials, its best, its recipe."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from sdtune.api import pages
from sdtune.api.arguments import Config, Place, as_text, checked, recipe_of, warnings_of
from sdtune.api.going import Going
from sdtune.api.options import HpoOptions
from sdtune.api.runs import near
from sdtune.api.samples import as_jpeg
from sdtune.api.screens import Screen, open_screen
from sdtune.backends.registry import BACKENDS, open_backend, open_studies
from sdtune.commands.gathering import archive_placement, dataset_and_output, destination, typed_settings
from sdtune.commands.hpo import StudyPlan, best_of, find_study, plan_study, raise_if_failed, trial_of, winning_recipe
from sdtune.commands.plans import Rows, training_rows
from sdtune.commands.running import uploaded
from sdtune.commands.words import count
from sdtune.errors import JobError, SdtuneError
from sdtune.jobs.backend import Submitted
from sdtune.jobs.placement import Placement
from sdtune.jobs.study import StudyArchive, StudyBackend, StudyRecord, Trial
from sdtune.jobs.study_settings import StudySettings
from sdtune.methods.catalog import find_method

TRIALS_SHOWN = 12
"""In a cell: the best of those that have ended, and all that run."""
# tqdm, which Optuna brings along, says so in every notebook; none of its bars is shown.
warnings.filterwarnings("ignore", message="IProgress not found")


def hpo(
    method: str,
    *,
    dataset: Place | None = None,
    output: Place | None = None,
    backend: str | None = None,
    config: Config | None = None,
    dry_run: bool = False,
    wait: bool = True,
    show: bool = True,
    **options: Unpack[HpoOptions],
) -> Search:
    """Search for better settings of ``method``; trials are compared on the same pictures, noise and timesteps.

    output: folder of the search, here or at gs://; each trial writes to trials/NUMBER in it. options: what is varied,
    ``tune=["learning_rate=1e-5:1e-3:log", "rank=4,8"]``, how often, ``max_trials=12``, the settings in which all trials
    are alike, and where in the cloud. dataset, backend, config, dry_run, wait, show: as in ``train``.

    Interrupted, or cancelled, a search on this machine goes on where it was when it is called for again.
    RecipeError, DatasetError: every mistake, told before anything is started.
    """
    chosen = find_method(method)
    given = checked(options, chosen, StudySettings, Placement)
    recipe = recipe_of(config, chosen)
    data, target = dataset_and_output(as_text(dataset), as_text(output), recipe)
    asked = {name: recipe.pop(name) for name in StudySettings.model_fields if name in recipe}
    to = destination(given, recipe, backend=backend, output=target, dry_run=dry_run, backends=BACKENDS)
    where = open_backend(to.backend, to.placement or Placement(), offline=to.offline)
    studies = open_studies(to.backend, to.placement or Placement())
    plan = plan_study(
        chosen, {**recipe, **typed_settings(chosen, given)}, asked | typed_settings(StudySettings, given), data, target,
        where, studies, placement=to.placement, mistakes=to.mistakes, offline=dry_run,
    )  # fmt: skip
    search = Search.planned(plan, studies, where.place, open_screen(show), dry_run)
    return search.show_plan() if dry_run else search.start(wait)


def find_search(
    job: Place | None = None, *, project: str | None = None, region: str | Sequence[str] | None = None,
    follow: bool = False, wait: bool = True, show: bool = True,
) -> Search:  # fmt: skip
    """A search of earlier: the output folder of one of this machine, else number, name or output; None: the newest.

    follow: show it to its end, as the call that started it did. JobError: there is none.
    """
    named = as_text(job)
    archive: StudyArchive
    if named is not None and (folder := Path(named).expanduser()).is_dir():
        archive = open_studies("local", Placement())
        record = archive.find(str(folder.resolve()))
    else:
        regions = region if isinstance(region, str | None) else list(region)
        archive = open_studies("vertex", archive_placement(project, regions))
        record = find_study(archive, named)
    search = Search(record.name, record.method, archive, record.region or "this machine", open_screen(show))
    search.record, search.state = record, record.state
    if follow:
        search._followed = Submitted(record.study_id, record.number, record.region, record.url)
        return search.start(wait)
    if record.has_ended:
        search._ended.set()
    return search


class Search(Going):
    """A search that goes on in the background. record: all that is known of it, None before its first trial."""

    def __init__(self, name: str, method: str, archive: StudyArchive, place: str, screen: Screen) -> None:
        super().__init__(archive.outlives)
        self.name, self.method = name, method
        self.record: StudyRecord | None = None
        self._archive, self._place, self._screen = archive, place, screen
        self._plan: StudyPlan | None = None
        self._rendered = ""
        self._doing = ""
        self._followed: Submitted | None = None
        self._picture: bytes | None = None

    @classmethod
    def planned(cls, plan: StudyPlan, studies: StudyBackend, place: str, screen: Screen, dry_run: bool) -> Search:
        """One that is to be started."""
        search = cls(plan.study.name, plan.study.method, studies, place, screen)
        search._plan = plan
        search._rendered = studies.as_text(plan.rendered) if dry_run else ""
        return search

    def __repr__(self) -> str:
        return f"<hpo {self.method} {self.name}: {self.state}, {count(len(self.trials), 'trial')}>"

    # What is asked of it ----------------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> Trial:
        """Wait for the end; the best trial. JobError: there is none, and why. TimeoutError: not ended by then."""
        self._await(timeout)
        self._raise_error()
        return self.best

    @property
    def trials(self) -> list[Trial]:
        """All trials so far, in their order."""
        return list(self.record.trials) if self.record else []

    @property
    def best(self) -> Trial:
        """The best trial so far. JobError: none has a metric that counts."""
        return best_of(self._known())

    def value_of(self, trial: Trial) -> float | None:
        """What counts of a trial: its metric, lower is better; None where it has none."""
        return self._known().value_of(trial)

    def output_of(self, trial: Trial) -> str:
        """Where the trial's own result is."""
        return self._known().folder_of(trial)

    def recipe(self, trial: str | None = None) -> dict[str, Any]:
        """The recipe of the best trial, or of another by its number, for ``sdtune.train(method, config=...)``."""
        record = self._known()
        return winning_recipe(record, best_of(record) if trial is None else trial_of(record, trial))

    def picture(self) -> Image.Image:
        """The metric against each setting, and over the steps. ProjectError: needs the extra ``hpo``."""
        from sdtune.commands.hpo_picture import draw

        with tempfile.TemporaryDirectory() as folder:
            png, _ = draw(self._known(), Path(folder))
            with Image.open(png) as picture:
                return picture.convert("RGB")

    def _known(self) -> StudyRecord:
        if self.record is None:
            raise JobError(f"{self._what()} has no trial yet ({self.state}).")
        return self.record

    # What it shows ----------------------------------------------------------------------------------------------------

    def as_html(self) -> str:
        """See Showable."""
        record = self.record
        ended = sum(trial.ended is not None for trial in record.trials) if record else 0
        figures = f"{ended} of {record.max_trials} trials have ended" if record else ""
        if record and record.best:
            figures += f"; best: trial {record.best.id}, {record.metric} {record.value_of(record.best):.5g}"
        running = record is not None and not record.has_ended and not self.done
        return pages.page(
            f"hpo {self.method} {self.name}", self._place, self.state, self._rows(),
            doing="Searching" if running else "" if self.done else self._doing,
            share=ended / record.max_trials if record else None, figures=figures, notes=self._notes(),
            trouble=str(self._error) if self._error else "",
            below=(self._table(record) if record else "") + (pages.code(self._rendered) if self._rendered else ""),
        )  # fmt: skip

    def as_text(self) -> str:
        """See Showable."""
        lines = [f"hpo {self.method} {self.name} on {self._place}: {self.state}"]
        if self.record:
            lines += ["  " + "  ".join(cells) for cells in self._cells(self.record)]
        else:
            lines += [f"  {name:<14}{value}" for name, value in self._rows() if value]
            lines += [f"  warning: {note}" for note in self._notes()]
        return "\n".join([*lines, *([self._rendered] if self._rendered else [])])

    def as_picture(self) -> bytes | None:
        """See Showable: at the end alone, where the libraries for it are there."""
        if self.done or (self.record and self.record.has_ended):
            if self._picture is None and self.record:
                with suppress(SdtuneError):
                    self._picture = as_jpeg(self.picture())
            return self._picture
        return None

    def _rows(self) -> Rows:
        if self._plan is None:
            return [("output", near(self.record.output))] if self.record else []
        space = [(one.name, one.words) for one in self._plan.study.space]
        return [*((name, near(value)) for name, value in training_rows(self._plan.training)), *space]

    def _notes(self) -> list[str]:
        if self._plan is None:
            return []
        return [*self._plan.notes, *self._plan.training.notes, *warnings_of(self._plan.training.ledger)]

    def _table(self, record: StudyRecord) -> str:
        names = [one.name for one in record.space]
        return pages.grid(["trial", "state", record.metric, "step", *names], self._cells(record))

    def _cells(self, record: StudyRecord) -> list[list[str]]:
        """A row for each trial, best first, then those that run."""
        best = record.best
        rest = [trial for trial in record.trials if trial not in record.ranked]
        rows = []
        for trial in [*record.ranked[:TRIALS_SHOWN], *rest]:
            latest = trial.latest
            value = latest.metrics.get(record.metric) if latest else None
            rows.append([
                trial.id + (" ★" if best and best.id == trial.id else ""), trial.state,
                "" if value is None else f"{value:.5g}", str(latest.step) if latest else "",
                *(_shown(trial.parameters.get(one.name, "")) for one in record.space),
            ])  # fmt: skip
        return rows

    # How it goes ------------------------------------------------------------------------------------------------------

    def show_plan(self) -> Search:
        """Only that, of a search that is not started."""
        self._screen.begin(self)
        return self

    def start(self, wait: bool) -> Search:
        """Begin, and show it from now on. wait: until it ends."""
        self._screen.begin(self)
        return self._start(wait)

    def _work(self) -> None:
        followed = self._followed or self._submit()
        self._followed = followed
        if self._cancelled and not self.outlives:
            raise JobError("cancelled")
        # Closing stops a search that does not outlive its launcher, whatever ends this.
        with closing(self._archive.follow(followed.job_id)) as records:
            for record in records:
                known = {trial.id: trial for trial in self.trials}
                self.record, self.state = record, record.state
                for trial in record.trials:
                    if trial.ended and not (trial.id in known and known[trial.id].ended):
                        self._screen.line(f"  trial {trial.id}: {trial.state} {trial.reason}".rstrip())
                self._screen.change(self)
        raise_if_failed(self._known())
        if self._cancelled:
            raise JobError("cancelled")

    def _submit(self) -> Submitted:
        plan = self._plan
        assert plan
        for upload in plan.uploads:
            for event in uploaded(upload):
                self._doing = getattr(event, "text", self._doing)
                self._screen.change(self)
        studies = self._archive
        return studies.submit(plan.study)  # type: ignore[attr-defined, no-any-return]  # planned with a StudyBackend

    def _stop(self) -> None:
        if self._followed:
            # It may end just now by itself.
            with suppress(JobError):
                self._archive.cancel(self._followed.job_id)

    def _show_end(self) -> None:
        self._screen.end(self)

    def _what(self) -> str:
        return f"the search {self.name}"

    def _left(self) -> str:
        if not self.outlives:
            return f"{self._what()} was stopped; called for again, with the same output, it goes on where it was."
        number = self._followed.number if self._followed else self.name
        return (
            f"{self._what()} goes on without this cell. See it again with sdtune.find_search({number!r}, follow=True)."
        )


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
