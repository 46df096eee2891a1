"""A step before the first: it has the fused kernels compiled, all at once, and cuDNN's algorithms chosen.

A kernel is compiled when it is first started, which takes about a second; one after the other, those of a step take
half a minute of a GPU that waits for them. They are kept on the machine's disk, but a job's machine is new.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sdtune import events
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.batches import Noised
from sdtune.training.components.captured import on_device, searching
from sdtune.training.components.held_out import HeldOutLoss
from sdtune.training.components.loop import Training, pass_of
from sdtune.training.components.models import Parts
from sdtune.training.run import Run


def rehearse(
    loss_of: Callable[[Noised], torch.Tensor],
    held_out: HeldOutLoss,
    parts: Parts,
    training: Training,
    method: TrainingFields,
    run: Run,
) -> None:
    """Go through a step as ``fit`` will, and a measure, with kernels compiled instead of started. Nothing is changed.

    What is computed is worth nothing, since the kernels' results are missing: gradients are zeroed, and everything
    random is drawn again.
    """
    if not parts.fused:
        return
    from sdtune.training.kernels.launch import rehearsal

    run.tell(events.Phase("load", "Compiling the kernels of a step"))
    before = training.draws.state_dict()
    noised = on_device(next(training.draws), run.device)
    training.draws.load_state_dict(before)
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices), searching(), rehearsal(run.device):
        pass_of(loss_of, parts, training, method, run)(noised)
        held_out.rehearse()
    training.weights.forget()
