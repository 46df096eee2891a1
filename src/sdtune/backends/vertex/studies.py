"""Hyperparameter tuning jobs of Vertex AI: made once, found again, followed trial by trial, cancelled."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import yaml
from google.api_core import exceptions as api
from google.auth.exceptions import GoogleAuthError
from requests import RequestException

from sdtune import events
from sdtune.backends.vertex.asking import Project, first_line
from sdtune.backends.vertex.claims import claim_of, claimed
from sdtune.backends.vertex.google import StudiesClient
from sdtune.backends.vertex.quota_checks import gpu_quota
from sdtune.backends.vertex.reasons import translate
from sdtune.backends.vertex.regions import Regions
from sdtune.backends.vertex.specs import RUN_LABEL, VERSION_LABEL
from sdtune.backends.vertex.study_specs import COLLECTION, study_record, tuning_job
from sdtune.errors import CapacityError, JobError, RecipeError, SdtuneError
from sdtune.jobs.backend import Submitted
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import RUN_ID
from sdtune.jobs.study import Study, StudyRecord

SOONEST, LATEST = 1.0, 15.0
"""Seconds between two looks at a study: soon after a change, rarer while there is none."""


class VertexStudies:
    """The studies of a project in the regions of ``placement``."""

    outlives: ClassVar[bool] = True

    def __init__(self, placement: Placement) -> None:
        self._regions = Regions(placement)
        self.placement = self._regions.placement
        self._client = StudiesClient()

    def render(self, study: Study) -> dict[str, Any]:
        """See StudyBackend."""
        return tuning_job(study, self.placement)

    def as_text(self, rendered: dict[str, Any]) -> str:
        """See StudyBackend: as gcloud ai hp-tuning-jobs create --config takes it, names apart."""
        text: str = yaml.safe_dump(rendered, sort_keys=False, allow_unicode=True, width=1_000_000)
        return text.rstrip()

    def check(self, study: Study) -> list[str]:
        """See StudyBackend: the GPUs of all trials at a time, held against the quota. A note where it is not told."""
        notes = []
        if study.algorithm == "grid" and (points := study.space.points) not in (None, study.max_trials):
            notes.append(f"the grid has {points} points, and max_trials is {study.max_trials}: the fewer are tried.")
        return [*notes, *self._check_quota(study)]

    def _check_quota(self, study: Study) -> list[str]:
        machine = study.job.machine
        if machine is None or machine.gpu is None:
            return []
        at_a_time = self.placement.replicas * study.parallel_trials
        wanted = self.placement.model_copy(update={"replicas": at_a_time})
        try:
            found = gpu_quota(Project(wanted), machine)
        except (SdtuneError, api.GoogleAPIError, GoogleAuthError, RequestException) as error:
            return [f"whether the quota suffices for {study.parallel_trials} trials at a time was not told: "
                    f"{first_line(error)}"]  # fmt: skip
        if found.grade == "bad":
            raise RecipeError(
                f"parallel_trials: found {study.parallel_trials}, but {found.text}. Use fewer at a time. {found.note}"
            )
        return [f"{found.text}. {found.note}".strip()] if found.grade == "warning" else []

    def submit(self, study: Study) -> Submitted:
        """See StudyBackend: in the first region that has capacity. JobError, ProjectError: it is refused, and why."""
        claim = claim_of(study.output, self.placement, study.job.run_id, COLLECTION)
        with claimed(claim):
            return self._submit_somewhere(study)

    def _submit_somewhere(self, study: Study) -> Submitted:
        rendered = self.render(study)
        *others, last = self.placement.region
        for region in others:
            try:
                return self._submit(rendered, region, study.job.run_id)
            except CapacityError:
                continue
        return self._submit(rendered, last, study.job.run_id)

    def find(self, study: str) -> StudyRecord:
        """See StudyArchive."""
        regions = str(self._regions)
        if study.startswith("projects/"):
            return self._get(study)
        if RUN_ID.fullmatch(study) and (found := self._of_run(study)):
            return self._get(found.study_id)
        if study.isdigit():
            job = self._regions.first("the study cannot be looked at", COLLECTION, study, self._client.get)
            if job is None:
                raise JobError(f"there is no study {study} in {regions}; --region says where else to look.")
            return self._in_words(study_record(job))
        wanted = study.rstrip("/")
        if found := next((one for one in self.studies() if wanted in (one.name, one.output)), None):
            return self._get(found.study_id)
        raise JobError(f"no study of sdtune is called {study!r} in {regions}; --region says where else to look.")

    def _of_run(self, run_id: str) -> StudyRecord | None:
        """What carries a submission's label, in any of the regions."""
        found = (self._listed(region, f"labels.{RUN_LABEL}={run_id}") for region in self.placement.region)
        return next(chain.from_iterable(found), None)

    def studies(self) -> Iterator[StudyRecord]:
        """See StudyArchive."""
        for region in self.placement.region:
            yield from self._listed(region, f"labels.{VERSION_LABEL}:*")

    def follow(self, study_id: str) -> Generator[StudyRecord, None, None]:
        """See StudyArchive."""
        seen: StudyRecord | None = None
        pause = SOONEST
        while True:
            found = self._get(study_id)
            if found != seen:
                yield found
                seen, pause = found, SOONEST
            if found.has_ended:
                return
            time.sleep(pause)
            pause = min(1.5 * pause, LATEST)

    def cancel(self, study_id: str) -> None:
        """See StudyArchive."""
        found = self._get(study_id)
        if found.has_ended:
            raise JobError(f"study {found.number} has ended already ({found.state}); there is nothing to cancel.")
        with self._regions.asking("the study cannot be cancelled", study_id):
            try:
                self._client.cancel(study_id)
            except api.BadRequest:
                # So says the service, too, where the answer to a first request was lost.
                if self._get(study_id).state not in ("cancelling", "cancelled"):
                    raise

    def _submit(self, rendered: dict[str, Any], region: str, run_id: str) -> Submitted:
        """Make the study in ``region``, once, whatever becomes of an answer."""
        named = f"{run_id} --region {region}"
        return self._regions.make_once(
            "the study cannot be submitted",
            region,
            f"sdtune hpo status {named} tells, and sdtune hpo cancel {named} ends it.",
            lambda: _submitted(study_record(self._client.create(self._regions.parent(region), rendered))),
            lambda: map(_submitted, self._listed(region, f"labels.{RUN_LABEL}={run_id}")),
            lambda made: self.cancel(made.job_id),
        )

    def _get(self, study_id: str) -> StudyRecord:
        with self._regions.asking("the study cannot be looked at", study_id):
            return self._in_words(study_record(self._client.get(study_id)))

    def _in_words(self, found: StudyRecord) -> StudyRecord:
        """The study with its errors in the user's terms."""
        trials = tuple(
            replace(trial, reason=self._why(trial.reason, found.region)) if trial.reason else trial
            for trial in found.trials
        )
        error = self._why(found.error, found.region) if found.error else ""
        return replace(found, trials=trials, error=error)

    def _why(self, message: str, region: str) -> str:
        """What the trainer itself said last, where the message has it."""
        said = (event for line in message.splitlines() if isinstance(event := events.parse(line), events.Failed))
        failed = next(said, None)
        return failed.text if failed else translate(message, self._regions.place(region)).text

    def _listed(self, region: str, text: str) -> Iterator[StudyRecord]:
        ask = partial(self._client.list, text=text)
        return map(study_record, self._regions.listed("studies cannot be listed", region, ask))


def _submitted(study: StudyRecord) -> Submitted:
    return Submitted(study.study_id, study.number, study.region, study.url)
