"""Train: check everything that can be checked, plan the job, start it and follow it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtune import events
from sdtune.errors import ERRORS, DatasetError, JobError, RecipeError, SdtuneError
from sdtune.jobs.backend import Backend, LogLine
from sdtune.jobs.spec import JobSpec, plan_training
from sdtune.methods.base import MARK, RECIPE_FILE
from sdtune.methods.base_models import BaseModel, find_base_model
from sdtune.methods.buckets import Shape
from sdtune.methods.fields import CommonFields
from sdtune.methods.layouts import check
from sdtune.methods.ledger import Ledger


@dataclass(frozen=True)
class TrainingPlan:
    """A run that passed every check and can be started."""

    method: CommonFields
    base_model: BaseModel
    ledger: Ledger
    job: JobSpec
    rendered: dict[str, Any]

    @property
    def resolution(self) -> int | None:
        """Side of the training pictures in pixels; None where only loading the base model would tell."""
        return self.method.resolution or self.base_model.resolution

    @property
    def shapes(self) -> list[Shape]:
        """In which shape each picture will be trained; none where the resolution is not known."""
        if self.resolution is None:
            return []
        buckets = self.method.buckets(self.resolution, self.base_model.bucket_step)
        return [buckets.shape_of((example.width, example.height)) for example in self.ledger.examples]


def plan_train(
    method: type[CommonFields],
    settings: Mapping[str, Any],
    dataset: str | None,
    output: str | None,
    backend: Backend,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    show: Callable[[Ledger], None] | None = None,
) -> TrainingPlan:
    """The plan of one run. Writes nothing; raises one error that tells every mistake in settings, places and dataset.

    progress: called with (images checked, images in all); show: called with the ledger, also when it has errors.
    """
    mistakes = Mistakes()
    with mistakes:
        recipe = method.from_settings(settings)
    with mistakes:
        # Nothing, or none, is told by the settings themselves.
        name = str(settings.get("base_model") or method.model_fields["base_model"].default)
        base_model = find_base_model(name, settings.get("revision"))
    with mistakes:
        _check_class_pictures(method, settings)
    with mistakes:
        target = _free_output(output, backend, overwrite)
        _check_apart(target, dataset, settings, backend)
    with mistakes:
        if dataset is None:
            raise RecipeError("dataset: missing; give --dataset, the folder with the training pictures.")
        # What is wrong with the settings does not hide what is wrong with the dataset.
        resolution = None if mistakes.found else recipe.resolution or base_model.resolution
        ledger = check(Path(dataset).expanduser(), method.layout, resolution=resolution, progress=progress)
        if show:
            show(ledger)
        ledger.raise_for_errors()
        if not mistakes.found:
            recipe.check_examples(len(ledger.examples))
            if resolution is not None:
                recipe.buckets(resolution, base_model.bucket_step)
    mistakes.raise_if_any()
    # The training process may start in another folder.
    sources = {"base_model": base_model.name}
    if folder := getattr(recipe, "class_data_dir", None):
        sources["class_data_dir"] = backend.resolve(folder)
    recipe = recipe.model_copy(update=sources)
    job = plan_training(recipe, backend.resolve(str(dataset)), target)
    return TrainingPlan(recipe, base_model, ledger, job, backend.render(job))


def _check_class_pictures(method: type[CommonFields], settings: Mapping[str, Any]) -> None:
    """A folder of class pictures is laid out as the dataset is and checked as it is; what it warns of is not told."""
    folder = settings.get("class_data_dir")
    if not folder or "class_data_dir" not in method.model_fields:
        return
    try:
        check(Path(str(folder)).expanduser(), method.layout).raise_for_errors()
    except DatasetError as error:
        raise DatasetError(f"class_data_dir: {error}") from None


def _free_output(output: str | None, backend: Backend, overwrite: bool) -> str:
    """Where the result goes, as the training process will see it."""
    if not output:
        raise RecipeError("output: missing; give --output, the folder for the result.")
    target = backend.resolve(output)
    if not backend.can_write(target):
        raise RecipeError(f"output: {output} is no folder, or cannot be written to; choose another --output.")
    if target.rpartition("/")[2] == "pytorch_lora_weights":
        raise RecipeError("output: a folder of this name would give both files of the result one name; choose another.")
    names = backend.list_names(target)
    if RECIPE_FILE in names and not overwrite:
        raise RecipeError(f"output: {output} already holds a finished run; choose another --output or add --overwrite.")
    if names and not {RECIPE_FILE, MARK} & set(names):
        raise RecipeError(
            f"output: {output} holds other files, such as {names[0]!r}; "
            "choose a new folder, so that none is overwritten."
        )
    return target


def _check_apart(target: str, dataset: str | None, settings: Mapping[str, Any], backend: Backend) -> None:
    """The result must not be written among what it is made from."""
    sources = {"dataset": dataset, **{name: settings.get(name) for name in ("base_model", "class_data_dir")}}
    for name, source in sources.items():
        if source and f"{target}/".startswith(backend.resolve(str(source)) + "/"):
            raise RecipeError(f"output: {target} is the {name} or lies in it; choose a folder of its own.")


class Mistakes:
    """Collects the user's mistakes so that they are told together. ``with mistakes:`` keeps what the block raises."""

    def __init__(self) -> None:
        self.found: list[SdtuneError] = []

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, RecipeError | DatasetError):
            self.found.append(error)
            return True
        return False

    def raise_if_any(self) -> None:
        """Raise what was found: one error as it is, several as one."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise RecipeError("\n".join(str(error) for error in self.found))


def train(plan: TrainingPlan, backend: Backend) -> Iterator[events.Event | LogLine]:
    """Start the run and yield what it says. Raises the run's own error, or JobError, if it ends without its result.

    Leaving the iterator early (Ctrl-C) stops the job.
    """
    job_id = backend.submit(plan.job)
    failed: events.Failed | None = None
    finished = False
    last_lines: deque[str] = deque(maxlen=30)
    try:
        for line in backend.logs(job_id):
            event = events.parse(line.text)
            if isinstance(event, events.Failed):
                failed = event
                continue
            if event is None:
                last_lines.append(line.text)
            finished = finished or isinstance(event, events.Finished)
            yield event or line
        end = backend.wait(job_id)
    except BaseException:
        backend.cancel(job_id)
        raise
    if failed:
        raise ERRORS.get(failed.kind, JobError)(failed.text)
    if end.exit_code or not finished:
        raise JobError(_unexplained(end.exit_code, list(last_lines)))


def _unexplained(exit_code: int, last_lines: list[str]) -> str:
    """A run that ended without a word of its own: killed, or crashed below Python."""
    if exit_code == -9:
        how = "was killed (signal 9), most often because the machine ran out of memory"
    elif exit_code < 0:
        how = f"was ended by signal {-exit_code}"
    else:
        how = f"ended with exit code {exit_code} and without its result"
    tail = "".join(f"\n  | {line}" for line in last_lines)
    return f"the training process {how}." + (f" Its last lines:{tail}" if tail else "")
