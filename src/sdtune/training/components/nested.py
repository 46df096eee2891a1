"""A state in two: tensors by name, and all else as JSON that says where they belong; and one that does not fit.

A state is what ``state_dict`` gives: tensors, numbers, texts, truth values and None, in dictionaries, lists and tuples
of any depth. Needs no library but torch, so that sd-scripts' Python can import it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sdtune.errors import TrainingError


def apart(content: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """``content`` as JSON; its tensors are put into ``tensors``, under ``name`` and the way to them.

    TypeError: there is something in it that is neither.
    """
    match content:
        case torch.Tensor():
            # {"a.b": ...} and {"a": {"b": ...}} would have one name.
            while name in tensors:
                name += "'"
            tensors[name] = content
            return {"tensor": name}
        case dict():
            return {"dict": [[key, apart(one, f"{name}.{key}", tensors)] for key, one in content.items()]}
        case list() | tuple():
            inside = [apart(one, f"{name}.{number}", tensors) for number, one in enumerate(content)]
            return {"list" if isinstance(content, list) else "tuple": inside}
        case None | bool() | int() | float() | str():
            return content
        case _:
            raise TypeError(f"{name}: a {type(content).__name__} cannot be kept in a checkpoint")


def together(content: Any, tensor_of: Callable[[str], torch.Tensor]) -> Any:
    """The reverse of ``apart``: equal bit for bit, and of the same types."""
    match content:
        case {"tensor": name}:
            return tensor_of(name)
        case {"dict": items}:
            return {key: together(one, tensor_of) for key, one in items}
        case {"list": inside}:
            return [together(one, tensor_of) for one in inside]
        case {"tuple": inside}:
            return tuple(together(one, tensor_of) for one in inside)
        case _:
            return content


@contextmanager
def loading(step: int) -> Iterator[None]:
    """Inside, the state of a checkpoint is loaded, that of ``step``. TrainingError: it does not fit."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(
            f"checkpoint: that of step {step} does not fit ({type(error).__name__}: {error}); was it "
            "written by another version? Begin anew with --overwrite."
        ) from None
