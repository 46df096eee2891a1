"""Notebook: check what can be checked of a notebook and its parameters, and plan the job that runs it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdtune.commands.checks import Mistakes, check_image
from sdtune.errors import RecipeError
from sdtune.jobs.backend import Backend, Upload
from sdtune.jobs.images import CONTAINERS
from sdtune.jobs.machines import Machine, choose_machine, cpu_machine
from sdtune.jobs.placement import Placement, is_token
from sdtune.jobs.spec import JobSpec, plan_notebook
from sdtune.methods.notebooks import (
    SUFFIX,
    check_language,
    check_parameters,
    has_parameters,
    is_unfinished,
    known_names,
    read_notebook,
    source_of,
    typed_value,
)
from sdtune.methods.settings import NOT_YAML, check_values

NOT_FOR_NOTEBOOKS = ("replicas", "save_nfs", "tensorboard", "restart_on_preemption")
"""Settings of a placement that only a training has a use for; a project's file may have them all the same."""
NO_GPU = "none"
_OF_THE_LAUNCHER = re.compile(
    r"^[^#\n]*?(?:\bsdtune\.(train|hpo|build|sync_nfs|jobs|api|images|find_search)\b"
    r"|\bfrom sdtune import [^\n]*?\b(train|hpo|build|sync_nfs|jobs|api|images|find_search)\b)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class NotebookPlan:
    """A notebook that can be run.

    parameters: as Python will have them. placement: None on this machine. notes: what the user should know before.
    """

    notebook: str
    parameters: Mapping[str, Any]
    result: str
    job: JobSpec
    uploads: tuple[Upload, ...]
    placement: Placement | None
    notes: tuple[str, ...]
    rendered: dict[str, Any]


def plan_notebook_run(
    notebook: str | None,
    output: str | None,
    parameters: Callable[[], Mapping[str, Any]],
    backend: Backend,
    *,
    placement: Placement | None = None,
    container: str = "diffusers",
    kernel: str | None = None,
    cell_timeout: int | None = None,
    overwrite: bool = False,
    mistakes: Mistakes | None = None,
    remark: Callable[[str], str | None] = lambda container: None,
) -> NotebookPlan:
    """The plan of one run. Writes nothing; raises one error that tells every mistake.

    parameters: gives them, or raises what is wrong with them. placement: where in Google Cloud, for a backend there.
    remark: what should be known of the image of a container.
    """
    mistakes = mistakes or Mistakes()
    machine: Machine | None = None
    given: Mapping[str, Any] = {}
    content: dict[str, Any] | None = None
    target = ""
    with mistakes:
        given = parameters()
        check_parameters(given)  # which may come from a program as well
        if placement:
            check_no_token(given)
    with mistakes:
        if container not in CONTAINERS:
            raise RecipeError(f"container: found {container!r}, wanted {' or '.join(CONTAINERS)}.")
    with mistakes:
        if cell_timeout is not None and cell_timeout < 1:
            raise RecipeError(f"cell_timeout: found {cell_timeout}s, wanted at least 1s, or nothing for no limit.")
    with mistakes:
        content = look_at_notebook(notebook, backend)
    with mistakes:
        target = free_place(notebook, output, backend, overwrite)
    if placement:
        with mistakes:
            machine = machine_for(placement)
            check_image(machine, placement)
    mistakes.raise_if_any()

    assert notebook
    uploads: list[Upload] = []
    place = backend.resolve(notebook)
    if upload := backend.stage(place, [Path(place).name], "notebooks", target):
        uploads.append(upload)
        place = upload.address
    job = plan_notebook(
        place, target, given, container=container, kernel=kernel, cell_timeout=cell_timeout, machine=machine
    )
    notes = [
        *notes_on(content, given),
        *(notes_on_image(content, container) if placement and not placement.image else []),
    ]
    notes += filter(None, [remark(container) if placement else None])
    result = f"{target}/{place.rpartition('/')[2]}"
    return NotebookPlan(notebook, given, result, job, tuple(uploads), placement, tuple(notes), backend.render(job))


def gather_parameters(
    typed: Sequence[str] = (), raw: Sequence[str] = (), files: Sequence[str] = (), texts: Sequence[str] = ()
) -> dict[str, Any]:
    """The parameters from all that gives some, in papermill's order: the later wins.

    files, texts: YAML of names and values. typed, raw: NAME=VALUE; of the first, what looks like a number is one.
    RecipeError: something is not of that form; tells all of it.
    """
    found: dict[str, Any] = {}
    mistakes = Mistakes()
    for file in files:
        with mistakes:
            found |= _yaml(_text_of(file), f"param_file: {file}")
    for text in texts:
        with mistakes:
            found |= _yaml(text, "param_yaml: it")
    for option, pairs, meaning in (("param", typed, typed_value), ("param_raw", raw, str)):
        for pair in pairs:
            with mistakes:
                name, equals, value = pair.partition("=")
                if not equals:
                    raise RecipeError(f"{option}: found {pair!r}, wanted NAME=VALUE.")
                found[name] = meaning(value)
    with mistakes:
        check_parameters(found)
    mistakes.raise_if_any()
    return found


def _text_of(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"param_file: {file} cannot be read ({error}).") from None


class _NoDates(yaml.SafeLoader):
    """2026-11-25 stays the text that it is, as papermill has it: no cell could be given a date."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _yaml(text: str, what: str) -> dict[Any, Any]:
    try:
        found = yaml.load(text, _NoDates)
    except NOT_YAML as error:
        raise RecipeError(f"{what} is not YAML: {error}") from None
    check_values(found, what)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RecipeError(f"{what} holds a {type(found).__name__}; wanted lines of the form `name: value`.")
    return found


def check_no_token(parameters: Mapping[str, Any]) -> None:
    """What stands in a job, all who may look at jobs can read; so can who gets the executed notebook."""
    for name, value in parameters.items():
        if isinstance(value, str) and is_token(value):
            raise RecipeError(
                f"param: {name} looks like a secret, and everybody who may see the job would read it; keep it in "
                "Secret Manager and give --hf-token-secret or --wandb-key-secret: the notebook finds HF_TOKEN or "
                "WANDB_API_KEY in its environment."
            )


def look_at_notebook(notebook: str | None, backend: Backend) -> dict[str, Any] | None:
    """The notebook, read where it lies; None where it cannot be looked at now. RecipeError: it is none."""
    if not notebook:
        raise RecipeError(f"notebook: missing; give a notebook, NAME{SUFFIX} here or gs://bucket/path{SUFFIX}.")
    try:
        data = backend.read(notebook)
    except OSError as error:
        raise RecipeError(f"notebook: {notebook} cannot be read ({error.strerror or error}); check the path.") from None
    if data is None:
        return None
    content = read_notebook(data, notebook)
    if not notebook.endswith(SUFFIX):
        raise RecipeError(f"notebook: found {notebook}, wanted a name that ends with {SUFFIX}; rename it.")
    check_language(content, notebook)
    return content


def free_place(notebook: str | None, output: str | None, backend: Backend, overwrite: bool) -> str:
    """The folder for the result, as the job will see it. RecipeError: it cannot be, or has that notebook already.

    What a run has left that did not come to its end makes room.
    """
    if not output:
        raise RecipeError("output: missing; give --output, the folder for the executed notebook.")
    target = backend.resolve(output)
    if reason := backend.why_not_written(target):
        raise RecipeError(f"output: {output} {reason}; choose another --output.")
    if notebook:
        place = backend.resolve(notebook)
        name = place.rpartition("/")[2]
        if f"{target}/{name}" == place:
            raise RecipeError(
                f"output: {output} is the folder of the notebook itself, which would be written over; choose another."
            )
        if not overwrite and name in backend.list_names(target) and not is_unfinished(backend.read(f"{target}/{name}")):
            raise RecipeError(
                f"output: {output} already holds {name}; choose another --output or add --overwrite. Other files there "
                "are left alone."
            )
    return target


def machine_for(placement: Placement) -> Machine:
    """The machine that ``placement`` asks for; --gpu none: one without. RecipeError: there is none like it."""
    if placement.gpu and placement.gpu.strip().lower() == NO_GPU:
        if placement.gpus:
            raise RecipeError(f"gpus: found {placement.gpus} with --gpu {NO_GPU}; leave one of them out.")
        return cpu_machine(placement.machine_type)
    return choose_machine(
        placement.gpu, placement.gpus, placement.machine_type,
        strategy=placement.effective_strategy, force=placement.force_machine,
    )  # fmt: skip


def notes_on(content: Mapping[str, Any] | None, parameters: Mapping[str, Any]) -> list[str]:
    """What is probably a slip: parameters that the notebook does not know."""
    if content is None or not parameters:
        return []
    if not has_parameters(content):
        return [
            "the notebook has no cell tagged 'parameters'; they are set at its top, and what it sets itself wins over "
            "them."
        ]
    known = known_names(content)
    unknown = [name for name in parameters if known is not None and name not in known]
    if known is None or not unknown:
        return []
    near = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    told = ", ".join(f"{name} (did you mean {near[name][0]}?)" if near[name] else name for name in unknown)
    return [f"not in the notebook's parameters cell, which sets {', '.join(dict.fromkeys(known)) or 'nothing'}: {told}"]


def notes_on_image(content: Mapping[str, Any] | None, container: str) -> list[str]:
    """What a cell would ask of sdtune that the images of jobs do not have, told before the machine is paid for."""
    for cell in content["cells"] if content else ():
        if cell["cell_type"] == "code" and (found := _OF_THE_LAUNCHER.search(source_of(cell))):
            name = found[1] or found[2]
            return [
                f"a cell uses sdtune.{name}, which is not in the image {container}: the images of jobs hold the "
                "trainer alone; see docs/notebooks.md for what a notebook trains with there."
            ]
    return []


def for_notebooks(placement: Placement) -> Placement:
    """``placement`` without what only a training has a use for."""
    return placement.model_copy(update={name: Placement.model_fields[name].default for name in NOT_FOR_NOTEBOOKS})
