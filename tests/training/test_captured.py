"""Recording a step: when, what is fed to it, and what happens where it cannot be. The graph itself needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sdtune import events
from sdtune.training.components.batches import Batch, Noised
from sdtune.training.components.captured import Captured
from sdtune.training.components.text import Conditioning

CPU = torch.device("cpu")


class Recording:
    """Does what a CUDA graph does: it computes from the tensors that it was made with, whatever they hold by then."""

    made = 0

    def __init__(
        self, function: Callable[[], torch.Tensor], inputs: list[torch.Tensor], beside: Recording | None
    ) -> None:
        Recording.made += 1
        self.function, self.inputs, self.beside = function, inputs, beside

    def replay(self, given: list[torch.Tensor]) -> torch.Tensor:
        for kept, new in zip(self.inputs, given, strict=True):
            kept.copy_(new)
        return self.function()


class Refusing(Recording):
    def __init__(self, function: Any, inputs: Any, beside: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


class Full(Recording):
    def __init__(self, function: Any, inputs: Any, beside: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")


def batch(number: float, height: int = 2, prior: int = 0) -> Noised:
    latents = torch.full((2, 4, height, 2), number)
    return Noised(Batch(latents, torch.tensor([1, 2]), prior), latents * 10, torch.tensor([3, 4]))


def sum_of(noised: Noised) -> torch.Tensor:
    given = noised.batch
    return given.latents.sum() + noised.noise.sum() + noised.timesteps.sum() + given.captions.sum() + given.prior


@pytest.fixture(autouse=True)
def none_made() -> None:
    Recording.made = 0


def captured(graphs: type | None, told: list[events.Event] | None = None) -> Captured:
    return Captured(sum_of, CPU, (told if told is not None else []).append, graphs)


@pytest.mark.parametrize("graphs", [None, Recording, Refusing])
def test_every_batch_has_its_own_loss(graphs: type | None) -> None:
    one_pass = captured(graphs)
    for number in (1.0, 2.0, 3.0, 4.0):
        for given in (batch(number), batch(number, height=3), batch(number, prior=1)):
            assert one_pass(given).item() == sum_of(given).item()


@pytest.mark.parametrize("pooled", [None, torch.tensor([[5.0], [7.0]])])
@pytest.mark.parametrize("graphs", [None, Recording])
def test_what_a_batch_brings_of_its_captions_is_its_own(graphs: type | None, pooled: torch.Tensor | None) -> None:
    """Where the captions are too many for the device, the recording reads those of each batch, not of the first."""

    def sum_of_captions(noised: Noised) -> torch.Tensor:
        assert noised.batch.conditioning is not None
        return torch.stack([one.sum() for one in noised.batch.conditioning.tensors]).sum() + sum_of(noised)

    one_pass = Captured(sum_of_captions, CPU, [].append, graphs)
    for number in (1.0, 2.0, 3.0, 4.0):
        brought = Conditioning(torch.full((2, 77, 8), number), None if pooled is None else pooled * number)
        given = batch(number)
        given = replace(given, batch=replace(given.batch, conditioning=brought))
        assert one_pass(given).item() == sum_of_captions(given).item()
    assert Recording.made == (graphs is Recording)


def test_each_shape_is_recorded_once_and_at_its_second_batch() -> None:
    one_pass = captured(Recording)
    made = []
    for given in (batch(1), batch(1, height=3), batch(2), batch(3), batch(2, height=3), batch(1, prior=1), batch(4)):
        one_pass(given)
        made.append(Recording.made)
    assert made == [0, 0, 1, 1, 2, 2, 2]


def test_what_cannot_be_recorded_is_said_once() -> None:
    told: list[events.Event] = []
    one_pass = captured(Refusing, told)
    for number in range(5):
        one_pass(batch(number))
        one_pass(batch(number, height=3))
    [note] = told
    assert isinstance(note, events.Note)
    assert note.text.startswith("The step cannot be recorded as a CUDA graph, so it runs slower: operation not permit")
    assert "more lines" not in note.text


def test_too_little_memory_is_not_taken_for_that() -> None:
    one_pass = captured(Full)
    one_pass(batch(1))
    with pytest.raises(torch.OutOfMemoryError):
        one_pass(batch(2))


def test_recordings_share_the_memory_of_one_that_is_there() -> None:
    made: list[Recording] = []

    class Noted(Recording):
        def __init__(self, function: Any, inputs: Any, beside: Any) -> None:
            super().__init__(function, inputs, beside)
            made.append(self)

    one_pass = captured(Noted)
    for height in (2, 2, 4, 4):
        one_pass(batch(1.0, height))
    assert [one.beside for one in made] == [None, made[0]]
