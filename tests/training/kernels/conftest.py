"""Kernels run step by step on the CPU by Triton's interpreter: TRITON_INTERPRET=1 pytest tests/training/kernels.

Triton reads the variable when it is imported, and models would be fused in all other tests that saw it:
``tests/training/test_kernels.py`` runs these in a process of their own.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has whole numbers for bfloat16, multiplies those in products, and cuts off where a GPU rounds."""
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(given: Any) -> Any:
        if given.dtype.scalar != language.bfloat16:
            return given
        return TensorHandle((given.data.astype("uint32") << 16).view("float32"), language.float32)

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(self, wide(a), wide(b), *more)

    def cast_impl(self: Any, given: Any, kind: Any) -> Any:
        if (given.dtype.scalar, kind.scalar) != (language.float32, language.bfloat16):
            return cast(self, given, kind)
        bits = np.ascontiguousarray(given.data).view("uint32")
        return TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("uint16"), language.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
