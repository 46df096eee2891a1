"""The logs of a job followed under faults: every line once and in order, over a machine that sleeps too."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.backends.vertex.test_jobs import backend, job
from tests.backends.vertex.test_logs import JOB, FakeClock, Follower
from tests.servers.cloud import Cloud, loopback_cloud
from tests.servers.logging_server import Fault, LoggingServer
from tests.servers.tokens import TokenServer

SDTUNE = str(Path(sys.executable).with_name("sdtune"))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def follower(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Follower]:
    """Of a project whose tokens expire."""
    with LoggingServer(clock=lambda: clock.now, quota=None) as server, TokenServer() as tokens:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING", server.address)
        credentials = tokens.credentials()
        monkeypatch.setattr("sdtune.backends.vertex.google.credentials_for", lambda service: credentials)
        server.valid, server.on_expired = tokens.takes, tokens.expire
        yield Follower(server, clock)


def at_random(server: LoggingServer, rate: float, seed: int) -> Counter[str]:
    """Let a share of the requests fare badly, in every way there is. What befell them."""
    draw, befell = random.Random(seed), Counter[str]()

    def chance() -> Fault | None:
        if draw.random() >= rate:
            return None
        name = draw.choice(["429", "500", "503", "cut", "torn", "garbled", "slow", "expired"])
        befell[name] += 1
        match name:
            case "cut":
                return Fault(1)
            case "torn":
                return Fault(1, after=draw.randint(1, 3000))
            case "garbled" | "slow" | "expired":
                return Fault(1, kind=name, seconds=0.01)
            case _:
                return Fault(1, int(name), retry_after=draw.choice([None, 2]))

    server.chance = chance
    return befell


@pytest.mark.parametrize(("count", "late"), [(100_000, 0.0), (20_000, 0.05)], ids=["on time", "late"])
def test_each_line_once_and_in_order_under_faults(follower: Follower, count: int, late: float) -> None:
    draw = random.Random(7)
    befell = at_random(follower.server, 0.4, seed=3)
    follower.enter(0, "RUNNING")
    held = {number for number in range(count) if draw.random() < late}

    def burst(first: int) -> None:
        for number in range(first, first + 100):
            wait = draw.uniform(6, 12) if number in held else 0.0
            follower.server.write(JOB, str(number), visible_after=wait, duplicate=draw.random() < 0.02)

    for first in range(0, count, 100):
        follower.clock.plan(1 + first / 500, lambda first=first: burst(first))
    follower.enter(2 + count / 500, "SUCCEEDED")
    shown = [int(text) for text in follower.texts()]
    assert len(shown) == count
    assert set(shown) == set(range(count))
    # Who comes too late is shown when it comes; all others as they were written.
    assert all(before < after for before, after in pairwise(number for number in shown if number not in held))
    assert len(befell) >= 6
    assert befell.total() > 15


@pytest.mark.parametrize("ends", ["while asleep", "later"])
@pytest.mark.parametrize("kind", ["stopped", "suspended"])
def test_an_hour_asleep_is_caught_up(follower: Follower, clock: FakeClock, kind: str, ends: str) -> None:
    """Of a suspended machine the monotonic clock has stood still; the line is dead, and the token has expired."""
    follower.enter(0, "RUNNING")
    for number in range(9_000):
        wait = 8.0 if number % 50 == 0 else 0.0
        follower.write(1 + number / 2, str(number), visible_after=wait)
    follower.enter(4502 if ends == "later" else 2000, "SUCCEEDED")
    count = 9_000 if ends == "later" else 3_998
    told = clock.monotonic
    shown = []
    for item in follower.read():
        shown.append(item.text)
        if item.text == "201":
            clock.sleep(3600)
            if kind == "suspended":
                clock.monotonic = lambda: told() - 3600  # type: ignore[method-assign]
            # In the middle of a page, too: its token is no longer good.
            follower.server.cut(times=2)
            follower.server._faults.append(Fault(1, kind="expired"))
    lines = [int(text) for text in shown if text.isdecimal()]
    assert len(lines) == len(set(lines))
    # What a job says after its end is not awaited for ever.
    assert set(range(count)) <= set(lines)
    on_time = [number for number in lines if number % 50]
    assert on_time == sorted(on_time)
    assert shown[-1] == "succeeded"


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud[Any]]:
    with loopback_cloud(delays={}, logging=LoggingServer(project="my-project", quota=None)) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sdtune.backends.vertex.specs.COMMAND", ("python", "-c"))
        found.storage.buckets["bkt"] = {}
        yield found


def test_a_process_that_was_stopped_catches_up_and_ctrl_c_leaves_the_job(cloud: Cloud[Any], tmp_path: Path) -> None:
    """What a closed lid does: the process stands still, its lines die, and the job goes on."""
    submitted = backend().submit(job("long", seconds=600))
    cloud.vertex.job(submitted.job_id).wait("JOB_STATE_RUNNING")
    command = [SDTUNE, "jobs", "logs", "-f", submitted.number, "--project", "my-project"]
    shown: list[str] = []
    come = threading.Condition()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip

        def read() -> None:
            for line in process.stdout or ():
                with come:
                    shown.append(line.strip())
                    come.notify_all()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()

        def write(numbers: range) -> None:
            for number in numbers:
                cloud.logging.write(submitted.number, f"line {number}")

        def wait_for(line: str) -> None:
            with come:
                assert come.wait_for(lambda: line in shown, 120), shown[-5:]

        write(range(200))
        wait_for("line 199")
        process.send_signal(signal.SIGSTOP)
        write(range(200, 5200))
        cloud.logging.hang_up()
        process.send_signal(signal.SIGCONT)
        write(range(5200, 5300))
        wait_for("line 5299")
        # rich forgets a line a moment after it was written: Ctrl-C in that moment has it written once more.
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        reader.join(60)
    lines = [line for line in shown if re.fullmatch(r"line \d+", line)]
    assert lines == [f"line {number}" for number in range(5300)]
    rest = "\n".join(shown[shown.index("line 5299") :])
    assert f"Job {submitted.number} goes on" in rest
    assert f"sdtune jobs logs -f {submitted.number} --region us-central1" in rest
    assert f"sdtune jobs cancel {submitted.number} --region us-central1" in rest
    assert cloud.vertex.job(submitted.job_id).state == "JOB_STATE_RUNNING"
