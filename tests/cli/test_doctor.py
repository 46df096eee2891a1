"""``sdtune doctor`` as it is typed and seen."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from sdtune import __version__
from sdtune.cli import doctor_view
from sdtune.commands.doctor import examine
from sdtune.jobs.findings import Check, Finding
from tests.conftest import Command
from tests.servers.services import ServicesServer
from tests.servers.services_methods import Bucket

pytestmark = pytest.mark.usefixtures("alone")
L4 = "aiplatform.googleapis.com/custom_model_training_nvidia_l4_gpus"


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServicesServer]:
    """A project that has all that a job needs."""
    with ServicesServer() as server:
        server.buckets["my-bucket"] = Bucket()
        server.add_image("sdtune-diffusers", __version__)
        server.quotas = {L4: {"us-central1": 1}}
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_project_that_has_everything(google: ServicesServer, sdtune: Command) -> None:
    code, out, err = sdtune("doctor", "--bucket", "gs://my-bucket", "--gpu", "l4", "--gpus", "1")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "Vertex AI in us-central1, project my-project"
    assert [line[0] for line in lines[2:17] if line[0] != " "] == list("✓✓✓✓✓✓✓✓✓✓···✓")
    assert not err


def test_what_is_bad_is_told_with_its_command_and_ends_with_3(google: ServicesServer, sdtune: Command) -> None:
    google.services.discard("logging")
    google.repositories.clear()
    code, out, err = sdtune("doctor")
    assert code == 3
    lines = [line.strip() for line in out.splitlines()]
    assert "✗ APIs              1 of 5 is off: logging" in lines
    assert "gcloud services enable logging.googleapis.com --project=my-project" in lines
    assert any(line.startswith("gcloud artifacts repositories create sdtune ") for line in lines)
    assert err == "error: 2 of 14 checks failed; the commands above mend them.\n"


def test_what_no_command_mends(google: ServicesServer, sdtune: Command) -> None:
    code, out, err = sdtune("doctor", "--gpus", "2")
    assert code == 3
    assert "✗ GPU quota         l4: found 1 in us-central1 for all jobs together, wanted 2" in out
    assert "https://console.cloud.google.com/iam-admin/quotas?project=my-project" in out
    assert err == "error: 1 of 14 checks failed; what stands above mends it.\n"


def test_one_object_for_each_check(google: ServicesServer, sdtune: Command) -> None:
    google.billing = None
    code, out, _ = sdtune("doctor", "--json")
    assert code == 3
    *checks, error = [json.loads(line) for line in out.splitlines()]
    found = {check["name"]: check for check in checks}
    assert len(found) == len(checks) == 14
    assert {check["event"] for check in checks} == {"check"}
    assert (found["billing"]["grade"], found["project"]["grade"]) == ("bad", "good")
    assert "gcloud billing accounts list" in found["billing"]["commands"]
    assert (error["event"], error["exit_code"]) == ("error", 3)


def test_settings_of_the_project_are_those_of_train(google: ServicesServer, sdtune: Command, tmp_path: Path) -> None:
    (tmp_path / "sdtune.yaml").write_text("region: europe-west4\nbucket: gs://other-bucket\ntimeout: 2h\n")
    code, out, _ = sdtune("doctor")
    assert code == 3
    assert out.startswith("Vertex AI in europe-west4, project my-project")
    assert "gcloud storage buckets create gs://other-bucket --location=europe-west4" in out


def test_this_machine_where_no_project_is_known(
    sdtune: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi
    code, out, _ = sdtune("doctor")
    assert code == 0
    assert out.startswith("This machine\n")
    assert "✓ trainer           torch " in out
    assert "! GPU               none is seen by nvidia-smi" in out


def test_a_gpu_that_torch_was_not_built_for(sdtune: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034 MiB'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr("sdtune.backends.local.checks.version", lambda name: "2.9.0+cpu")
    code, out, _ = sdtune("doctor", "--backend", "local")
    assert code == 3
    assert "NVIDIA L4, 23034 MiB, but torch 2.9.0+cpu is built without CUDA" in out


def test_an_option_of_the_cloud_for_this_machine(sdtune: Command) -> None:
    code, _, err = sdtune("doctor", "--backend", "local", "--gpu", "l4")
    assert code == 2
    assert "gpu: is for jobs in Google Cloud" in err


def test_the_account_of_builds_is_named(google: ServicesServer, sdtune: Command) -> None:
    builder = google.add_account("builder")
    code, out, _ = sdtune("doctor", "--build-account", builder)
    assert code == 0
    assert f"! build account     {builder} has no role that allows it to push to sdtune, and is not known" in out
    code, _, err = sdtune("doctor", "--build-account", "builder")
    assert (code, "build_account: found 'builder', wanted NAME@PROJECT" in err) == (2, True)
    code, _, err = sdtune("doctor", "--backend", "local", "--build-account", builder)
    assert (code, "build_account: is for jobs in Google Cloud" in err) == (2, True)


def test_an_impossible_machine_is_refused_before_anything_is_asked(google: ServicesServer, sdtune: Command) -> None:
    code, _, err = sdtune("doctor", "--machine-type", "n1-standard-8", "--gpu", "a100", "--gpus", "2")
    assert code == 2
    assert "a2-highgpu-2g" in err
    assert not google.requests


def test_a_cloud_option_without_a_project(sdtune: Command) -> None:
    code, _, err = sdtune("doctor", "--gpu", "l4")
    assert code == 2
    assert "project: missing" in err


def on_a_terminal(findings: dict[str, Finding], needs: tuple[str, ...] = ()) -> str:
    """What stays on the screen, 100 columns wide."""
    out = io.StringIO()
    console = RichConsole(file=out, force_terminal=True, width=100, highlight=False, soft_wrap=True, color_system=None)

    def answer(finding: Finding) -> Callable[[], Finding]:
        return lambda: finding

    checks = [Check(name, answer(finding), needs if number else ()) for number, (name, finding) in
              enumerate(findings.items())]  # fmt: skip
    doctor_view.show(console, "Vertex AI", checks, examine(checks))
    # Only what was printed after the table that goes: its last line is cleared by the terminal.
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", out.getvalue().rpartition("\x1b[2K")[2])


def test_what_stays_on_a_terminal_can_be_read_and_copied() -> None:
    command = "gcloud projects add-iam-policy-binding my-project --member=user:ann@example.com --role=roles/browser"
    address = "https://console.cloud.google.com/iam-admin/quotas?project=my-project&service=aiplatform"
    findings: dict[str, Any] = {
        "one": Finding("good", "word " * 40),
        "two": Finding("bad", "[bold]not markup[/]", (command, "gcloud projects list"), f"Ask for more: {address}"),
    }
    shown = on_a_terminal(findings)
    lines = shown.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert sum("word" in line for line in lines) == 3
    assert "✗ two               [bold]not markup[/]" in lines
    assert any(line.strip() == address for line in lines)
    # As a shell reads it.
    copied = shown[shown.index("gcloud projects add") : shown.index("gcloud projects list")]
    read = subprocess.run(["sh", "-c", f"printf '%s\\n' {copied}"], capture_output=True, text=True, check=True)
    assert read.stdout.splitlines() == command.split()
    assert f"{'':20}gcloud projects list" in lines


def test_what_waits_for_the_same_is_one_line() -> None:
    findings: dict[str, Any] = {
        "credentials": Finding("bad", "none"),
        "project": Finding("good", ""),
        "bucket": Finding("good", ""),
    }
    lines = on_a_terminal(findings, needs=("credentials",)).splitlines()
    assert "· the others        project, bucket: not asked until this is mended: credentials" in lines
