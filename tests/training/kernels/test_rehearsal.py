"""In a rehearsal kernels are compiled, each kind once, and none is started. On a GPU the compiler itself is at work."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from sdtune.training.components.fused import fuse
from sdtune.training.kernels import residual
from sdtune.training.kernels.launch import launch, rehearsal
from tests.training.kernels.test_unet import learn, unet

CPU = torch.device("cpu")


@dataclass
class Parameter:
    do_not_specialize: bool


@dataclass
class Kernel:
    """Notes what it is started with and compiled for. general: which parameters it is not compiled for."""

    general: tuple[bool, ...] = (False, False)
    started: list[Any] = field(default_factory=list)
    compiled: list[Any] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    @property
    def params(self) -> list[Parameter]:
        return [Parameter(one) for one in self.general]

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.started.append((grid, args, options))

    def warmup(self, *args: Any, grid: Any, **options: Any) -> None:
        self.threads.add(threading.get_ident())
        self.compiled.append((args, options))


def test_outside_of_one_kernels_are_started() -> None:
    kernel, x = Kernel(), torch.zeros(4)
    launch(kernel, (2, 3))(x, 5, WIDTH=8)
    with rehearsal(CPU):
        launch(kernel, (2, 3))(x, 5, WIDTH=8)
    launch(kernel, (1,))(x, 6, WIDTH=8)
    assert kernel.started == [((2, 3), (x, 5), {"WIDTH": 8}), ((1,), (x, 6), {"WIDTH": 8})]


def test_each_kind_of_arguments_is_compiled_once_in_another_thread() -> None:
    kernel, half, whole = Kernel(), torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64)
    with rehearsal(CPU):
        for x in (half, half.clone(), whole):
            for number in (1, 3, 5, 16, 32, 2**40):
                launch(kernel, (7,))(x, number, WIDTH=8)
        launch(kernel, (7,))(half[1:], 3, WIDTH=8)
        launch(kernel, (7,))(half, 3, WIDTH=16)
    kinds = [(dtype, number, 8) for dtype in (torch.bfloat16, torch.float32) for number in (1, 3, 16, 2**40)]
    found = [(args[0], args[1], options["WIDTH"]) for args, options in kernel.compiled]
    assert len(found) == len(kinds) + 2
    assert {one for one in found if isinstance(one[0], torch.dtype)} == {*kinds, (torch.bfloat16, 3, 16)}
    # Where it does not begin at a multiple of 16 bytes, the tensor itself says so.
    assert [args[0].data_ptr() % 16 for args, _ in kernel.compiled if isinstance(args[0], torch.Tensor)] == [2]
    assert threading.get_ident() not in kernel.threads
    assert not kernel.started


def test_numbers_that_a_kernel_is_not_compiled_for_are_all_one_kind() -> None:
    kernel = Kernel(general=(False, True))
    with rehearsal(CPU):
        for number in (1, 3, 16):
            launch(kernel, (7,))(torch.zeros(4), number)
    assert len(kernel.compiled) == 1


def test_what_the_compiler_refuses_is_raised_and_kernels_start_again() -> None:
    class Refused(Kernel):
        def warmup(self, *args: Any, grid: Any, **options: Any) -> None:
            raise RuntimeError("no compiler")

    kernel = Refused()
    with pytest.raises(RuntimeError, match="no compiler"), rehearsal(CPU):
        launch(kernel, (7,))(torch.zeros(4), 1)
    launch(kernel, (7,))(torch.zeros(4), 1)
    assert kernel.started


def test_a_unet_goes_through_one_and_learns_the_same_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed, other = unet(lora=True), unet(lora=True)
    assert fuse(rehearsed, pytest.fail)
    assert fuse(other, pytest.fail)
    with rehearsal(CPU), monkeypatch.context() as patched:
        patched.setattr(residual, "_add", _Refusing(residual._add))
        learn(rehearsed)
    rehearsed.zero_grad()
    loss, grads = learn(rehearsed)
    wanted, wanted_grads = learn(other)
    assert loss == wanted
    assert all(torch.equal(grads[name], grad) for name, grad in wanted_grads.items())


class _Refusing:
    """A kernel that may be compiled and not started."""

    def __init__(self, kernel: Any) -> None:
        self.warmup = kernel.warmup

    def __getitem__(self, grid: Any) -> Any:
        raise AssertionError("started in a rehearsal")
