"""What users see and what is sent, kept word for word; renewed by `make snapshots`, reviewed in the diff."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode
from typer.testing import CliRunner

from sdtune.backends.vertex.specs import custom_job
from sdtune.cli.app import app
from sdtune.commands.train import machine_of
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import plan_training
from sdtune.methods.catalog import METHODS
from tests.contracts.test_one_value import required


class TextFile(SingleFileSnapshotExtension):
    """One readable .txt file per snapshot."""

    _write_mode = WriteMode.TEXT
    file_extension = "txt"


@pytest.fixture
def snapshot(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    return snapshot.use_extension(TextFile)


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, [*words, "--help"], prog_name="sdtune")
        assert result.exit_code == 0
        return result.output

    return run


HELPS = (
    "", "init", "setup", "doctor", "machines", "build", "validate", "train", "hpo", "hpo status", "hpo apply",
    "jobs", "jobs list", "jobs show", "jobs logs", "jobs cancel", "jobs open", "sync-nfs", "convert",
    *(f"train {name}" for name in METHODS),
)  # fmt: skip


@pytest.mark.parametrize("words", HELPS)
def test_help(words: str, help_of: Callable[..., str], snapshot: SnapshotAssertion) -> None:
    assert help_of(*words.split()) == snapshot


@pytest.mark.parametrize("name", METHODS)
def test_arguments_of_the_container(name: str, snapshot: SnapshotAssertion) -> None:
    method = METHODS[name]
    args = plan_training(method.from_settings(required(method)), "/gcs/bucket/cat", "/gcs/bucket/out").args
    recipe = json.loads(args[-1].removeprefix("--recipe="))
    assert "\n".join([*args[:-1], "--recipe=" + json.dumps(recipe, indent=2)]) + "\n" == snapshot


JOBS: dict[str, dict[str, Any]] = {
    "smallest": {},
    "everything": {
        "gpu": "a100-80gb", "gpus": 2, "replicas": 3, "boot_disk_gb": 200, "strategy": "flex-start", "max_wait": "2h",
        "timeout": "3h", "restart_on_preemption": True, "reserved_ip_range": ["range-a"], "save_nfs": True,
        "network": "projects/123456/global/networks/default", "nfs": ["10.0.0.2:/vol1=/mnt/nfs/models"],
        "tensorboard": "projects/my-project/locations/us-central1/tensorboards/123", "web_access": True,
        "service_account": "trainer@my-project.iam.gserviceaccount.com", "labels": {"team": "art"},
        "kms_key": "projects/my-project/locations/us-central1/keyRings/r/cryptoKeys/k", "env": {"NCCL_DEBUG": "INFO"},
        "persistent_resource": "cluster", "hf_token_secret": "hf",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_what_vertex_ai_is_sent(name: str, snapshot: SnapshotAssertion) -> None:
    placement = Placement.from_settings({"project": "my-project", "image": "image", **JOBS[name]})
    method = METHODS["dreambooth-lora"].from_settings({"instance_prompt": "a photo of sks cat"})
    shares = [mount.place for mount in placement.mounts]
    job = plan_training(method, "gs://bucket/cat", "gs://bucket/out", machine_of(placement), shares)
    rendered = custom_job(replace(job, args=job.args[:-1], run_id="0123456789abcdef"), placement)
    assert yaml.safe_dump(rendered, sort_keys=False) == snapshot


def test_every_snapshot_is_somebodys(snapshot: SnapshotAssertion) -> None:
    folder = Path(__file__).parent / "__snapshots__" / "test_snapshots"
    assert len(list(folder.iterdir())) == len(HELPS) + len(METHODS) + len(JOBS)
