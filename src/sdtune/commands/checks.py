"""What is checked of settings and places before a job is planned, and how mistakes are told together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdtune.errors import DatasetError, RecipeError, SdtuneError
from sdtune.jobs.backend import Backend
from sdtune.jobs.machines import Machine
from sdtune.jobs.placement import Placement
from sdtune.methods.base import MARK, RECIPE_FILE
from sdtune.methods.fields import CommonFields


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


def free_output(output: str | None, backend: Backend, overwrite: bool, goes_on: bool = False) -> str:
    """Where the result goes, as the training process will see it.

    goes_on: what it holds of a run is looked at when the run is known.
    """
    if not output:
        raise RecipeError("output: missing; give --output, the folder for the result.")
    target = backend.resolve(output)
    if reason := backend.why_not_written(target):
        raise RecipeError(f"output: {output} {reason}; choose another --output.")
    if target.rpartition("/")[2] == "pytorch_lora_weights":
        raise RecipeError("output: a folder of this name would give both files of the result one name; choose another.")
    names = backend.list_names(target)
    if RECIPE_FILE in names and not overwrite and not goes_on:
        raise RecipeError(f"output: {output} already holds a finished run; choose another --output or add --overwrite.")
    if names and not {RECIPE_FILE, MARK} & set(names):
        raise RecipeError(
            f"output: {output} holds other files, such as {names[0]!r}; "
            "choose a new folder, so that none is overwritten."
        )
    return target


def check_apart(target: str, dataset: str | None, settings: Mapping[str, Any], backend: Backend) -> None:
    """The result must not be written among what it is made from."""
    sources = {"dataset": dataset, **{name: settings.get(name) for name in ("base_model", "class_data_dir")}}
    for name, source in sources.items():
        if source and f"{target}/".startswith(backend.resolve(str(source)) + "/"):
            raise RecipeError(f"output: {target} is the {name} or lies in it; choose a folder of its own.")


def check_secrets(method: CommonFields, placement: Placement) -> None:
    """A job has no token of the user's; it needs the name under which Secret Manager keeps one."""
    offline = placement.env_pairs.get("WANDB_MODE") in ("offline", "disabled")
    wanted = (
        (method.push_to_hub, placement.hf_token_secret, "push_to_hub", "--hf-token-secret", "HF_TOKEN"),
        (bool(method.wandb_project) and not offline, placement.wandb_key_secret, "wandb_project",
         "--wandb-key-secret", "WANDB_API_KEY"),
    )  # fmt: skip
    for needed, secret, setting, option, token in wanted:
        if needed and not secret:
            raise RecipeError(
                f'{setting}: a job needs a token for it; store one with: printf %s "${token}" | gcloud secrets create '
                f"NAME --data-file=-, and give {option} NAME."
            )


def check_precision(method: CommonFields, machine: Machine) -> None:
    """bf16 on a GPU without it is emulated, slowly, or refused by the driver once the machine is paid for."""
    if method.mixed_precision == "bf16" and machine.gpu and not machine.gpu.bf16:
        raise RecipeError(f"mixed_precision: found bf16, which {machine.gpu.name} has not; use fp16, or auto.")


def check_image(machine: Machine, placement: Placement) -> None:
    """An image that has nothing for the GPU would say so only once the machine is paid for."""
    if machine.gpu and machine.gpu.own_image and not placement.image:
        raise RecipeError(
            f"gpu: sdtune's own images do not run on {machine.gpu.name}: {machine.gpu.own_image}; use another, such as "
            "t4 or l4, or give --image, one of your own."
        )


def files_below(folder: Path) -> list[str]:
    """Every file at any depth, relative, with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
