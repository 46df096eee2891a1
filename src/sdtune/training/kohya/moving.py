"""All that moves while sd-scripts trains: taken down after a step, and made what it was.

A run that goes on goes through sd-scripts' own loop from its beginning, so that its counters, epochs and averages come
out as they were. Nothing is computed on the way: pictures are not looked at, and losses are those that were noted down.
sd-scripts' Python runs this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from sdtune.errors import TrainingError
from sdtune.training.agreement import of_all
from sdtune.training.components.nested import loading
from sdtune.training.kohya.pictures import Order, Pictures, Place, watched
from sdtune.training.kohya.state import of_python, random_states, set_random_states


class Moving:
    """What ``accelerator`` prepares for training. losses: of all batches so far."""

    def __init__(self, accelerator: Any, seed: int) -> None:
        self.accelerator = accelerator
        self.losses: list[float] = []
        self._seed, self._place = seed, Place(0, 0)
        self._goes_on: Mapping[str, Any] | None = None
        self._noted: Sequence[float] = ()
        self._prepare = accelerator.prepare
        # The one place where all of it comes by.
        accelerator.prepare = self._watch

    def _watch(self, *things: Any, **options: Any) -> Any:
        loaders = [number for number, thing in enumerate(things) if isinstance(thing, DataLoader)]
        if not loaders:
            return self._prepare(*things, **options)
        given = list(things)
        # The second is that of sd-scripts' own validation.
        given[loaders[0]] = loader = watched(things[loaders[0]], self._seed)
        assert isinstance(loader.dataset, Pictures)
        assert isinstance(loader.sampler, Order)
        self._pictures, self._order = loader.dataset, loader.sampler
        prepared = self._prepare(*given, **options)
        network, self.optimizer, *_, self.schedule = prepared
        self.network = self.accelerator.unwrap_model(network)
        return prepared

    # --- taken down ---------------------------------------------------------------------------------------------------

    def add(self, loss: float, epoch: int) -> None:
        """A batch of that epoch was trained on."""
        self.losses.append(loss)
        self._place = Place(epoch, self._place.batches + 1 if self._place.epoch == epoch else 1)

    def state_dict(self, step: int) -> dict[str, Any]:
        """All of it after ``step`` steps, for checkpoints; all processes call it."""
        random = {**random_states(), "before": of_python(self._pictures.before)}
        processes, device = self.accelerator.num_processes, self.accelerator.device
        every = {name: torch.stack(of_all(state, processes, device)) for name, state in random.items()}
        return {
            "step": step,
            "random": every,
            "weights": dict(self.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "pictures": {**self._place._asdict(), "of": len(self._pictures), "order": self._order.began},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    # --- made what it was ---------------------------------------------------------------------------------------------

    def go_on(self, state: Mapping[str, Any]) -> None:
        """From now on, until ``arrive``, the loop passes by what is behind. Called before its first batch.

        TrainingError: the state is that of another dataset.
        """
        pictures = state["pictures"]
        if pictures["of"] != len(self._pictures):
            raise TrainingError(
                f"checkpoint: that of step {state['step']} does not fit: an epoch had {pictures['of']} batches then, "
                f"and has {len(self._pictures)} now. Give the pictures that it was begun with, or --overwrite to begin "
                "anew."
            )
        self._goes_on, self._noted = state, state["losses"].tolist()
        behind = Place(pictures["epoch"], pictures["batches"])
        self._pictures.go_on(behind, self._mine(state["random"]["before"]))
        self._order.go_on(behind.epoch, pictures["order"].clone())
        for thing, names in self._still:
            for name in names:
                setattr(thing, name, _nothing)

    @property
    def passes_by(self) -> bool:
        """The batch of now is behind."""
        return self._goes_on is not None

    @property
    def arrives(self) -> bool:
        """The last of them has been passed by."""
        return self.passes_by and len(self.losses) == len(self._noted)

    def noted_loss(self) -> torch.Tensor:
        """The loss of the batch that is passed by."""
        return torch.tensor(self._noted[len(self.losses)], dtype=torch.float64)

    def arrive(self) -> None:
        """Make everything what it was after the step that the state was taken down after."""
        assert self._goes_on
        state, self._goes_on = self._goes_on, None
        for thing, names in self._still:
            for name in names:
                delattr(thing, name)
        with loading(state["step"]):
            self._load(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._pictures.arrive()
        set_random_states({name: self._mine(of_each) for name, of_each in state["random"].items()})

    def _mine(self, of_each: torch.Tensor) -> torch.Tensor:
        # A copy: torch reads a random state from the beginning of its memory, wherever the tensor begins.
        return of_each[self.accelerator.process_index].clone()

    @property
    def _still(self) -> Sequence[tuple[Any, Sequence[str]]]:
        """What does nothing while batches are passed by."""
        return (
            (self.accelerator, ("backward", "clip_grad_norm_", "print")),
            (self.optimizer, ("step", "zero_grad")),
            (self.schedule, ("step",)),
        )


def _nothing(*args: Any, **options: Any) -> None: ...
