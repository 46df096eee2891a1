"""The held-out loss: on fixed pictures, noise and timesteps, so that steps and runs can be compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdtune import events
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.data import CachedImages
from sdtune.training.components.loss import errors
from sdtune.training.components.models import Parts
from sdtune.training.components.text import Captions
from sdtune.training.run import Run

DRAWS = 64
AT_ONCE = 8
SEED = 2_000_000
"""Not the run's: runs with other seeds are measured on the same noise."""


@dataclass(frozen=True)
class Draws:
    """What the loss is measured on. pictures, timesteps: int64 [64]; noise: of each draw, as its picture's latents."""

    pictures: torch.Tensor
    noise: list[torch.Tensor]
    timesteps: torch.Tensor


def fixed_draws(shapes: Sequence[Sequence[int]], num_train_timesteps: int) -> Draws:
    """64 draws of the pictures in turn, the same at every call; shapes: of each picture's latents."""
    generator = torch.Generator().manual_seed(SEED)
    pictures = torch.arange(DRAWS) % len(shapes)
    noise = [torch.randn(*shapes[picture], generator=generator) for picture in pictures]
    # One timestep from each of 64 equal spans, in an order that gives each picture early and late ones.
    timesteps = ((torch.randperm(DRAWS, generator=generator) + 0.5) / DRAWS * num_train_timesteps).long()
    return Draws(pictures, noise, timesteps)


class HeldOutLoss:
    """Measures the mean squared error of the prediction over 64 draws, weighted by nothing."""

    def __init__(
        self, parts: Parts, images: CachedImages, captions: Captions, method: TrainingFields, run: Run
    ) -> None:
        self._parts, self._captions, self._method, self._run = parts, captions, method, run
        draws = fixed_draws([mean.shape[1:] for mean in images.mean], parts.noise_scheduler.config.num_train_timesteps)
        # Every picture the same: its mean latents, without the VAE's own noise.
        self._latents = [images.mean[picture][0] * images.scaling_factor for picture in draws.pictures]
        self._rows = images.captions[draws.pictures]
        self._noise, self._timesteps = draws.noise, draws.timesteps
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for draw, latents in enumerate(self._latents):
            by_shape[latents.shape].append(draw)
        self._at_once = [same[at : at + AT_ONCE] for same in by_shape.values() for at in range(0, len(same), AT_ONCE)]

    @torch.no_grad()
    def measure(self, step: int) -> float:
        """The loss after ``step`` steps, told as an event; once, also where the run was stopped between."""
        for earlier in self._run.record.measures:
            if (earlier.name, earlier.step) == ("held_out_loss", step):
                return earlier.value
        found = torch.cat([self._errors(draws) for draws in self._at_once])
        value = round(found.mean().item(), 6)
        self._run.tell(events.Measure("held_out_loss", step, value))
        return value

    @torch.no_grad()
    def rehearse(self) -> None:
        """The first of its passes, for nothing."""
        self._errors(self._at_once[0])

    def _errors(self, draws: list[int]) -> torch.Tensor:
        """Of these draws, which are of one shape; [draws]."""
        with self._parts.evaluating(), self._parts.computing(self._run):
            return errors(
                self._parts,
                torch.stack([self._latents[draw] for draw in draws]),
                self._captions.encode(self._rows[draws]),
                torch.stack([self._noise[draw] for draw in draws]),
                self._timesteps[draws],
            )

    def measure_if_due(self, step: int) -> None:
        """Measure every ``held_out_every`` steps, and after the last."""
        every = self._method.held_out_every
        if step == self._method.max_train_steps or (every and step % every == 0):
            self.measure(step)
