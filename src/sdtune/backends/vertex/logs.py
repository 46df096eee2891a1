"""The logs of a job, followed while it runs: every line once, the state at every poll, to the end of both.

Cloud Logging answers questions about time only, and lines reach it late, often by seconds, in any order and now and
then twice. So what was read is read again until it cannot change any more, and lines are known by their insertId.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar

from google.api_core import exceptions as api

from sdtune.backends.connections import cause_of, passes, retry_after
from sdtune.backends.vertex.entries import Entry, EntryReader
from sdtune.backends.vertex.records import state_of
from sdtune.jobs.backend import LogLine, StateChange

ListEntries = Callable[[dict[str, Any]], dict[str, Any]]
JobState = Callable[[], Mapping[str, Any]]
Answer = TypeVar("Answer")

TERMINAL = {"succeeded", "failed", "cancelled", "expired", "partially succeeded"}
WORDS = {
    "queued": "queued: waiting for quota",
    "pending": "pending: a machine is being provisioned, which usually takes 5 to 10 minutes",
    "cancelling": "cancelling: the job is being stopped",
    "updating": "updating: Vertex AI is changing the job",
    "expired": "expired: the job was ended after its timeout",
    "partially succeeded": "partially succeeded: not all of the job has a result",
}

PAGE = 1000
"""Entries in one answer; the service gives no more."""
LATE = 60.0
"""Seconds that a line may take from its timestamp to the first answer that has it."""
NEAR = 500
"""Entries that every poll reads again: with what is new, most often one page."""
PAGES_AT_ONCE = 60
DRAIN = 15.0
"""Seconds for which lines are awaited after the job has ended,"""
STILL = 5.0
"""and for which none must have come."""
LONG_OVER = timedelta(minutes=15)
"""Since a job's end, by a clock that may be wrong: no line of it is on its way."""

PAUSES = ((60.0, 2.0), (300.0, 5.0))
"""Up to so many seconds without a line: seconds from one poll to the next. The quota, 60 questions a minute, is shared
by everyone in the project."""
WHILE_SILENT, WHILE_DRAINING = 15.0, 3.0
YOUNG = 1200.0
"""Seconds in a state for which the first line is awaited as if it could come at any moment."""

ATTEMPTS = 20
"""To ask one question, a quarter of an hour in all."""
LONGEST_WAIT = 60.0


class Clock(Protocol):
    """The part of the module ``time`` that is needed."""

    def monotonic(self) -> float: ...
    def time(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


def read_logs(
    list_entries: ListEntries,
    job_state: JobState,
    project: str,
    job_id: str,
    *,
    follow: bool = True,
    since: datetime | None = None,
    tail: int | None = None,
    replica: str | None = None,
    clock: Clock = time,
) -> Iterator[LogLine | StateChange]:
    """Every line of a job, from its first; with ``follow`` its states too, until it has ended, which is told last.

    list_entries: asks entries:list; job_state: the job as Vertex AI returns it; job_id: its number. Both may raise
    errors of google.api_core, and passing ones are borne for a quarter of an hour. since: lines from then on; tail:
    the last so many of those there are, and what comes after them; replica: lines of that one alone.
    """
    job = _asked(job_state, clock)
    terms = ['resource.type="ml_job"', f"resource.labels.job_id={json.dumps(job_id)}"]
    terms += [f"resource.labels.task_name={json.dumps(replica)}"] if replica else []
    # Without a bound the service looks at the last day alone.
    start = since or datetime.fromisoformat(job["createTime"]) - timedelta(minutes=1)
    log = _Log(list_entries, clock, project, " AND ".join(terms), _stamp(start.timestamp()))
    entries, skipped = EntryReader(), _skip_all_but(tail, log)

    def lines(found: Iterator[Entry]) -> Iterator[LogLine]:
        for entry in found:
            # Of the first entry of a tail, the last lines may be wanted alone.
            skip = skipped[1] if skipped and _key(entry) == skipped[0] else 0
            yield from entries.lines(entry)[skip:]

    if not follow or _is_long_over(job, clock):
        yield from lines(log.unsettled())
        if follow:
            yield _change(job)
        return
    yield from _followed(job_state, log, lines, clock)


def _followed(
    job_state: JobState, log: _Log, lines: Callable[[Iterator[Entry]], Iterator[LogLine]], clock: Clock
) -> Iterator[LogLine | StateChange]:
    state, ended, said_anything = "", None, False
    news = changed = clock.monotonic()
    while True:
        began = clock.monotonic()
        job = _asked(job_state, clock)
        if state != state_of(job):
            state, news, changed = state_of(job), began, began
            if state in TERMINAL:
                ended = began
            else:
                yield _change(job)
        if ended is not None and began >= max(ended + DRAIN, news + STILL):
            yield from lines(log.unsettled())
            yield _change(job)
            return
        for line in lines(log.news()):
            news = clock.monotonic()
            said_anything = said_anything or bool(line.replica)
            yield line
        # The first line is awaited from the machine's start on, however long that takes.
        is_young = state in ("pending", "running") and not said_anything and began < changed + YOUNG
        pause = WHILE_DRAINING if ended is not None else _pause(0.0 if is_young else clock.monotonic() - news)
        if not log.is_behind:
            clock.sleep(max(0.0, began + pause - clock.monotonic()))


def _pause(quiet: float) -> float:
    return next((pause for seconds, pause in PAUSES if quiet < seconds), WHILE_SILENT)


@dataclass(eq=False, slots=True)
class _Stretch:
    """The entries from one timestamp on, up to where the next stretch starts."""

    start: str
    seen: set[str] = field(default_factory=set)


class _Log:
    """What Cloud Logging has of one job, each entry handed out once.

    What is read can change until it is LATE seconds old. To read that much again at every poll would cost, at 10,000
    lines a second, 600 pages. So a poll goes back by NEAR entries only, which is all there is at ordinary rates, and
    finds late lines among them at once; what lies further back is read a second time when it is LATE seconds old, and
    forgotten. However fast a job writes, its lines are read twice, and insertIds are kept for LATE seconds.

    Time is the service's own, told by the newest receiveTimestamp: the clock of this machine may be wrong, and the
    timestamps come from other machines. Timestamps are compared as text, without the Z: they are UTC, and more digits
    follow fewer.
    """

    def __init__(self, ask: ListEntries, clock: Clock, project: str, scope: str, start: str) -> None:
        self._ask = ask
        self._clock = clock
        self._project = project
        self._scope = scope
        self._stretches = [_Stretch(start)]
        self._first_key = ""
        self._received = ""
        self._behind_service: float | None = None
        self.is_behind = False
        """There is more to read already."""

    def newest(self, wanted: int) -> Iterator[Entry]:
        """Entries from the newest back, one page after the other."""
        body = self._question(self._stretches[0].start, None, min(PAGE, wanted)) | {"orderBy": "timestamp desc"}
        seen = set()
        for answer in self._answers(body):
            for entry in answer.get("entries", ()):
                if _key(entry) not in seen:
                    seen.add(_key(entry))
                    self._learn_time(entry)
                    yield entry

    def start_with(self, entry: Entry) -> None:
        """Hand out nothing that comes before ``entry``."""
        self._first_key = _key(entry)
        self._stretches = [_Stretch(_time(entry))]

    def news(self) -> Iterator[Entry]:
        """What has come since the last call, and what has come late, as far as it is time to look for that."""
        self.is_behind = False
        newest = len(self._stretches) - 1
        first, known = newest, len(self._stretches[newest].seen)
        while first > 0 and known + len(self._stretches[first - 1].seen) <= NEAR:
            first -= 1
            known += len(self._stretches[first].seen)
        yield from self._read(first, newest + 1, PAGES_AT_ONCE)
        # In whole pages, or when it is high time.
        settled, overdue = self._service_time(LATE), self._service_time(1.5 * LATE)
        past, known = 0, 0
        while past + 1 < len(self._stretches) and self._stretches[past + 1].start <= settled:
            known += len(self._stretches[past].seen)
            past += 1
        if past and (known >= 0.9 * PAGE or self._stretches[1].start <= overdue):
            yield from self._read(0, past, PAGES_AT_ONCE + 1)

    def unsettled(self) -> Iterator[Entry]:
        """All that has come since the last call, late or not."""
        self.is_behind = True
        while self.is_behind:
            self.is_behind = False
            yield from self._read(0, len(self._stretches), None)

    def _read(self, first: int, last: int, pages: int | None) -> Iterator[Entry]:
        """Unknown entries of the stretches from ``first`` on and before ``last``, which may be the one to come."""
        settled = self._service_time(LATE)
        is_open = last == len(self._stretches)
        lower, upper = self._stretches[first].start, None if is_open else self._stretches[last].start
        at, read, more = first, 0, False
        for answer in self._answers(self._question(lower, upper, PAGE)):
            entries = answer.get("entries", ())
            for entry in entries:
                stamp = _time(entry)
                while at + 1 < len(self._stretches) and stamp >= self._stretches[at + 1].start:
                    at += 1
                seen, key = self._stretches[at].seen, f"{stamp} {entry['insertId']}"
                if key in seen or key < self._first_key:
                    continue
                seen.add(key)
                self._learn_time(entry)
                yield entry
            if is_open and entries:
                at = self._extend(at, _time(entries[-1]))
            if first == 0:
                gone = self._forget(at, settled)
                at, last = at - gone, last - gone
            read, more = read + 1, "nextPageToken" in answer
            # A chain of pages that never ends would never come to what is late, nor to the job's state.
            if pages and read >= pages and more and self._stretches[at].start > lower:
                self.is_behind = True
                return
        if first == 0 and not more:
            self._forget(len(self._stretches) if is_open else last, settled)

    def _extend(self, at: int, stamp: str) -> int:
        """Begin a new stretch at ``stamp``, and return the index of the one that is read now.

        Not past the service's own time: else all lines to come would be older than one that a fast clock has dated.
        """
        newest, start = self._stretches[-1], min(stamp, self._received)
        if start <= newest.start:
            return at
        self._stretches.append(_Stretch(start, {key for key in newest.seen if key >= start}))
        return len(self._stretches) - 1

    def _forget(self, count: int, settled: str) -> int:
        """Drop stretches, of the first ``count``, that were old enough when the reading began; how many those are."""
        gone = 0
        while gone < count and gone + 1 < len(self._stretches) and self._stretches[gone + 1].start <= settled:
            gone += 1
        del self._stretches[:gone]
        return gone

    def _learn_time(self, entry: Entry) -> None:
        received = entry.get("receiveTimestamp", entry["timestamp"]).removesuffix("Z")
        if received > self._received:
            self._received = received
            behind = datetime.fromisoformat(received + "Z").timestamp() - self._clock.monotonic()
            self._behind_service = behind if self._behind_service is None else max(behind, self._behind_service)

    def _service_time(self, ago: float) -> str:
        """So many seconds ago by the service's clock, or somewhat earlier, since answers take time; "" if unknown."""
        if self._behind_service is None:
            return ""
        return _stamp(self._clock.monotonic() + self._behind_service - ago)

    def _question(self, lower: str, upper: str | None, size: int) -> dict[str, Any]:
        terms = [self._scope, f'timestamp>="{lower}Z"', *([f'timestamp<"{upper}Z"'] if upper else [])]
        return {
            "resourceNames": [f"projects/{self._project}"],
            "filter": " AND ".join(terms),
            "orderBy": "timestamp asc",
            "pageSize": size,
        }

    def _answers(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The pages of one answer. They may be empty, with more to follow."""
        while True:
            try:
                answer = _asked(lambda: self._ask(body), self._clock)
            except api.BadRequest:
                # Tokens do not live for ever, and this machine may have slept: the next poll begins anew.
                if "pageToken" not in body:
                    raise
                self.is_behind = True
                return
            yield answer
            if "nextPageToken" not in answer:
                return
            body["pageToken"] = answer["nextPageToken"]


def _skip_all_but(tail: int | None, log: _Log) -> tuple[str, int] | None:
    """Make ``log`` begin with the entry that has the first of the last ``tail`` lines; its key, and how many of its
    lines are not wanted. One entry is read in any case, since it tells what time it is for the service."""
    counted, lines = 0, EntryReader()
    for entry in log.newest(max(tail or 1, 1)):
        if tail is None:
            return None
        counted += len(lines.lines(entry))
        log.start_with(entry)
        if counted >= tail:
            return _key(entry), counted - tail
    return None


def _asked(call: Callable[[], Answer], clock: Clock) -> Answer:
    """What ``call`` returns, asked again after errors that pass: later each time, not sooner than the service says."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except Exception as error:
            if not passes(cause_of(error)):
                raise
            clock.sleep(max(min(2.0**attempt, LONGEST_WAIT), retry_after(error)))
    return call()


def _change(job: Mapping[str, Any]) -> StateChange:
    """The state that ``job`` is in, and when it came to that."""
    state = state_of(job)
    since = {"running": "startTime", **dict.fromkeys(TERMINAL, "endTime")}.get(state, "updateTime")
    created = datetime.fromisoformat(job["createTime"])
    reached = datetime.fromisoformat(job.get(since, job["createTime"]))
    return StateChange(state, WORDS.get(state, state), max(0.0, (reached - created).total_seconds()))


def _is_long_over(job: Mapping[str, Any], clock: Clock) -> bool:
    if state_of(job) not in TERMINAL or "endTime" not in job:
        return False
    return datetime.fromtimestamp(clock.time(), UTC) - datetime.fromisoformat(job["endTime"]) > LONG_OVER


def _time(entry: Entry) -> str:
    stamp: str = entry["timestamp"]
    return stamp.removesuffix("Z")


def _key(entry: Entry) -> str:
    # A space sorts before the digits that a longer timestamp goes on with.
    return f"{_time(entry)} {entry['insertId']}"


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
