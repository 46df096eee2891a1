"""Making something once, whatever becomes of the answer.

An answer can be lost after its request was taken. So what is made carries a name that nothing else has, and by that
name it is looked for before it is asked for again, and once more afterwards: a request that was held up on its way may
arrive after it was looked for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

from sdtune.backends.connections import may_be_done, passes, retry_after
from sdtune.errors import JobError, SdtuneError
from sdtune.jobs.backend import Submitted

PATIENCE = 120.0
"""Seconds for which it is tried: quotas of requests are counted by the minute."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 15.0

Explained = Callable[[], AbstractContextManager[None]]


class InDoubtError(JobError):
    """It may have been made, and that cannot be told; the message says how to look."""


def make_once(
    create: Callable[[], Submitted],
    find: Callable[[], Iterable[Submitted]],
    drop: Callable[[Submitted], None],
    look: str,
    explained: Explained,
    pause: Callable[[float], None],
) -> Submitted:
    """The one that was made; its note tells of others that were made beside it, and ended.

    create: makes it, by one request. find: all that there are of its name, the newest first; drop: ends one of them;
    both may raise SdtuneError. look: how the user finds out whether it was made. explained: turns errors of ``create``
    into SdtuneErrors; refusals are raised at once, others when patience is at its end. pause: waits so many seconds.
    Where it is left open whether it was made, the error, or Ctrl-C's KeyboardInterrupt, says ``look``.
    """
    doubt: Exception | None = None
    asking = False
    began, waited = time.monotonic(), 0.0
    try:
        for longest in _waits():
            asking = True
            try:
                made = create()
            except Exception as error:
                asking = False
                if may_be_done(error):
                    doubt = error
                # Not all who were refused at once come back at once.
                wait = max(longest * random.uniform(0.5, 1.0), retry_after(error))
                spent = max(waited, time.monotonic() - began)
                patient = passes(error) and spent + wait <= PATIENCE
                waited += wait
                if doubt:
                    # What has just been made need not be listed yet.
                    pause(min(wait, LONGEST_WAIT))
                    there = _found(find, doubt, look, explained)
                    if there:
                        return _alone(there[-1], there, drop)
                    if passes(error) and not patient:
                        raise _in_doubt(doubt, look, explained) from None
                elif patient:
                    pause(wait)
                if not patient:
                    with explained():
                        raise
            else:
                asking = False
                return _alone(made, find(), drop) if doubt else made
    except KeyboardInterrupt:
        if asking or doubt:
            raise KeyboardInterrupt(look) from None
        raise
    raise AssertionError("the waits never end")


def _waits() -> Iterator[float]:
    wait = FIRST_WAIT
    while True:
        yield wait
        wait = min(2 * wait, LONGEST_WAIT)


def _found(
    find: Callable[[], Iterable[Submitted]],
    doubt: Exception,
    look: str,
    explained: Explained,
) -> list[Submitted]:
    try:
        return list(find())
    except SdtuneError:
        raise _in_doubt(doubt, look, explained) from None


def _in_doubt(doubt: Exception, look: str, explained: Explained) -> InDoubtError:
    try:
        with explained():
            raise doubt
    except SdtuneError as error:
        return InDoubtError(f"{error} It may have been made all the same: {look}")


def _alone(made: Submitted, there: Iterable[Submitted], drop: Callable[[Submitted], None]) -> Submitted:
    """``made``, after all others were ended."""
    notes = []
    try:
        for other in there:
            if other.number == made.number:
                continue
            try:
                drop(other)
                notes.append(f"It had been made twice, as an answer was lost; {other.number} is cancelled.")
            except SdtuneError as error:
                notes.append(f"It was made twice, as an answer was lost; cancel {other.number}, for {error}")
    except SdtuneError as error:
        notes.append(f"An answer was lost; whether it was made twice cannot be told: {error}")
    return replace(made, note=" ".join(notes))
