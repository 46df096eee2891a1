"""torch.compile in place of the fused kernels: the UNet's blocks, while they are trained.

Block by block, not the UNet as a whole: blocks of one class and shape are compiled once, and a UNet has a few dozen of
few shapes. Samples and measures have shapes of their own and are drawn by the blocks as they are. Graphs of CUDA are
recorded of all of it by captured.py, as without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from sdtune import events
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.compiled_code import CompiledCode
from sdtune.training.run import Run

BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
"""What most of the time is spent in. What is left are single convolutions and products, of which nothing is gained."""
BACKEND = "inductor"
MOST_VARIANTS = 4096
"""Of a class: its blocks in all shapes of all buckets. Beyond, torch would stop compiling without a word."""


def compile_blocks(unet: Any, run: Run, instead: Callable[[], None]) -> None:
    """Let the UNet compute with compiled blocks where it is trained; the first pass of each shape compiles.

    In place: names, parameters and state_dict stay, and adapters may come later. Call it once, when the model is on its
    device: before its weights are put into flat tensors, which the change of their layout would part. instead: makes of
    the UNet what it is without this, where compiling fails.
    """
    # Compiled late, an error of the backward pass would leave half of the gradients behind.
    run.opened.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
    limits: dict[str, Any] = {"recompile_limit": MOST_VARIANTS, "accumulated_recompile_limit": MOST_VARIANTS}
    run.opened.enter_context(torch._dynamo.config.patch(**limits))
    if unet.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    compiled = {kind: torch.compile(kind.forward, dynamic=False, backend=BACKEND) for kind in BLOCKS}
    blocks = [module for module in unet.modules() if type(module) in compiled]
    for block in blocks:
        block.forward = _Block(block, compiled[type(block)])
    unet.forward = _Compiling(unet, blocks, CompiledCode(run), run, instead)


def note_change(method: TrainingFields, run: Run) -> None:
    """Say it if the run goes on otherwise than it was begun; as with another GPU, that is allowed."""
    if run.checkpoints.goes_on:
        then = bool(run.checkpoints.goes_on.recipe.get("torch_compile", False))
        if then != method.torch_compile:
            words = {True: "with --torch-compile", False: "without --torch-compile"}
            run.tell(
                events.Note(
                    f"The checkpoint was written {words[then]} and the run goes on {words[method.torch_compile]}: the "
                    "rest may come out different in the last digits.",
                    "warning",
                )
            )


class _Block:
    """The forward pass of one block: compiled while it is trained."""

    def __init__(self, block: Any, compiled: Callable[..., Any]) -> None:
        self._block, self._compiled = block, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trained = self._block.training and torch.is_grad_enabled()
        return (self._compiled if trained else type(self._block).forward)(self._block, *args, **kwargs)


class _Compiling:
    """The forward pass of the UNet: tells when it compiles, has it kept, and does without where it cannot be done."""

    def __init__(self, unet: Any, blocks: list[Any], code: CompiledCode, run: Run, instead: Callable[[], None]) -> None:
        self._unet, self._blocks, self._code, self._run, self._instead = unet, blocks, code, run, instead
        self._shapes: set[torch.Size] = set()

    def __call__(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        unet = self._unet
        if not (unet.training and torch.is_grad_enabled()):
            return type(unet).forward(unet, sample, *args, **kwargs)
        if sample.shape in self._shapes:
            # The backward pass has run, too: all of the shape is there.
            self._code.keep()
            return type(unet).forward(unet, sample, *args, **kwargs)
        self._shapes.add(sample.shape)
        height, width = sample.shape[-2:]
        how = "from what is kept" if self._code.found else "minutes the first time; kept"
        self._run.tell(
            events.Phase("compile", f"Compiling the UNet for latents of {width}x{height} ({how} in {self._code.place})")
        )
        started = time.perf_counter()
        try:
            predicted = type(unet).forward(unet, sample, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._give_up(error)
            return unet(sample, *args, **kwargs)
        seconds = time.perf_counter() - started
        self._run.tell(events.Phase("train", f"Compiled in {seconds:.0f} s; training"))
        return predicted

    def _give_up(self, error: Exception) -> None:
        """The UNet computes as it would without --torch-compile."""
        for module in (self._unet, *self._blocks):
            del module.forward
        self._instead()
        # The first line says which backend failed, the next one why.
        why = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]) or type(error).__name__
        self._run.tell(
            events.Note(f"torch_compile: the UNet cannot be compiled, so it computes as without: {why}", "warning")
        )
        self._run.tell(events.Phase("train", "Training without torch.compile"))
