"""The loopback Cloud Logging: strict where the service is strict, and understood by the real gcloud."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.servers.logging_server import LoggingServer

SCOPE = 'resource.type="ml_job" AND resource.labels.job_id="1"'


@pytest.fixture
def server() -> Iterator[LoggingServer]:
    with LoggingServer() as server:
        yield server


def ask(server: LoggingServer, text: str = SCOPE, **more: Any) -> requests.Response:
    body = {"resourceNames": ["projects/test-project"], "filter": text, "pageSize": 1000, **more}
    return requests.post(f"{server.address}/v2/entries:list", json=body, timeout=10)


def messages(response: requests.Response) -> list[str]:
    return [entry["jsonPayload"]["message"] for entry in response.json().get("entries", [])]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "abcd"),
        (f'{SCOPE} AND timestamp>="2026-01-01T00:00:01Z"', "bc"),
        (f'{SCOPE} AND timestamp>"2026-01-01T00:00:01Z"', "c"),
        (f'{SCOPE} timestamp<="2026-01-01T01:00:01+01:00"', "ab"),
        (f'{SCOPE}\nAND timestamp<"2026-01-01T00:00:01.000000001Z"', "ab"),
        (f'{SCOPE} AND resource.labels.task_name="workerpool0-1" AND timestamp>="2026-01-01T00:00:00Z"', "c"),
        ('timestamp>="2026-01-01T00:00:02Z" AND resource.labels.job_id="2" OR resource.labels.job_id="1"', "cd"),
        (
            '(timestamp>="2026-01-01T00:00:02Z" AND resource.labels.job_id="2") OR timestamp="2026-01-01T00:00:00Z"',
            "ad",
        ),
        ('resource.type="gce_instance" AND timestamp>="2026-01-01T00:00:00Z"', ""),
    ],
)
def test_filters(text: str, found: str) -> None:
    start = 1_767_225_600
    with LoggingServer(clock=lambda: start + 60) as server:
        for second, (letter, replica, job) in enumerate(
            [("a", "workerpool0-0", "1"), ("b", "workerpool0-0", "1"), ("c", "workerpool0-1", "1"), ("d", "x", "2")]
        ):
            server.write(job, letter, replica=replica, timestamp=float(start + second))
        assert messages(ask(server, text)) == list(found)
        assert messages(ask(server, text, orderBy="timestamp desc")) == list(found)[::-1]


@pytest.mark.parametrize(
    "more",
    [
        {"pagesize": 10}, {"pageSize": 1001}, {"pageSize": 0}, {"orderBy": "insertId"}, {"resourceNames": []},
        {"resourceNames": ["my-project"]}, {"filter": "severity>=ERROR"}, {"filter": 'timestamp>="yesterday"'},
        {"filter": "resource.type="}, {"filter": "(timestamp>=1"}, {"filter": f"{SCOPE} AND"},
        {"filter": f"NOT {SCOPE}"}, {"pageToken": "made up"},
    ],
)  # fmt: skip
def test_what_the_service_refuses_is_refused(server: LoggingServer, more: dict[str, Any]) -> None:
    response = ask(server, **more)
    assert response.status_code == 400
    assert response.json()["error"]["status"] == "INVALID_ARGUMENT"


def test_pages_go_on_where_they_ended_and_for_the_same_question_alone(server: LoggingServer) -> None:
    for number in range(25):
        server.write("1", str(number))
    token, read = None, []
    while True:
        answer = ask(server, pageSize=10, **({"pageToken": token} if token else {}))
        read.append(messages(answer))
        if not (token := answer.json().get("nextPageToken")):
            break
        assert ask(server, f'{SCOPE} AND timestamp>="2026-01-01T00:00:00Z"', pageToken=token).status_code == 400
    assert read == [[str(number) for number in range(start, min(start + 10, 25))] for start in (0, 10, 20)]


def test_late_and_duplicate_entries() -> None:
    now = time.time()
    with LoggingServer(clock=lambda: now) as server:
        server.write("1", "late", visible_after=8)
        server.write("1", "twice", duplicate=True)
        assert messages(ask(server)) == ["twice", "twice"]
        now += 8
        assert messages(ask(server)) == ["late", "twice", "twice"]
        assert len({entry["insertId"] for entry in ask(server).json()["entries"]}) == 2


def test_the_last_day_alone_is_searched_unless_the_filter_names_a_time(server: LoggingServer) -> None:
    server.write("1", "old", timestamp=time.time() - 90_000)
    assert messages(ask(server)) == []
    assert messages(ask(server, f'{SCOPE} AND timestamp>="2020-01-01T00:00:00Z"')) == ["old"]


def test_the_quota_is_of_a_minute() -> None:
    now = time.time()
    with LoggingServer(quota=3, clock=lambda: now) as server:
        assert [ask(server).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = ask(server)
        assert refused.json()["error"]["status"] == "RESOURCE_EXHAUSTED"
        now += int(refused.headers["Retry-After"])
        assert ask(server).status_code == 200


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_the_real_gcloud_reads_from_it(server: LoggingServer, tmp_path: Path) -> None:
    server.write("1", "hello")
    server.write("2", "not of this job")
    environment = {
        "CLOUDSDK_CONFIG": str(tmp_path),
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CORE_PROJECT": "test-project",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING": f"{server.address}/",
    }
    command = ["gcloud", "logging", "read", SCOPE, "--format=value(jsonPayload.message)"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["hello", ""]
