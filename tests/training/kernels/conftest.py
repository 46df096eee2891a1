"""Kernels run step by step on the CPU by Triton's interpreter: TRITON_INTERPRET=1 pytest tests/training/kernels.

Triton reads the variable when it is imported, and models would be fused in all other tests that saw it:
``tests/training/test_kernels.py`` runs these in a process of their own.
"""

from __future__ import annotations

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)
