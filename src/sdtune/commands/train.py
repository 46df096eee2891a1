"""Train: check everything that can be checked, and plan the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdtune.commands.checks import (
    Mistakes,
    check_apart,
    check_image,
    check_precision,
    check_secrets,
    files_below,
    free_output,
)
from sdtune.commands.earlier import Earlier, find_earlier
from sdtune.commands.validate import Progress, look_at
from sdtune.errors import DatasetError, RecipeError
from sdtune.jobs.backend import Backend, Upload
from sdtune.jobs.machines import Machine, choose_machine
from sdtune.jobs.memory import memory_advice
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import JobSpec, plan_training
from sdtune.methods.base_models import BaseModel, files_to_load, find_base_model
from sdtune.methods.buckets import Shape
from sdtune.methods.fields import CommonFields
from sdtune.methods.ledger import Ledger


@dataclass(frozen=True)
class TrainingPlan:
    """A run that passed every check and can be started.

    ledger: None where the dataset could not be looked at. placement: None on this machine. notes: what the user
    should know before it starts. earlier: what the output holds of it.
    """

    method: CommonFields
    base_model: BaseModel
    dataset: str
    ledger: Ledger | None
    job: JobSpec
    uploads: tuple[Upload, ...]
    placement: Placement | None
    notes: tuple[str, ...]
    rendered: dict[str, Any]
    earlier: Earlier = field(default_factory=Earlier)

    @property
    def resolution(self) -> int | None:
        """Side of the training pictures in pixels; None where only loading the base model would tell."""
        return self.method.resolution or self.base_model.resolution

    @property
    def shapes(self) -> list[Shape]:
        """In which shape each picture will be trained; none where the resolution or the pictures are not known."""
        if self.resolution is None or self.ledger is None:
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
    placement: Placement | None = None,
    mistakes: Mistakes | None = None,
    overwrite: bool = False,
    goes_on: bool = False,
    progress: Progress | None = None,
    show: Callable[[Ledger], None] | None = None,
    remark: Callable[[str], str | None] = lambda container: None,
) -> TrainingPlan:
    """The plan of one run. Writes nothing; raises one error that tells every mistake in settings, places and dataset.

    placement: where in Google Cloud, for a backend there. mistakes: found before. goes_on: a run that was stopped goes
    on, and one that has finished is no mistake; ``earlier`` says what there is. progress: called with (images
    checked, images in all); show: called with the ledger, also when it has errors. remark: what should be known of the
    image of a container.
    """
    mistakes = mistakes or Mistakes()
    machine: Machine | None = None
    with mistakes:
        recipe = method.from_settings(settings)
    with mistakes:
        # Nothing, or none, is told by the settings themselves.
        name = str(settings.get("base_model") or method.model_fields["base_model"].default)
        base_model = find_base_model(name, settings.get("revision"))
    with mistakes:
        classes = _check_class_pictures(method, settings, backend)
    with mistakes:
        target = free_output(output, backend, overwrite, goes_on)
        check_apart(target, dataset, settings, backend)
    if placement:
        with mistakes:
            machine = machine_of(placement)
            check_image(machine, placement)
        with mistakes:
            if not mistakes.found:
                check_secrets(recipe, placement)
        with mistakes:
            if not mistakes.found and machine:
                check_precision(recipe, machine)
    with mistakes:
        if not dataset:
            raise RecipeError("dataset: missing; give --dataset, the folder with the training pictures.")
        # What is wrong with the settings does not hide what is wrong with the dataset.
        resolution = None if mistakes.found else recipe.resolution or base_model.resolution
        ledger = look_at(dataset, method.layout, backend, resolution=resolution, progress=progress)
        if ledger:
            if show:
                show(ledger)
            ledger.raise_for_errors()
        if not mistakes.found:
            if ledger:
                recipe.check_examples(len(ledger.examples))
            if resolution is not None:
                recipe.buckets(resolution, base_model.bucket_step)
    mistakes.raise_if_any()

    assert dataset
    uploads: list[Upload] = []

    def reached(path: str, names: list[str], kind: str) -> str:
        """``path`` as the job will see it, which may mean a copy of it in a bucket."""
        upload = backend.stage(path, names, kind, target)
        if upload is None:
            return backend.resolve(path)
        uploads.append(upload)
        return upload.address

    # The training process may start in another folder, or on another machine.
    sources = {"base_model": base_model.name}
    if base_model.path:
        path = base_model.path
        names = files_to_load(base_model.name, files_below(path)) if path.is_dir() else [path.name]
        sources["base_model"] = reached(str(path), names, "base-models")
    if folder := getattr(recipe, "class_data_dir", None):
        sources["class_data_dir"] = reached(folder, files_of(classes), "datasets")
    recipe = recipe.model_copy(update=sources)
    shares = [mount.place for mount in placement.mounts] if placement and placement.save_nfs else []
    pictures = reached(dataset, files_of(ledger), "datasets")
    earlier = Earlier()
    if goes_on and not overwrite:
        earlier = find_earlier(recipe, pictures, target, backend.list_names(target), backend)
    job = plan_training(recipe, pictures, target, machine, shares, overwrite=overwrite)
    advice = memory_advice(recipe, base_model, machine.gpu) if machine and machine.gpu else None
    notes = tuple(note for note in (base_model.note, advice, remark(method.container)) if note)
    return TrainingPlan(
        recipe, base_model, dataset, ledger, job, tuple(uploads), placement, notes, backend.render(job), earlier
    )


def machine_of(placement: Placement) -> Machine:
    """The machine that ``placement`` asks for. RecipeError: there is none like it."""
    return choose_machine(
        placement.gpu,
        placement.gpus,
        placement.machine_type,
        strategy=placement.effective_strategy,
        force=placement.force_machine,
    )


def files_of(ledger: Ledger | None) -> list[str]:
    """The files of a dataset that a run reads."""
    return [row.path for row in ledger.rows if row.fate != "dropped"] if ledger else []


def _check_class_pictures(method: type[CommonFields], settings: Mapping[str, Any], backend: Backend) -> Ledger | None:
    """A folder of class pictures is laid out as the dataset is and checked as it is; what it warns of is not told."""
    folder = settings.get("class_data_dir")
    if not folder or "class_data_dir" not in method.model_fields:
        return None
    try:
        if ledger := look_at(str(folder), method.layout, backend):
            ledger.raise_for_errors()
    except DatasetError as error:
        raise DatasetError(f"class_data_dir: {error}") from None
    return ledger
