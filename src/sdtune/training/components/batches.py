"""What one step sees: pictures dealt out in batches, and the noise that hides them. All of it is drawn on the CPU.

So a run draws the same on every device, several processes draw the same and each takes its share, and what is drawn
next is a few numbers that a checkpoint can hold.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sdtune.methods.buckets import Shape
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.models import Parts
from sdtune.training.components.processes import ALL, Share
from sdtune.training.components.text import Captions, Conditioning

if TYPE_CHECKING:
    from sdtune.training.components.data import CachedImages

State = dict[str, Any]
"""What a checkpoint keeps: tensors, numbers and texts, in lists and dictionaries."""


@dataclass(frozen=True)
class Batch:
    """The pictures that one process sees in one step.

    latents: scaled, float32 [batch, 4, height / 8, width / 8]; captions: int64 [batch], rows of the run's Captions.
    prior: so many of the last rows are class pictures, whose loss keeps the model's prior.
    share: of a batch that is spread over several processes, which part this is. names: of the pictures, for messages.
    conditioning: of the captions, where the run has too many for the device to hold them all.
    """

    latents: torch.Tensor
    captions: torch.Tensor
    prior: int = 0
    share: Share = ALL
    names: tuple[str, ...] = ()
    conditioning: Conditioning | None = None

    @property
    def shape(self) -> torch.Size:
        """[height / 8, width / 8], the same for all its pictures."""
        return self.latents.shape[-2:]


@dataclass(frozen=True)
class Noised:
    """A batch and what hides it: everything random about one pass through the UNet.

    noise: as the batch's latents; timesteps: int64 [batch].
    """

    batch: Batch
    noise: torch.Tensor
    timesteps: torch.Tensor


class Batches(Iterator[Batch]):
    """Endless full batches of pictures of one shape each; every picture is shown as often as its repeats say.

    Several processes with one seed draw the same, as one process would whose batches are ``size`` for each of
    them together, and each keeps its share.
    """

    def __init__(self, images: CachedImages, size: int, generator: torch.Generator, share: Share = ALL) -> None:
        self._images, self._size, self._generator, self._share = images, size * share.of, generator, share
        repeats = torch.tensor([picture.repeats for picture in images.pictures])
        self._one_round = torch.repeat_interleave(torch.arange(len(repeats)), repeats)
        self._round: deque[int] = deque()
        # What a round leaves over of a shape waits for the next round, so that no picture is left out.
        self._waiting: dict[Shape, list[int]] = defaultdict(list)

    def __next__(self) -> Batch:
        images, generator = self._images, self._generator
        indices = self._indices()
        variant = torch.randint(images.mean[0].shape[0], (self._size,), generator=generator).tolist()
        mean = torch.stack([images.mean[index][one] for index, one in zip(indices, variant, strict=True)])
        std = torch.stack([images.std[index][one] for index, one in zip(indices, variant, strict=True)])
        noise = torch.randn(mean.shape, generator=generator)
        captions = images.captions[indices]
        if images.proportion_empty_prompts:
            dropped = torch.rand(self._size, generator=generator) < images.proportion_empty_prompts
            captions = captions.masked_fill(dropped, 0)
        return Batch(
            self._share.rows((mean + std * noise) * images.scaling_factor),
            self._share.rows(captions),
            share=self._share,
            names=tuple(images.pictures[index].path.name for index in self._share.rows(torch.tensor(indices))),
        )

    def _indices(self) -> list[int]:
        """So many pictures of one shape, of endless shuffled rounds."""
        while True:
            if not self._round:
                self._round.extend(
                    self._one_round[torch.randperm(len(self._one_round), generator=self._generator)].tolist()
                )
            index = self._round.popleft()
            same = self._waiting[self._images.shapes[index]]
            same.append(index)
            if len(same) == self._size:
                chosen = list(same)
                same.clear()
                return chosen

    def state_dict(self) -> State:
        """Where the round is; the generator's state is its own."""
        waiting = [index for same in self._waiting.values() for index in same]
        return {"round": list(self._round), "waiting": waiting}

    def load_state_dict(self, state: State) -> None:
        self._round = deque(state["round"])
        self._waiting.clear()
        for index in state["waiting"]:
            self._waiting[self._images.shapes[index]].append(index)


class WithPrior(Iterator[Batch]):
    """Each batch of the subject followed by one of as many class pictures, to go through the UNet together."""

    def __init__(self, subject: Batches, classes: Mapping[torch.Size, Batches]) -> None:
        """classes: batches of the class pictures of each shape, under [height / 8, width / 8]."""
        self._subject, self._classes = subject, classes

    def __next__(self) -> Batch:
        subject = next(self._subject)
        prior = next(self._classes[subject.shape])
        return Batch(
            torch.cat([subject.latents, prior.latents]),
            torch.cat([subject.captions, prior.captions]),
            prior=len(prior.latents),
            share=subject.share,
            names=subject.names + prior.names,
        )

    def state_dict(self) -> State:
        of_classes = {f"{shape[0]}x{shape[1]}": batches.state_dict() for shape, batches in self._classes.items()}
        return {"subject": self._subject.state_dict(), "classes": of_classes}

    def load_state_dict(self, state: State) -> None:
        self._subject.load_state_dict(state["subject"])
        for shape, batches in self._classes.items():
            batches.load_state_dict(state["classes"][f"{shape[0]}x{shape[1]}"])


class Draws(Iterator[Noised]):
    """Batches with their noise and timesteps: where all random numbers of a run's data come from."""

    def __init__(
        self,
        images: CachedImages,
        captions: Captions,
        parts: Parts,
        method: TrainingFields,
        share: Share,
        classes: CachedImages | None = None,
    ) -> None:
        """classes: class pictures to keep the prior with, in shapes that ``images`` have."""
        self._captions, self._method = captions, method
        self._timesteps = int(parts.noise_scheduler.config.num_train_timesteps)
        seeds = {"order": method.seed, "class order": method.seed, "noise": method.seed + 1}
        self._generators = {name: torch.Generator().manual_seed(seed) for name, seed in seeds.items()}
        size = method.train_batch_size
        self._batches: Batches | WithPrior = Batches(images, size, self._generators["order"], share)
        if classes:
            of_shape = {
                shape: Batches(same, size, self._generators["class order"], share)
                for shape, same in classes.by_shape().items()
            }
            self._batches = WithPrior(self._batches, of_shape)

    def __next__(self) -> Noised:
        batch = next(self._batches)
        batch = replace(batch, conditioning=self._captions.travelling(batch.captions))
        return noised(batch, self._timesteps, self._method.noise_offset, self._generators["noise"])

    def state_dict(self) -> State:
        generators = {name: generator.get_state() for name, generator in self._generators.items()}
        return {"generators": generators, "batches": self._batches.state_dict()}

    def load_state_dict(self, state: State) -> None:
        for name, generator in self._generators.items():
            generator.set_state(state["generators"][name])
        self._batches.load_state_dict(state["batches"])


def noised(batch: Batch, timesteps: int, noise_offset: float, generator: torch.Generator) -> Noised:
    """The batch with noise and a timestep of 0 to ``timesteps`` - 1 for each picture, drawn for all processes alike."""
    rows, *shape = batch.latents.shape
    rows *= batch.share.of
    noise = torch.randn(rows, *shape, generator=generator)
    if noise_offset:
        # https://www.crosslabs.org/blog/diffusion-with-offset-noise
        noise += noise_offset * torch.randn(rows, shape[0], 1, 1, generator=generator)
    drawn = torch.randint(timesteps, (rows,), generator=generator)
    return Noised(batch, batch.share.rows(noise), batch.share.rows(drawn))
