"""In which order sd-scripts sees its pictures, and how a run that goes on comes to the same place in it.

Order and chance are sd-scripts' own: an epoch is shuffled by torch's random state at its beginning, buckets by the seed
and the number of the epoch, captions and crops by Python's random state. sd-scripts' Python runs this.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, get_worker_info

from sdtune.training.kohya.state import to_python


class Place(NamedTuple):
    """So many batches of an epoch, counted from 1, have been trained on."""

    epoch: int
    batches: int


class Pictures(Dataset[Any]):
    """sd-scripts' ``dataset``, in which batches that a run has behind it are not looked at.

    epoch: a shared number, the epoch of now. before: Python's random state before the batch that was looked at last.
    """

    def __init__(self, dataset: Any, epoch: Any, seed: int) -> None:
        self.dataset, self.epoch = dataset, epoch
        self.before = random.getstate()
        self._seed, self._counted = seed, Place(0, 0)
        self._behind = Place(0, 0)
        self._goes_on = False

    def go_on(self, behind: Place, before: torch.Tensor) -> None:
        """Do not look at what is ``behind``, and at the batch that follows with that random state."""
        self._behind, self.before, self._goes_on = behind, to_python(before), True

    def arrive(self) -> None:
        """Random states are set for all that follows."""
        self._goes_on = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        epoch, worker = self.epoch.value, get_worker_info()
        counted = self._counted.batches if self._counted.epoch == epoch else 0
        self._counted = Place(epoch, counted + 1)
        # Batches are dealt out to processes in turn.
        number = counted * worker.num_workers + worker.id if worker else counted
        if (epoch, number) < self._behind:
            return {}
        if worker:
            # Such a process ends with the run, and with it what it has drawn so far.
            random.seed(f"{self._seed} {epoch} {index}")
        else:
            if self._goes_on:
                random.setstate(self.before)
            self.before = random.getstate()
        self._goes_on = False
        return self.dataset[index]

    # The collate function of sd-scripts says these to the dataset of its process.

    def set_current_epoch(self, epoch: int) -> None:
        self.dataset.set_current_epoch(epoch)

    def set_current_step(self, step: int) -> None:
        self.dataset.set_current_step(step)


class Order(RandomSampler):
    """The order of an epoch. began: the random state that it is drawn from, torch's or that of its own generator."""

    def __init__(self, pictures: Pictures) -> None:
        super().__init__(pictures)
        self._pictures = pictures
        self.began = torch.get_rng_state()
        self._goes_on: tuple[int, torch.Tensor] | None = None

    def go_on(self, epoch: int, began: torch.Tensor) -> None:
        """Draw the order of that epoch from that state."""
        self._goes_on = epoch, began

    def __iter__(self) -> Iterator[int]:
        if self._goes_on and self._goes_on[0] == self._pictures.epoch.value:
            self._set(self._goes_on[1])
        self.began = torch.get_rng_state() if self.generator is None else self.generator.get_state()
        return super().__iter__()

    def _set(self, state: torch.Tensor) -> None:
        if self.generator is None:
            torch.set_rng_state(state)
        else:
            self.generator.set_state(state)


def watched(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    """A loader like sd-scripts' own of the pictures to train on, whose order can be found again."""
    collate: Any = loader.collate_fn
    pictures = Pictures(loader.dataset, collate.current_epoch, seed)
    return DataLoader(
        pictures, batch_size=loader.batch_size, sampler=Order(pictures), collate_fn=collate,
        num_workers=loader.num_workers, persistent_workers=loader.persistent_workers,
    )  # fmt: skip
