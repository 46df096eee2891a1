"""A search as Optuna keeps it in study.db: what is searched, its trials, what is tried next."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtune.backends.local.sampling import as_suggested, grid, suggest
from sdtune.backends.local.stopping import RULES
from sdtune.backends.local.trial_process import end_orphan
from sdtune.errors import JobError, RecipeError
from sdtune.jobs.search_space import Parameter, Parent, SearchSpace, Value
from sdtune.jobs.study import Measurement, Study, StudyRecord, Trial, TrialState
from sdtune.methods.base import MORE, RECIPE, recipe_in
from sdtune.methods.catalog import find_method
from sdtune.methods.fields import CommonFields

if TYPE_CHECKING:
    import optuna

FILE = "study.db"
MOST_DEATHS = 3
"""A trial whose search died so often while it ran is not tried again: it may be what kills it."""
KEPT = ("metric", "goal", "algorithm", "early_stopping", "measurement")
"""What a search that goes on must have as before, beside its space and the recipe of its trials."""


@dataclass(frozen=True)
class Asked:
    """A trial to run."""

    trial_id: str
    values: dict[str, Value]


class OptunaStudy:
    """The study in ``folder``. A trial's number is ours: one that is tried again keeps it, and is new to Optuna."""

    def __init__(self, folder: Path) -> None:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self.folder = folder
        self._optuna = optuna
        self._running: dict[str, optuna.Trial] = {}
        try:
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{folder / FILE}")
            names = [study.study_name for study in self._storage.get_all_studies()]
            self._study = optuna.load_study(study_name=names[0], storage=self._storage) if names else None
        except (SQLAlchemyError, RuntimeError, optuna.exceptions.OptunaError) as error:
            # The second where another version of Optuna made it.
            raise JobError(f"{folder / FILE} cannot be read as a study: {str(error).splitlines()[0]}") from None

    @property
    def study(self) -> optuna.Study:
        assert self._study is not None
        return self._study

    def begin(self, study: Study) -> None:
        """Note down what is searched; of a search that goes on, see that it is the same, and take up what was left.

        RecipeError: it is not the same.
        """
        if self._study is None:
            self._study = self._optuna.create_study(storage=self._storage, study_name=study.name, direction=study.goal)
            self.study.set_user_attr("created", datetime.now().astimezone().isoformat())
        else:
            self.check_same(study)
        plan = {
            "name": study.name, "method": study.method, "space": [asdict(one) for one in study.space],
            "max_trials": study.max_trials, "parallel_trials": study.parallel_trials,
            "max_failed_trials": study.max_failed_trials, "args": study.trial_job.args,
            **{name: getattr(study, name) for name in KEPT},
        }  # fmt: skip
        self.study.set_user_attr("plan", plan)
        self.study.set_user_attr("state", "")
        self.study.set_user_attr("error", "")
        recipe = recipe_of(study)
        self._plan, self._recipe = study, recipe
        self._points = grid(study.space, recipe.seed) if study.algorithm == "grid" else []
        for trial in self._trials():
            if trial.state is self._optuna.trial.TrialState.RUNNING:
                end_orphan(trial.user_attrs.get("pid", 0), trial.user_attrs.get("began", ""))
                self._try_again(trial, deaths=trial.user_attrs.get("deaths", 0) + 1)

    def check_same(self, study: Study) -> None:
        """RecipeError if what the folder holds is the search for something else."""
        if self._study is None or not (plan := self._study.user_attrs.get("plan")):
            return
        found = [
            f"{name}: {before} then, {now} now"
            for name, before, now in [
                *((name, plan[name], getattr(study, name)) for name in ("method", *KEPT)),
                *_differences(_words(_space(plan["space"])), _words(study.space)),
                *_differences(_settings(plan["args"]), _settings(study.trial_job.args)),
            ]
            if before != now
        ]
        if found:
            raise RecipeError(
                f"{self.folder} holds another search, which cannot go on with other settings:\n"
                + "\n".join(f"  {line}" for line in found)
                + "\nGive the same again (more trials may be asked for), or another --output."
            )

    def ask(self) -> Asked | None:
        """The next trial to run; None if all have been."""
        counted = self._trials()
        waiting = [trial for trial in counted if trial.state is self._optuna.trial.TrialState.WAITING]
        if not waiting:
            number = 1 + max((int(trial.user_attrs["trial"]) for trial in counted), default=0)
            if number > self._plan.max_trials or (self._points and number > len(self._points)):
                return None
            fixed = as_suggested(self._plan.space, self._points[number - 1]) if self._points else {}
            attributes = {"trial": str(number)}
            if fixed:
                self.study.enqueue_trial(fixed, attributes)
        else:
            attributes = {}
            number = int(waiting[0].user_attrs["trial"])
        # Anew for each trial: a search that goes on draws what it would have drawn.
        self.study.sampler = self._sampler(number)
        trial = self.study.ask()
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        values: dict[str, Value] = {}
        for parameter in self._plan.space:
            if parameter.is_active(values):
                values[parameter.name] = suggest(trial, parameter)
        trial.set_user_attr("values", values)
        trial_id = trial.user_attrs["trial"]
        self._running[trial_id] = trial
        return Asked(trial_id, values)

    def started(self, trial_id: str, pid: int, began: str) -> None:
        """The trial runs as this process."""
        self._running[trial_id].set_user_attr("pid", pid)
        self._running[trial_id].set_user_attr("began", began)

    def report(self, trial_id: str, measurements: tuple[Measurement, ...]) -> bool:
        """Note what the trial has reported; whether it should be stopped early for it."""
        trial = self._running[trial_id]
        known = trial.user_attrs.get("measurements", [])
        as_json = [[one.step, dict(one.metrics)] for one in measurements]
        if as_json == known:
            return False
        trial.set_user_attr("measurements", as_json)
        steps = {step for step, metrics in known if self._plan.metric in metrics}
        for one in measurements:
            if self._plan.metric in one.metrics and one.step not in steps:
                trial.report(one.metrics[self._plan.metric], one.step)
        why = self._why_stopped(trial)
        if why:
            trial.set_user_attr("stopped", why)
        return bool(why)

    def _why_stopped(self, trial: optuna.Trial) -> str:
        """Why the trial should be stopped early; empty if it should not, or is to be already."""
        curve, plan = _curve(trial.user_attrs, self._plan.metric), self._plan
        if plan.early_stopping == "none" or "stopped" in trial.user_attrs or not curve:
            return ""
        step, steps = max(curve), int(trial.user_attrs["values"].get("max_train_steps", self._recipe.max_train_steps))
        # Not for a bad start alone, nor when nothing but its result is to come.
        if step < steps // 4 or step >= steps:
            return ""
        complete = self._optuna.trial.TrialState.COMPLETE
        ended = [_curve(one.user_attrs, plan.metric) for one in self._trials() if one.state is complete]
        stops, why = RULES[plan.early_stopping]
        return f"stopped early at step {step}: {why}." if stops(curve, ended, plan.goal) else ""

    def end(self, trial_id: str, reason: str) -> None:
        """The trial has ended. reason: why without its result; empty if it has one."""
        states = self._optuna.trial.TrialState
        trial = self._running.pop(trial_id)
        plan = self._plan
        final = _final(_measurements(trial.user_attrs), plan.metric, plan.goal, plan.measurement)
        if final is None:
            reason = reason or f"it ended without having reported {self._plan.metric}."
        elif reason and "stopped" in trial.user_attrs:
            self.study.tell(trial, state=states.PRUNED)
            return
        if reason:
            trial.set_user_attr("reason", reason)
            self.study.tell(trial, state=states.FAIL)
        else:
            assert final is not None
            self.study.tell(trial, final.metrics[self._plan.metric])

    def is_stopped_early(self, trial_id: str) -> bool:
        """Whether ``report`` has said so."""
        return "stopped" in self._running[trial_id].user_attrs

    def leave(self, trial_id: str) -> None:
        """The trial was stopped with its search; it runs again when that goes on."""
        trial = self._running.pop(trial_id)
        self._try_again(self._storage.get_trial(trial._trial_id), deaths=trial.user_attrs.get("deaths", 0))

    def close(self, state: str, error: str = "") -> None:
        """The search has ended like this."""
        self.study.set_user_attr("error", error)
        self.study.set_user_attr("state", state)
        self.study.set_user_attr("ended", datetime.now().astimezone().isoformat())

    def ended(self) -> int:
        """How many trials have ended, well or badly."""
        return sum(trial.state.is_finished() for trial in self._trials())

    def failures(self) -> list[str]:
        """Why each of the trials failed that did."""
        failed = [trial for trial in self._trials() if trial.state is self._optuna.trial.TrialState.FAIL]
        return [f"trial {trial.user_attrs['trial']}: {trial.user_attrs.get('reason', '')}" for trial in failed]

    def record(self, is_running: bool) -> StudyRecord:
        """All that is known. is_running: there is a launcher at work on it."""
        noted = self._study.user_attrs if self._study else {}
        if "plan" not in noted:
            raise JobError(f"the search in {self.folder} has not begun; start it again with the same settings.")
        plan = noted["plan"]
        trials = [self._as_trial(trial, plan, is_running) for trial in self._trials()]
        started = [trial.started for trial in trials if trial.started]
        ended = noted.get("ended") if not is_running else None
        state, error = noted.get("state", ""), noted.get("error", "")
        if is_running:
            state = "running"
        elif not state:
            state = "cancelled"
            error = "it was stopped before its end; start it again with the same settings, and it goes on."
        return StudyRecord(
            study_id=str(self.folder), number=str(self.folder), name=plan["name"], state=state, method=plan["method"],
            output=str(self.folder), space=_space(plan["space"]), max_trials=plan["max_trials"],
            parallel_trials=plan["parallel_trials"], max_failed_trials=plan["max_failed_trials"],
            args=tuple(plan["args"]), trials=tuple(sorted(trials, key=lambda trial: int(trial.id))),
            created=_time(noted.get("created")), started=min(started, default=None), ended=_time(ended), error=error,
            **{name: plan[name] for name in KEPT},
        )  # fmt: skip

    def _as_trial(self, trial: optuna.trial.FrozenTrial, plan: Mapping[str, Any], is_running: bool) -> Trial:
        states = self._optuna.trial.TrialState
        noted = trial.user_attrs
        state: TrialState = {
            states.COMPLETE: "succeeded", states.PRUNED: "succeeded", states.FAIL: "infeasible",
            states.RUNNING: "stopping" if "stopped" in noted else "active",
        }.get(trial.state, "requested")  # fmt: skip
        # One that was to be stopped, but came to its end before that, has its result.
        reason = noted.get("reason") or ("" if trial.state is states.COMPLETE else noted.get("stopped", ""))
        if trial.state is states.RUNNING and not is_running:
            state, reason = "requested", "it was stopped with its search, and runs again when that goes on."
        measurements = _measurements(noted)
        final = _final(measurements, plan["metric"], plan["goal"], plan["measurement"])
        return Trial(
            id=noted["trial"],
            state=state,
            parameters=noted.get("values", {}),
            measurements=measurements,
            final=final if state == "succeeded" else None,
            reason=reason,
            started=trial.datetime_start and trial.datetime_start.astimezone(),
            ended=trial.datetime_complete and trial.datetime_complete.astimezone(),
            job_id=str(noted.get("pid", "")),
        )

    def processes(self) -> list[tuple[int, str]]:
        """Of trials that run, or that nobody has seen the end of: number, and when it began."""
        running = [trial for trial in self._trials() if trial.state is self._optuna.trial.TrialState.RUNNING]
        return [(one.user_attrs["pid"], one.user_attrs.get("began", "")) for one in running if "pid" in one.user_attrs]

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        """Those that count: with a number, and not tried again since."""
        found = self._study.get_trials(deepcopy=False) if self._study else []
        return [trial for trial in found if "trial" in trial.user_attrs and "again" not in trial.user_attrs]

    def _try_again(self, trial: optuna.trial.FrozenTrial, deaths: int) -> None:
        if deaths >= MOST_DEATHS:
            self._note(trial, "reason", f"its search died {deaths} times while it ran.")
        else:
            trial_id = trial.user_attrs["trial"]
            waits = any(
                one.user_attrs["trial"] == trial_id and one.state is self._optuna.trial.TrialState.WAITING
                for one in self._trials()
            )
            # In this order, and once: whenever this process dies, the trial is not lost.
            if not waits:
                kept = {"trial": trial_id, "deaths": deaths, "values": trial.user_attrs.get("values", {})}
                self.study.enqueue_trial(trial.params, kept)
            self._note(trial, "again", True)
        self.study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def _note(self, trial: optuna.trial.FrozenTrial, name: str, value: Any) -> None:
        self._storage.set_trial_user_attr(trial._trial_id, name, value)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """For one trial."""
        from optuna import samplers

        plan = self._plan
        # Of both, mixed: their sum would give neighbouring seeds the same trials.
        seed = random.Random(f"{self._recipe.seed} {number}").getrandbits(32)
        if plan.algorithm != "default":
            return samplers.RandomSampler(seed=seed)
        first = max(4, min(10, plan.max_trials // 3))
        if any(one.parent for one in plan.space):
            # A Gaussian process would draw what matters under another parameter at random.
            return samplers.TPESampler(seed=seed, n_startup_trials=first, multivariate=True, group=True)
        # The held-out loss has no noise of its own: the same settings and seed give the same figure.
        return samplers.GPSampler(seed=seed, n_startup_trials=first, deterministic_objective=not plan.seed_per_trial)


def recipe_of(study: Study) -> CommonFields:
    """The settings that all trials start from."""
    return find_method(study.method).from_settings(recipe_in(study.job.args))


def _final(measurements: tuple[Measurement, ...], metric: str, goal: str, measurement: str) -> Measurement | None:
    """The one that counts; None if none has the metric."""
    having = [one for one in measurements if metric in one.metrics]
    if not having or measurement == "last":
        return having[-1] if having else None
    return (min if goal == "minimize" else max)(having, key=lambda one: one.metrics[metric])


def _curve(noted: Mapping[str, Any], metric: str) -> dict[int, float]:
    """What a trial has reported of the metric, by step."""
    return {step: metrics[metric] for step, metrics in noted.get("measurements", []) if metric in metrics}


def _measurements(noted: Mapping[str, Any]) -> tuple[Measurement, ...]:
    return tuple(Measurement(step, metrics) for step, metrics in noted.get("measurements", []))


def _space(rows: list[dict[str, Any]]) -> SearchSpace:
    """As asdict has written it, and JSON kept it."""
    return SearchSpace(tuple(
        replace(
            Parameter(**{**row, "values": tuple(row["values"]), "parent": None}),
            parent=row["parent"] and Parent(row["parent"]["name"], tuple(row["parent"]["values"])),
        )
        for row in rows
    ))  # fmt: skip


def _words(space: SearchSpace) -> dict[str, Any]:
    return {f"tune {one.name}": one.words for one in space}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = [*before, *(name for name in now if name not in before)]
    return [(name, before.get(name, "nothing"), now.get(name, "nothing")) for name in names]


def _settings(args: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """What the trials are told, setting by setting."""
    others = [arg.removeprefix("--").partition("=") for arg in args[2:] if not arg.startswith((RECIPE, MORE))]
    return {**recipe_in(args), **{name: value or "asked for" for name, _, value in others}}


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
