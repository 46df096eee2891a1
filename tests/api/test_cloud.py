"""The functions against the servers of the tests: jobs submitted, left, found again; copies; searches; builds."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sdtune
from sdtune.api.going import InterruptedWait
from sdtune.errors import JobError, RecipeError
from tests.api.test_train import until
from tests.servers.cloud import Cloud, loopback_cloud

NETWORK = "projects/123456789012/global/networks/vpc"
SHARE: dict[str, Any] = {"network": NETWORK, "nfs": ["10.0.0.2:/vol1=/mnt/nfs/models"]}


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cloud[Any]]:
    with loopback_cloud() as found:
        found.vertex.projects["my-project"] = "123456789012"
        found.vertex.nfs("10.0.0.2", "/vol1")
        found.storage.buckets["my-bucket"] = {}
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        yield found


def test_a_job_from_the_call_to_the_share(
    cloud: Cloud[Any], pictures: Callable[..., Path], settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    job = settings | {"dataset": pictures(), "output": "gs://my-bucket/cat", "max_train_steps": 2, "gpu": "l4"}
    planned = sdtune.train("dreambooth-lora", **job, dry_run=True)
    assert planned.state == "planned"
    assert "machineType: g2-standard" in planned.about.rendered
    assert not cloud.vertex.requests

    run = sdtune.train("dreambooth-lora", **job)
    assert run.state == "succeeded"
    assert run.lora_path == "gs://my-bucket/cat/pytorch_lora_weights.safetensors"
    assert run.samples.steps == [0, 2]
    assert run.samples.latest[0].image.size == (128, 128)
    assert run.job is not None
    assert f"Submitted job {run.job.number}" in capsys.readouterr().out

    (found,) = sdtune.jobs.list()
    assert (found.number, found.state, found.output) == (run.job.number, "succeeded", "gs://my-bucket/cat")
    assert run.job.number in sdtune.jobs.list(state="succeeded", method="dreambooth-lora")._repr_html_()
    assert not sdtune.jobs.list(state="failed")
    shown = sdtune.jobs.show()
    assert shown.number == run.job.number
    assert shown.samples.steps == [0, 2]
    assert shown.describe()["displayName"] == "cat"
    assert sdtune.jobs.open(run.job.number).startswith("https://console.cloud.google.com/")
    again = shown.follow(show=False)
    assert again.result().files == run.files
    assert len(sdtune.jobs.logs(tail=1)) <= 1
    with pytest.raises(JobError):
        sdtune.jobs.cancel(run.job.number)
    with pytest.raises(RecipeError, match="state: found 'gone'"):
        sdtune.jobs.list(state="gone")

    copied = sdtune.sync_nfs("gs://my-bucket/cat", **SHARE)
    assert {outcome for _, outcome in copied.result().copies} == {"copied"}
    assert list(cloud.vertex.nfs("10.0.0.2", "/vol1").rglob("*.safetensors"))
    with pytest.raises(RecipeError, match="gpu: is for training alone"):
        sdtune.sync_nfs("gs://my-bucket/cat", gpu="l4", **SHARE)


def test_a_job_goes_on_when_its_cell_is_interrupted(
    cloud: Cloud[Any], pictures: Callable[..., Path], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest's own children may have been started with it ignored.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    seen: list[sdtune.api.Run] = []
    start = sdtune.api.Run.start
    monkeypatch.setattr(sdtune.api.Run, "start", lambda run, wait: seen.append(run) or start(run, wait))

    def interrupt() -> None:
        until(lambda: seen and seen[0].losses)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    endless = settings | {"max_train_steps": 100_000, "num_samples": 0}
    try:
        with pytest.raises(InterruptedWait, match=r"goes on without this cell.*sdtune\.jobs\.show\('\d+'"):
            sdtune.train("dreambooth-lora", dataset=pictures(), output="gs://my-bucket/x", show=False, **endless)
    finally:
        signal.signal(signal.SIGINT, earlier)
    (run,) = seen
    assert not run.done
    job = sdtune.jobs.show(run.job.number if run.job else "")
    assert job.state == "running"
    job.cancel()
    with pytest.raises(JobError, match="cancelled"):
        run.result(timeout=200)
    assert job.refreshed().state == "cancelled"


def test_a_build_is_shown_and_its_image_named(cloud: Cloud[Any], capsys: pytest.CaptureFixture[str]) -> None:
    cloud.storage.buckets["my-project-sdtune"] = {}
    planned = sdtune.build("diffusers", dry_run=True, machine_type="E2_HIGHCPU_32")
    assert planned.state == "planned"
    assert "E2_HIGHCPU_32" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="there is no image 'x'"):
        sdtune.build("x")
    with pytest.raises(RecipeError, match="machine_tpye: build has no such setting; did you mean machine_type"):
        sdtune.build("diffusers", machine_tpye="x")  # type: ignore[call-arg]
    built = sdtune.build("diffusers")
    assert built.result()["sdtune-diffusers"].startswith("us-central1-docker.pkg.dev/my-project/sdtune/sdtune-diffu")
    assert "sdtune-diffusers" in {image.name for image in sdtune.images()}
