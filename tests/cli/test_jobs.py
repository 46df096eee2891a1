"""``sdtune jobs``: what was sent is looked at again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sdtune.backends.registry import open_backend
from sdtune.jobs.machines import choose_machine
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import JobSpec
from tests.conftest import Command
from tests.servers.cloud import Cloud, loopback_cloud

SCRIPT = "import sys; print('one'); print('two'); sys.stderr.write('Traceback: three\\n'); sys.exit({})"


@pytest.fixture(scope="module")
def server() -> Iterator[Cloud[Any]]:
    with loopback_cloud(delays={}) as cloud:
        cloud.storage.buckets["bucket"] = {}
        yield cloud


@pytest.fixture(autouse=True)
def cloud(server: Cloud[Any], monkeypatch: pytest.MonkeyPatch) -> Cloud[Any]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sdtune.backends.vertex.specs.COMMAND", ("python", "-c"))
    return server


@pytest.fixture
def submit(cloud: Cloud[Any]) -> Callable[..., str]:
    """Runs a job to its end; its number."""

    def make(name: str, exit_code: int = 0, region: str = "us-central1") -> str:
        backend = open_backend("vertex", Placement(project="my-project", region=(region,)))
        args = (SCRIPT.format(exit_code), f"--output=gs://bucket/{name}")
        job = JobSpec(name, "train", "dreambooth-lora", "diffusers", f"gs://bucket/{name}", args)
        machine = choose_machine("t4", 2, None)
        submitted = backend.submit(JobSpec(**{**job.__dict__, "machine": machine}))
        cloud.vertex.job(submitted.number).wait(timeout=30)
        return submitted.number

    return make


def test_there_may_be_none_yet(sdtune: Command) -> None:
    assert sdtune("jobs", "list", "--region", "europe-west9") == (0, "There are no jobs of sdtune here yet.\n", "")
    code, _, err = sdtune("jobs", "show", "--region", "europe-west9")
    assert code == 4
    assert "there are no jobs of sdtune yet; sdtune train" in err


def test_a_list_names_what_a_user_looks_for(sdtune: Command, submit: Callable[..., str]) -> None:
    region = ["--region", "us-east1"]
    good, bad = submit("good", 0, "us-east1"), submit("bad", 5, "us-east1")
    _, out, _ = sdtune("jobs", "list", *region)
    rows = out.splitlines()[1:]
    assert [row.split()[:4] for row in rows] == [
        [bad, "bad", "dreambooth-lora", "failed"],
        [good, "good", "dreambooth-lora", "succeeded"],
    ]
    assert all("2 x t4" in row and "us-east1" in row and "gs://bucket/" in row for row in rows)
    assert [row.split()[1] for row in sdtune("jobs", "list", *region, "--limit", "1")[1].splitlines()[1:]] == ["bad"]
    only = sdtune("jobs", "list", *region, "--state", "succeeded", "--method", "dreambooth-lora", "--json")[1]
    assert [json.loads(line)["number"] for line in only.splitlines()] == [good]


def test_one_job_in_full_by_number_or_name_or_as_the_newest(sdtune: Command, submit: Callable[..., str]) -> None:
    number = submit("shown")
    for words in ([number], ["shown"], []):
        code, out, _ = sdtune("jobs", "show", *words)
        assert code == 0
        assert f"customJobs/{number}" in out
        assert "n1-standard-16, 2 x t4" in out
    details = json.loads(sdtune("jobs", "show", number, "--json")[1])["details"]
    assert details["jobSpec"]["workerPoolSpecs"][0]["machineSpec"]["machineType"] == "n1-standard-16"
    code, out, _ = sdtune("jobs", "open", number, "--json")
    assert (code, json.loads(out)["url"].startswith("https://console.cloud.google.com/")) == (0, True)


def test_logs_from_the_first_line_and_the_error_in_the_end(sdtune: Command, submit: Callable[..., str]) -> None:
    number = submit("told", 5)
    code, out, err = sdtune("jobs", "logs", number)
    assert code == 5
    # What follows is the service's own word, which repeats the last lines.
    lines = out.partition("The replica workerpool0-0 exited")[0].splitlines()
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
    assert "the training process ended with exit code 5" in err
    code, out, _ = sdtune("jobs", "logs", number, "--tail", "1", "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert [line["event"] for line in told] == ["log", "error"]
    code, out, _ = sdtune("jobs", "logs", number, "--replica", "workerpool1-0")
    assert "one" not in out.splitlines()
    assert sdtune("jobs", "logs", submit("fine"))[0] == 0


def test_a_job_that_has_ended_cannot_be_cancelled(sdtune: Command, submit: Callable[..., str]) -> None:
    code, _, err = sdtune("jobs", "cancel", submit("over"))
    assert code == 4
    assert "has ended already (succeeded); there is nothing to cancel" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "--state", "lost"], "state: found 'lost', wanted queued or pending"),
        (["list", "--method", "dreambooth-lra"], "did you mean dreambooth-lora?"),
        (["logs", "1", "--since", "soon"], "since: found 'soon', wanted a duration such as 2h, or a time"),
        (["list", "--region", "us-central1-a"], "is a zone; wanted its region, us-central1"),
    ],
)
def test_wrong_words_are_explained_before_anyone_is_asked(
    sdtune: Command, cloud: Cloud[Any], words: list[str], said: str
) -> None:
    cloud.vertex.requests.clear()
    code, _, err = sdtune("jobs", *words)
    assert code == 2
    assert said in err
    assert not cloud.vertex.requests
