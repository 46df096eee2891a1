"""How long hypothesis looks: seconds in every test run, or as long as SDTUNE_FUZZ says (make fuzz).

from tests.security.profiles import examples

@examples(50)                # 50 in every run; with SDTUNE_FUZZ=20, 1,000
@given(...)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

LONGER = int(os.environ.get("SDTUNE_FUZZ", "1"))
"""So many times as long as in every run."""


def examples(count: int) -> Callable[[Any], Any]:
    """So many examples, without a deadline: the machine may be busy. In every run the same ones."""
    return settings(
        max_examples=count * LONGER,
        deadline=None,
        derandomize=LONGER == 1,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )
