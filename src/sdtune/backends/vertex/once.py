"""Something is made once, whatever becomes of an answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from sdtune.backends.vertex.google import passes
from sdtune.backends.vertex.reasons import Place, error_of, explained, translate
from sdtune.errors import CapacityError

ATTEMPTS = 6
Made = TypeVar("Made")


def make_once(create: Callable[[], Made], find: Callable[[], Made | None], what: str, place: Place) -> Made:
    """What ``create`` makes. After an error that passes, ``find`` tells whether it was made all the same.

    what: cannot be done, for the message. CapacityError: the region has no quota for it. JobError, ProjectError: it is
    refused, and why.
    """
    for attempt in range(ATTEMPTS):
        try:
            return create()
        except Exception as error:
            reason = translate(str(getattr(error, "message", error)), place)
            if reason.no_capacity:
                raise CapacityError(f"{what}: {reason.text}") from None
            if not passes(error):
                with explained(what, place):
                    raise
            # The request may have arrived although its answer did not.
            if (made := find()) is not None:
                return made
            if attempt == ATTEMPTS - 1:
                raise error_of(error, what, place) from None
            time.sleep(min(2.0**attempt, 15.0))
    raise AssertionError("the last attempt returns or raises")
