"""What passes between sd-scripts' process and ours of a training's state: one safetensors file. And random states.

sd-scripts' Python runs this, so it imports nothing of sdtune but what needs torch alone.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sdtune.training.components.nested import apart, together

STRUCTURE = "structure"
"""In the header: all that is no tensor."""


def write_state(file: Path, state: Mapping[str, Any]) -> None:
    """Write a state of any depth, without a pickle. What was read from an earlier ``file`` stays as it is."""
    tensors: dict[str, torch.Tensor] = {}
    structure = apart(dict(state), "state", tensors)
    # Copies: some optimizers have one tensor in several places, which the format does not know.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    new = file.with_suffix(".new")
    save_file(copies, new, {STRUCTURE: json.dumps(structure)})
    new.replace(file)


def read_state(file: Path) -> dict[str, Any]:
    """The state in ``file``; its tensors are the file's own memory, and stay when it is deleted."""
    with safe_open(file, framework="pt") as tensors:
        state: dict[str, Any] = together(json.loads(tensors.metadata()[STRUCTURE]), tensors.get_tensor)
    return state


# --- random states ----------------------------------------------------------------------------------------------------


def random_states() -> dict[str, torch.Tensor]:
    """Those of this process: cpu and cuda are torch's, uint8; python and numpy as float64, which holds them exactly."""
    _, keys, position, has_normal, normal = numpy.random.get_state(legacy=True)
    states = {
        "cpu": torch.get_rng_state(),
        "python": of_python(random.getstate()),
        "numpy": torch.tensor([*map(int, keys), position, has_normal, normal], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Make them what they were."""
    torch.set_rng_state(states["cpu"])
    random.setstate(to_python(states["python"]))
    *keys, position, has_normal, normal = states["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), int(position), int(has_normal), normal))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def of_python(state: tuple[Any, ...]) -> torch.Tensor:
    """What ``random.getstate`` gives, float64 [626]: 625 whole numbers, and the next normal one or nan."""
    _, numbers, normal = state
    return torch.tensor([*numbers, math.nan if normal is None else normal], dtype=torch.float64)


def to_python(state: torch.Tensor) -> tuple[Any, ...]:
    """The reverse of ``of_python``."""
    *numbers, normal = state.tolist()
    return 3, tuple(map(int, numbers)), None if math.isnan(normal) else normal


@contextmanager
def drawing_apart() -> Iterator[None]:
    """What is drawn at random inside takes nothing away from what follows, however it ends."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
