"""The logs of a job, followed through Google's own session against a loopback Cloud Logging, in time made for it."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count, pairwise
from typing import Any

import pytest
from google.api_core import exceptions as api

from sdtune.backends.vertex import logs
from sdtune.backends.vertex.google import Session
from sdtune.backends.vertex.logs import read_logs
from sdtune.jobs.backend import LogLine, StateChange
from tests.servers.logging_server import LoggingServer

START = 1_790_000_000.0
JOB = "1234567890123456789"
TERMINAL = ["SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED", "PARTIALLY_SUCCEEDED"]


class FakeClock:
    """Time that goes on only while someone sleeps; what was planned happens then. wrong: seconds the clock is fast."""

    def __init__(self, wrong: float = 0.0) -> None:
        self.now = START
        self.wrong = wrong
        self._plans: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()

    def plan(self, after: float, action: Callable[[], object]) -> None:
        """Do it so many seconds after the start."""
        heapq.heappush(self._plans, (START + after, next(self._numbers), action))

    def monotonic(self) -> float:
        return self.now - START + 77.0

    def time(self) -> float:
        return self.now + self.wrong

    def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while self._plans and self._plans[0][0] <= until:
            self.now, _, action = heapq.heappop(self._plans)
            action()
        self.now = until


class Follower:
    """A job whose states are planned, its logs, and a reader of both. moments: when each item was yielded."""

    def __init__(self, server: LoggingServer, clock: FakeClock) -> None:
        self.server, self.clock = server, clock
        self.job: dict[str, Any] = {"state": "JOB_STATE_QUEUED", "createTime": _text(START)}
        self.asked = 0
        self.moments: list[float] = []
        self._session = Session()

    def enter(self, after: float, state: str, **more: Any) -> None:
        """Plan that the job comes into ``state``, or let it be there if that is at the start."""

        def change() -> None:
            key = {"RUNNING": "startTime", **dict.fromkeys(TERMINAL, "endTime")}.get(state, "updateTime")
            self.job = {**self.job, "state": f"JOB_STATE_{state}", key: _text(self.clock.now), **more}

        if after:
            self.clock.plan(after, change)
        else:
            change()

    def state(self) -> dict[str, Any]:
        self.asked += 1
        return self.job

    def read(self, **options: Any) -> Iterator[LogLine | StateChange]:
        def ask(body: dict[str, Any]) -> dict[str, Any]:
            return self._session.call("logging", "POST", "v2/entries:list", body, retry=None)

        for item in read_logs(ask, self.state, "test-project", JOB, clock=self.clock, **options):
            self.moments.append(self.clock.now - START)
            yield item

    def write(self, after: float, text: str, **more: Any) -> None:
        self.clock.plan(after, lambda: self.server.write(JOB, text, **more))

    def texts(self, **options: Any) -> list[str]:
        return [item.text for item in self.read(**options) if isinstance(item, LogLine)]


def _text(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def follower(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Follower]:
    with LoggingServer(clock=lambda: clock.now) as server:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING", server.address)
        yield Follower(server, clock)


def test_states_and_lines_come_as_they_happen_and_the_end_is_told_last(follower: Follower) -> None:
    follower.enter(60, "PENDING")
    follower.enter(420, "RUNNING")
    follower.write(430, "step 1")
    follower.write(440, "step 2")
    follower.enter(450, "SUCCEEDED")
    items = list(follower.read())
    assert [item.state if isinstance(item, StateChange) else item.text for item in items] == [
        "queued", "pending", "running", "step 1", "step 2", "succeeded",
    ]  # fmt: skip
    changes = [item for item in items if isinstance(item, StateChange)]
    assert [change.seconds for change in changes] == [0, 60, 420, 450]
    assert changes[0].text == "queued: waiting for quota"
    assert "5 to 10 minutes" in changes[1].text
    assert items[3] == LogLine("step 1", "info", datetime.fromtimestamp(START + 430, UTC), "workerpool0-0")


@pytest.mark.parametrize("state", TERMINAL)
def test_it_ends_on_every_terminal_state_after_the_drain(follower: Follower, state: str) -> None:
    follower.enter(0, "RUNNING")
    follower.enter(20, state)
    follower.write(19, "written last, seen late", visible_after=12)
    *before, line, change = list(follower.read())
    assert isinstance(line, LogLine)
    assert line.text == "written last, seen late"
    assert isinstance(change, StateChange)
    assert change.state == state.replace("_", " ").lower()
    assert change.seconds == 20
    assert all(isinstance(item, StateChange) for item in before)
    assert 20 + logs.DRAIN <= follower.moments[-1] <= 45


@pytest.mark.parametrize("state", ["QUEUED", "PENDING", "RUNNING", "CANCELLING", "PAUSED", "UPDATING"])
def test_it_does_not_end_on_any_other_state(follower: Follower, state: str) -> None:
    follower.enter(5, state)
    follower.enter(4000, "FAILED")
    follower.write(3999, "late, but there")
    assert follower.texts() == ["late, but there"]


def test_lines_that_come_while_draining_are_waited_for(follower: Follower) -> None:
    follower.enter(10, "FAILED")
    for second in range(30):
        follower.write(second, f"line {second}")
    assert follower.texts() == [f"line {second}" for second in range(30)]


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_the_first_line_is_seen_within_three_seconds(follower: Follower, state: str) -> None:
    follower.enter(1, state)
    follower.enter(1000, "SUCCEEDED")
    follower.write(500.5, "hello")
    follower.write(501.2, "and on")
    items = list(follower.read())
    seen = {item.text: moment for item, moment in zip(items, follower.moments, strict=True)}
    assert 500.5 <= seen["hello"] <= 503.5
    assert seen["and on"] <= 504.2


def test_silence_is_asked_less_often_and_the_state_at_every_poll(follower: Follower) -> None:
    follower.enter(1, "RUNNING")
    follower.write(2, "the only line")
    follower.enter(3602, "SUCCEEDED")
    assert follower.texts() == ["the only line"]
    polls = len(follower.server.requests)
    assert 3600 / 15 <= polls <= 60 / 2 + 240 / 5 + 3300 / 15 + 10
    assert follower.asked >= polls - 1


def test_late_lines_are_shown_soon_after_they_are_there(follower: Follower) -> None:
    draw = random.Random(1)
    follower.server.quota = None
    follower.enter(0, "RUNNING")
    there = {}
    for number in range(900):
        late = draw.uniform(6, 59) if draw.random() < 0.05 else 0.0
        follower.write(number / 3, str(number), visible_after=late)
        there[str(number)] = number / 3 + late
    follower.enter(360, "SUCCEEDED")
    items = list(follower.read())
    shown = {item.text: moment for item, moment in zip(items, follower.moments, strict=True) if item.text in there}
    assert len(items) == len(there) + 2
    assert shown.keys() == there.keys()
    assert all(there[text] <= moment <= there[text] + 3.5 for text, moment in shown.items())


@pytest.mark.parametrize("seed", range(4))
def test_no_line_is_lost_or_repeated(clock: FakeClock, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whatever the rate: late, twice in the answers, timestamps out of order and in the future, faults, a quota."""
    draw = random.Random(seed)
    chances: dict[str, Any] = {"late": 0.05, "duplicates": 0.05, "shuffle": 3.0, "empty": 0.1, "seed": seed}
    with LoggingServer(clock=lambda: clock.now, quota=draw.choice([60, None]), **chances) as server:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING", server.address)
        follower = Follower(server, clock)
        follower.enter(0, "RUNNING")
        wanted, moment = [], 1.0
        while len(wanted) < 6000:
            # Bursts, trickles and silence.
            moment += draw.choice([1.0, 5.0, 100.0])
            for _ in range(draw.choice([1, 10, 500, 2500])):
                moment += draw.choice([0.0, 0.0001, 0.001])
                ahead = draw.uniform(0, 300) if draw.random() < 0.001 else None
                more = {"timestamp": START + moment + ahead} if ahead else {}
                follower.write(moment, str(len(wanted)), **more)
                wanted.append(str(len(wanted)))
            fault = draw.choice([
                lambda: server.fail(503, draw.randint(1, 3)), lambda: server.fail(429, 1, retry_after=20),
                lambda: server.cut(2), lambda: server.cut(1, after=1000), lambda: server.fail(500),
            ])  # fmt: skip
            clock.plan(moment - 0.5, fault)
        follower.enter(moment + 1, "SUCCEEDED")
        texts = follower.texts()
    assert sorted(texts, key=int) == wanted


def test_a_hundred_thousand_lines_each_once_and_in_order(follower: Follower) -> None:
    draw = random.Random(7)
    follower.server.quota = None
    follower.enter(0, "RUNNING")
    late = {number for number in range(100_000) if draw.random() < 0.05}

    def burst(first: int) -> None:
        for number in range(first, first + 100):
            wait = draw.uniform(6, 12) if number in late else 0.0
            follower.server.write(JOB, str(number), visible_after=wait, duplicate=draw.random() < 0.02)

    for first in range(0, 100_000, 100):
        follower.clock.plan(1 + first / 1000, lambda first=first: burst(first))
    follower.enter(102, "SUCCEEDED")
    shown = [int(text) for text in follower.texts()]
    assert len(shown) == 100_000
    assert set(shown) == set(range(100_000))
    on_time = [number for number in shown if number not in late]
    assert all(before < after for before, after in pairwise(on_time))
    pages = len(follower.server.requests)
    assert pages < 450, "lines are read twice, and a page or so at every poll"


def test_what_is_remembered_is_bounded(follower: Follower, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[logs._Log] = []

    class Watched(logs._Log):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(logs, "_Log", Watched)
    follower.server.quota = None
    follower.enter(0, "RUNNING")
    for second in range(600):
        for number in range(20):
            follower.write(second + number / 20, f"{second}.{number}")
    follower.enter(601, "SUCCEEDED")
    most = 0
    for _ in follower.read():
        most = max(most, sum(len(stretch.seen) for stretch in made[0]._stretches))
    assert 60 * 20 <= most <= 100 * 20


def test_attached_to_a_long_log_it_reads_it_once(follower: Follower) -> None:
    for number in range(30_000):
        follower.clock.now = START + number / 10
        follower.server.write(JOB, str(number))
    follower.enter(0, "RUNNING")
    follower.enter(3010, "SUCCEEDED")
    assert follower.texts() == [str(number) for number in range(30_000)]
    probe, polls = 1, 11
    assert len(follower.server.requests) <= 30 + probe + polls + 2


def test_a_job_that_is_long_over_is_not_waited_for(follower: Follower) -> None:
    follower.server.write(JOB, "all there was")
    follower.enter(0, "FAILED")
    follower.clock.sleep(7200)
    items = list(follower.read())
    assert [item.text for item in items] == ["all there was", "failed"]
    assert follower.clock.now == START + 7200


def test_a_line_dated_in_the_future_hides_none_that_come_after_it(follower: Follower) -> None:
    follower.server.quota = None
    follower.enter(0, "RUNNING")
    follower.write(10, "from the future", timestamp=START + 1000)
    for number in range(3000):
        follower.write(20 + number / 10, str(number))
    follower.enter(330, "SUCCEEDED")
    items = list(follower.read())
    shown = {item.text: moment for item, moment in zip(items, follower.moments, strict=True)}
    assert len(items) == 1 + 1 + 3000 + 1
    assert all(shown[str(number)] <= 20 + number / 10 + 2.5 for number in range(3000))


@pytest.mark.parametrize("wrong", [-600.0, 300.0, 86_400.0])
def test_the_clock_of_this_machine_does_not_matter(follower: Follower, wrong: float) -> None:
    follower.clock.wrong = wrong
    follower.enter(0, "RUNNING")
    for number in range(100):
        follower.write(number, str(number), visible_after=10 if number % 7 == 0 else 0)
    follower.enter(100, "SUCCEEDED")
    assert sorted(follower.texts(), key=int) == [str(number) for number in range(100)]


def test_a_laptop_that_slept_catches_up(follower: Follower) -> None:
    follower.server.quota = None
    follower.enter(0, "RUNNING")
    for number in range(6_000):
        follower.write(1 + number / 2, str(number))
    follower.enter(3002, "SUCCEEDED")
    shown = []
    for item in follower.read():
        shown.append(item.text)
        if item.text == "100":
            follower.clock.sleep(2700)
    assert shown[1:-1] == [str(number) for number in range(6_000)]


def test_a_page_token_that_has_expired_costs_no_line(follower: Follower) -> None:
    for number in range(3500):
        follower.server.write(JOB, str(number))
    follower.enter(0, "RUNNING")
    follower.enter(10, "SUCCEEDED")
    shown = []
    for item in follower.read():
        shown.append(item.text)
        if item.text == "1500":
            follower.server.fail(400)
    assert shown[1:-1] == [str(number) for number in range(3500)]
    assert len(follower.server.requests) < 20


def test_the_quota_is_kept_to_and_retry_after_honoured(follower: Follower) -> None:
    follower.enter(0, "RUNNING")
    follower.clock.plan(5, lambda: follower.server.fail(429, retry_after=37))
    follower.write(6, "after the quota")
    follower.enter(60, "SUCCEEDED")
    items = list(follower.read())
    shown = dict(zip([item.text for item in items], follower.moments, strict=True))
    assert 37 + 5 <= shown["after the quota"] <= 37 + 5 + 3


def test_lines_beyond_the_quota_come_later_but_come(follower: Follower) -> None:
    follower.server.quota = 10
    for number in range(25_000):
        follower.server.write(JOB, str(number))
    follower.enter(0, "RUNNING")
    follower.enter(5, "SUCCEEDED")
    assert follower.texts() == [str(number) for number in range(25_000)]
    assert follower.clock.now - START > 60


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_errors_that_pass_are_borne(follower: Follower, status: int) -> None:
    follower.enter(0, "RUNNING")
    follower.clock.plan(3, lambda: follower.server.fail(status, times=10))
    follower.write(4, "there")
    follower.enter(10, "SUCCEEDED")
    assert follower.texts() == ["there"]


def test_cut_connections_are_borne(follower: Follower) -> None:
    follower.server.write(JOB, "there")
    follower.server.cut(times=3)
    follower.server.cut(times=3, after=20)
    follower.enter(0, "RUNNING")
    follower.enter(10, "SUCCEEDED")
    assert follower.texts() == ["there"]


def test_errors_of_the_job_server_are_borne_too(follower: Follower) -> None:
    follower.server.write(JOB, "there")
    follower.enter(0, "RUNNING")
    follower.enter(10, "SUCCEEDED")
    down = api.ServiceUnavailable("no")
    told, failures = follower.state, iter([down, api.RetryError("no", down)])

    def state() -> dict[str, Any]:
        if failure := next(failures, None):
            raise failure
        return told()

    follower.state = state  # type: ignore[method-assign]
    assert follower.texts() == ["there"]


def test_what_is_refused_is_raised_at_once(follower: Follower) -> None:
    follower.server.fail(403)
    with pytest.raises(api.Forbidden):
        list(follower.read())
    assert follower.clock.now == START


def test_what_does_not_pass_is_raised_after_a_quarter_of_an_hour(follower: Follower) -> None:
    follower.server.fail(503, times=1_000_000)
    with pytest.raises(api.ServiceUnavailable):
        list(follower.read())
    assert 10 * 60 <= follower.clock.now - START <= 20 * 60


def test_what_is_there_is_read_without_waiting(follower: Follower) -> None:
    for number in range(2500):
        follower.server.write(JOB, str(number))
    follower.server.write("another job", "not of this one")
    follower.clock.now += 1
    items = list(follower.read(follow=False))
    assert [item.text for item in items] == [str(number) for number in range(2500)]
    assert follower.clock.now == START + 1


@pytest.mark.parametrize("tail", [0, 1, 7, 1000, 1700, 5000])
def test_the_last_lines(follower: Follower, tail: int) -> None:
    """Also where several entries have one timestamp, and an entry several lines."""
    written = []
    for number in range(600):
        moment, text = START + number // 4, "\n".join(f"{number}.{part}" for part in "abc")
        written.append((moment, follower.server.write(JOB, text, timestamp=moment), text))
    lines = "\n".join(text for _, _, text in sorted(written)).split("\n")
    follower.clock.now += 200
    assert follower.texts(follow=False, tail=tail) == lines[max(0, len(lines) - tail) :]


def test_the_last_lines_and_what_follows(follower: Follower) -> None:
    for number in range(50):
        follower.server.write(JOB, str(number))
    follower.enter(0, "RUNNING")
    follower.write(5, "50")
    follower.enter(10, "SUCCEEDED")
    assert follower.texts(tail=3) == ["47", "48", "49", "50"]


def test_lines_since_a_moment(follower: Follower) -> None:
    for number in range(100):
        follower.server.write(JOB, str(number), timestamp=START + number)
    follower.clock.now += 100
    since = datetime.fromtimestamp(START + 90, UTC)
    assert follower.texts(follow=False, since=since) == [str(number) for number in range(90, 100)]
    assert follower.texts(follow=False, since=since, tail=20) == [str(number) for number in range(90, 100)]


def test_lines_of_one_replica(follower: Follower) -> None:
    for number in range(10):
        follower.server.write(JOB, str(number), replica=f"workerpool1-{number % 3}")
    follower.server.write(JOB, "Job is running", replica="service")
    assert follower.texts(follow=False, replica="workerpool1-1") == ["1", "4", "7"]
    assert len(follower.texts(follow=False)) == 11


def test_a_job_older_than_a_day_keeps_its_first_lines(follower: Follower) -> None:
    follower.server.write(JOB, "the first")
    follower.clock.now += 3 * 86_400
    assert follower.texts(follow=False) == ["the first"]
