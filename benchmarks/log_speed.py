"""How fast the logs of a job are followed, which a loopback Cloud Logging in another process writes at a fixed rate.

The follower has one core. One line in twenty is seen late, by 6 to 12 s. The quota of the service, 60 questions a
minute, is switched off: with it, a thousand lines a second is the most that anyone can read.

    python benchmarks/log_speed.py [LINES_PER_SECOND [SECONDS]]
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import statistics
import sys
import time
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from sdtune.backends.vertex.google import Session
from sdtune.backends.vertex.logs import read_logs
from sdtune.jobs.backend import LogLine
from tests.servers.logging_server import LoggingServer

JOB = "1234567890"
REST = " of 100000: loss 0.1234, learning rate 1.0e-04, 5.31 images a second, 02:41 left, 14.2 GB of memory"


def use_core(number: int) -> None:
    """Stay on one core, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {number % (os.cpu_count() or 1)})


def write_lines(pipe: Connection, rate: int, seconds: int) -> None:
    """The other process: a hundred lines at a time; each says when it was written and whether it is late."""
    use_core(1)
    draw = random.Random(0)
    with LoggingServer(quota=None) as server:
        pipe.send(server.address)
        pipe.recv()
        started = time.time()
        for first in range(0, rate * seconds, 100):
            time.sleep(max(0.0, started + first / rate - time.time()))
            for number in range(first, first + 100):
                late = draw.uniform(6, 12) if draw.random() < 0.05 else 0.0
                text = f"{number} {time.time():.3f} {'late' if late else 'soon'} step {number}{REST}"
                server.write(JOB, text, visible_after=late)
        pipe.send(time.time() - started)
        pipe.recv()
        pipe.send((len(server.requests), time.process_time()))


def main() -> None:
    """Follow, then read all of it once more, and print what both took."""
    rate, seconds = ([int(word) for word in sys.argv[1:]] + [10_000, 30][len(sys.argv) - 1 :])[:2]
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=write_lines, args=(theirs, rate, seconds))
    process.start()
    use_core(0)
    os.environ["CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING"] = pipe.recv()
    session = Session()
    created = datetime.now(UTC).isoformat()
    job = {"state": "JOB_STATE_RUNNING", "createTime": created, "startTime": created}
    took = 0.0

    def state() -> dict[str, Any]:
        nonlocal took
        if pipe.poll():
            took = pipe.recv()
            job.update(state="JOB_STATE_SUCCEEDED", endTime=datetime.now(UTC).isoformat())
        return job

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        return session.call("logging", "POST", "v2/entries:list", body, retry=None)

    pipe.send("go")
    lags: dict[str, list[float]] = {"soon": [], "late": []}
    numbers, in_order, newest = [], True, -1
    before = time.process_time()
    for item in read_logs(ask, state, "project", JOB):
        if isinstance(item, LogLine):
            number, written, kind, _ = item.text.split(" ", 3)
            lags[kind].append(time.time() - float(written))
            numbers.append(int(number))
            if kind == "soon":
                in_order, newest = in_order and newest < int(number), int(number)
    cpu = time.process_time() - before
    lost, repeated = rate * seconds - len(set(numbers)), len(numbers) - len(set(numbers))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{rate} lines a second for {seconds} s (they took {took:.1f} s): {lost} lost, {repeated} repeated, "
          f"{'in order' if in_order else 'NOT in order'}")  # fmt: skip
    for kind, values in lags.items():
        print(
            f"  seconds until a line is shown, {kind}: median {statistics.median(values):.1f}, most {max(values):.1f}"
        )
    print(f"  follower: {cpu:.1f} s of processor, {cpu / took:.0%} of a core, {memory:.0f} MB at most")

    started, before = time.perf_counter(), time.process_time()
    read = sum(isinstance(item, LogLine) for item in read_logs(ask, state, "project", JOB, follow=False))
    took, cpu = time.perf_counter() - started, time.process_time() - before
    print(f"all of it at once: {read} lines in {took:.1f} s, {read / took:.0f} a second, {cpu:.1f} s of processor")
    pipe.send("end")
    requests, cpu = pipe.recv()
    print(f"server: {requests} pages, {cpu:.1f} s of processor")
    process.join()


if __name__ == "__main__":
    main()
