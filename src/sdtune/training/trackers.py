"""Where curves and samples are drawn while a run goes: TensorBoard always, Weights & Biases where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import numpy
from PIL import Image

from sdtune.errors import ProjectError, SdtuneError
from sdtune.methods.fields import CommonFields, PublishFields
from sdtune.training import interrupts

SECONDS_TO_UPLOAD = 120.0
"""At the end of a run. What Weights & Biases has not taken by then stays in the logs, for ``wandb sync``."""


class Tracker(Protocol):
    """A place to draw in. It is closed with what ended the run, None for success."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None: ...

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of the curve ``name``."""

    def picture(self, name: str, prompt: str, picture: Image.Image, step: int) -> None:
        """The sample ``name`` of ``prompt``."""


class Trackers:
    """All places of a run. No signal is obeyed while one of them holds a lock."""

    def __init__(self, places: list[Tracker]) -> None:
        self._places = places

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of the curve ``name``."""
        with interrupts.held():
            for place in self._places:
                place.scalar(name, value, step)

    def picture(self, name: str, prompt: str, picture: Image.Image, step: int) -> None:
        """The sample ``name`` of ``prompt``."""
        with interrupts.held():
            for place in self._places:
                place.picture(name, prompt, picture, step)


@contextmanager
def open_trackers(method: CommonFields, folder: Path, title: str, goes_on: int = 0) -> Iterator[Trackers]:
    """The trackers of a run called ``title``, which keep their files in ``folder``; closed when the block ends.

    goes_on: the step that the run goes on from. What was drawn after it is drawn again, and shown once.
    OSError: the folder cannot be written. ProjectError: Weights & Biases takes no run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        places: list[Tracker] = []
        # Closed last: it may have to wait for the network.
        if method.wandb_project is not None:
            places.append(stack.enter_context(WeightsAndBiases(method, method.wandb_project, folder, title)))
        places.append(stack.enter_context(TensorBoard(folder, goes_on)))
        yield Trackers(places)


class TensorBoard:
    """Event files for ``tensorboard --logdir``."""

    def __init__(self, folder: Path, goes_on: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # the check below must not wait for torch

        self._writer: Any = SummaryWriter(folder, purge_step=goes_on + 1 if goes_on else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._writer.close()

    def scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def picture(self, name: str, prompt: str, picture: Image.Image, step: int) -> None:
        self._writer.add_image(f"{name} {prompt}", numpy.asarray(picture), step, dataformats="HWC")


class WeightsAndBiases:
    """A run on wandb.ai, or in ``folder`` alone with WANDB_MODE=offline."""

    def __init__(self, method: CommonFields, project: str, folder: Path, title: str) -> None:
        wandb = _quiet_wandb()
        try:
            self._run: Any = wandb.init(
                project=project, name=title, dir=folder, config={"method": method.name, **_public(method.recipe())}
            )
        except wandb.Error as error:
            raise ProjectError(f"wandb_project: Weights & Biases cannot start a run: {error}") from None
        # Samples are drawn, and kohya's averages told, a little after the steps that they belong to.
        self._run.define_metric("*", step_metric="step")
        self._image = wandb.Image

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._run.finish(exit_code=_exit_code(error))

    def scalar(self, name: str, value: float, step: int) -> None:
        self._run.log({name: value, "step": step})

    def picture(self, name: str, prompt: str, picture: Image.Image, step: int) -> None:
        self._run.log({name: self._image(picture, caption=prompt), "step": step})


def check_trackers(method: PublishFields) -> None:
    """ProjectError if Weights & Biases is asked for and cannot be used; before anything is written or loaded."""
    if method.wandb_project is None:
        return
    wandb = _quiet_wandb()
    try:
        wandb.login()
    except wandb.Error as error:
        raise ProjectError(
            f"wandb_project: Weights & Biases does not let this run in ({str(error).rstrip('.')}). "
            "Set WANDB_API_KEY to a key from https://wandb.ai/authorize, or WANDB_MODE=offline to keep the log here."
        ) from None


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with folders of this machine by their last part alone."""
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in settings.items()
    }


def _quiet_wandb() -> Any:
    """The library, told to leave standard output and error to the run's own words."""
    try:
        import wandb
    except ImportError:
        raise ProjectError(
            "wandb_project: the library wandb is not installed here; install it with "
            "pip install -e '.[wandb]' in sdtune's folder, or leave the project out."
        ) from None
    wandb.setup(
        wandb.Settings(
            silent=True, console="off", finish_timeout=SECONDS_TO_UPLOAD,
            # Where a checkout comes from, what else lies in it and is installed, is nobody's business.
            disable_git=True, disable_code=True, save_code=False, disable_job_creation=True,
        )
    )  # fmt: skip
    return wandb


def _exit_code(error: BaseException | None) -> int:
    """What the process of a run ends with after ``error``."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return interrupts.exit_code()
    return error.exit_code if isinstance(error, SdtuneError) else 1
