"""Jobs on Vertex AI as a user plans them: where settings come from, what is refused, what is shown; no call is made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import BASE_MODEL, Command

pytestmark = pytest.mark.usefixtures("alone")


def train(*more: Any, output: str = "gs://my-bucket/cat") -> list[Any]:
    return [
        "train", "dreambooth-lora", "--instance-prompt", "a photo of sks cat", "--dataset", "gs://my-bucket/dog",
        "--output", output, "--dry-run", *more,
    ]  # fmt: skip


def job(out: str) -> dict[str, Any]:
    """What ``--dry-run --json`` says would be sent."""
    told = [json.loads(line) for line in out.splitlines()]
    return next(line for line in told if line["event"] == "dry_run")


def machine(out: str) -> dict[str, Any]:
    found: dict[str, Any] = job(out)["jobSpec"]["workerPoolSpecs"][0]["machineSpec"]
    return found


def test_what_is_typed_wins_then_the_environment_then_the_recipe_then_the_project(
    sdtune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sdtune.yaml").write_text("project: my-project\ngpu: t4\ntimeout: 5h\nlabels: {team: art}\n")
    code, out, err = sdtune(*train("--json"))
    assert code == 0, err
    assert machine(out)["acceleratorType"] == "NVIDIA_TESLA_T4"
    assert job(out)["labels"]["team"] == "art"

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("gpu: a100-80gb\nrank: 8\nregion: [europe-west4]\n")
    out = sdtune(*train("--json", "--config", recipe))[1]
    assert machine(out)["acceleratorType"] == "NVIDIA_A100_80GB"
    assert "europe-west4-docker.pkg.dev" in out
    assert job(out)["jobSpec"]["scheduling"]["timeout"] == "18000s"

    monkeypatch.setenv("SDTUNE_GPU", "a100")
    assert machine(sdtune(*train("--json", "--config", recipe))[1])["acceleratorType"] == "NVIDIA_TESLA_A100"
    assert machine(sdtune(*train("--json", "--config", recipe, "--gpu", "l4"))[1])["acceleratorType"] == "NVIDIA_L4"


def test_the_output_says_where_a_run_goes_unless_something_else_does(
    sdtune: Command, pictures: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ["train", "dreambooth-lora", "--instance-prompt", "x", "--dataset", str(pictures()), "--dry-run",
            "--base-model", str(BASE_MODEL)]  # fmt: skip
    assert "on this machine" in sdtune(*here, "--output", "out")[1]
    cloud = [*here, "--output", "gs://my-bucket/out", "--project", "my-project"]
    assert "on Vertex AI in us-central1, project my-project" in sdtune(*cloud)[1]
    local = [*here, "--output", "gs://my-bucket/out", "--backend", "local"]
    assert "on this machine" in sdtune(*local)[1]
    monkeypatch.setenv("SDTUNE_BACKEND", "local")
    assert "on this machine" in sdtune(*local[:-2])[1]
    (tmp_path / "sdtune.yaml").write_text("backend: vertex\nproject: my-project\n")
    monkeypatch.delenv("SDTUNE_BACKEND")
    code, _, err = sdtune(*here, "--output", "out")
    assert code == 2
    assert "out is a folder of this machine, which a job cannot reach; wanted gs://bucket/path" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backend", "local", "--gpu", "l4"], "gpu: is for jobs in Google Cloud, but this one runs on this machine"),
        (["--backend", "mars"], "backend: found 'mars', wanted local or vertex"),
        ([], "project: missing; give --project"),
        (["--project", "my-project", "--gpu", "l5"], "l5"),
        (
            ["--project", "my-project", "--gpu", "a100", "--machine-type", "n1-standard-8", "--gpus", "2"],
            "a2-highgpu-2g",
        ),
        (["--project", "my-project", "--strategy", "flex-start", "--gpu", "t4"], "flex-start has no t4"),
        (["--project", "my-project", "--gpu", "t4", "--mixed-precision", "bf16"], "found bf16, which t4 has not"),
        (["--project", "my-project", "--gpu", "v100"], "sdtune's own images do not run on v100"),
        (["--project", "my-project", "--push-to-hub"], "push_to_hub: a job needs a token for it"),
        (["--project", "my-project", "--wandb-project", "x"], "--wandb-key-secret NAME"),
        (["--project", "my-project", "--output", "gs://my-bucket"], "is a whole bucket; wanted a folder in it"),
        (["--project", "my-project", "--output", "gs://my-bucket/dog/out"], "is the dataset or lies in it"),
        (["--project", "my-project", "--output", "gs://my-bucket/$(HOME)"], "would put something else in place"),
        (["--project", "my-project", "--env", "HF_TOKEN=hf_abcdefghijk"], "looks like a secret"),
    ],
)
def test_what_cannot_be_is_refused_before_any_call(sdtune: Command, words: list[str], said: str) -> None:
    code, out, err = sdtune(*train(*words))
    assert code == 2, out
    assert said in err


def test_all_mistakes_are_told_together(sdtune: Command) -> None:
    _, _, err = sdtune(*train("--gpus", "0", "--rank", "0", "--learning-rate", "fast", "--timeout", "soon"))
    for words in ("gpus: found '0'", "timeout: found 'soon'", "rank: found '0'", "learning_rate: found 'fast'"):
        assert words in err


def test_the_plan_says_what_where_and_for_how_long(sdtune: Command) -> None:
    _, out, _ = sdtune(
        *train("--project", "my-project", "--spot", "--gpus", "2", "--replicas", "2", "--timeout", "90m")
    )
    assert "dataset     gs://my-bucket/dog, not looked at: --dry-run makes no call" in out
    assert "machine     2 machines, each g2-standard-24 with 2 x l4, spot" in out
    assert "time        the job is ended after 90m at most (--timeout)" in out
    assert "Nothing was started" in out
    rendered = yaml.safe_load(out.partition("This would run:")[2])
    assert rendered["jobSpec"]["scheduling"] == {"timeout": "5400s", "strategy": "SPOT"}


def test_what_will_not_fit_is_told_with_what_helps(sdtune: Command) -> None:
    base = ["--base-model", "stabilityai/stable-diffusion-xl-base-1.0", "--resolution", "1024"]
    out = sdtune(*train("--project", "my-project", *base, "--gpu", "l4", "--train-batch-size", "8"))[1]
    assert "warning: " in out
    assert "--gradient-checkpointing" in out
    assert "warning: " not in sdtune(*train("--project", "my-project", *base, "--gpu", "a100-80gb"))[1]


def test_what_lies_here_gets_an_address_that_its_content_decides(
    sdtune: Command, pictures: Callable[..., Path]
) -> None:
    words = ["train", "dreambooth-lora", "--instance-prompt", "x", "--base-model", str(BASE_MODEL), "--output",
             "gs://my-bucket/cat", "--project", "my-project", "--bucket", "staging", "--dry-run", "--json"]  # fmt: skip

    def sent(folder: Path) -> tuple[str, str]:
        args = job(sdtune(*words, "--dataset", folder)[1])["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"]
        return args[2], json.loads(args[-1].removeprefix("--recipe="))["base_model"]

    folder = pictures()
    dataset, base_model = sent(folder)
    assert dataset.startswith("--dataset=gs://staging/sdtune/datasets/pictures-")
    assert base_model.startswith("gs://staging/sdtune/base-models/base-model-")
    assert sent(folder) == (dataset, base_model)
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes()[:-20] + b"\0" * 8)
    (folder / "notes.txt").write_text("not of the dataset")
    assert sent(pictures(name="other", count=4))[0] != dataset


def test_a_dry_run_loads_nothing_of_google(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom sdtune.cli.app import main\n"
        f"sys.argv = {['sdtune', *train('--project', 'my-project')]!r}\n"
        "try:\n    main()\nfinally:\n    print('LOADED', *sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    loaded = ran.stdout.partition("LOADED ")[2].split()
    assert not [
        name for name in loaded if name.startswith(("torch", "google.cloud.", "google.auth", "google.api_core"))
    ]


def test_init_writes_a_file_that_train_reads_and_never_over_another(sdtune: Command, tmp_path: Path) -> None:
    code, out, _ = sdtune("init", "--project", "my-project", "--region", "europe-west4", "--bucket", "my-bucket")
    assert code == 0
    assert "sdtune doctor" in out
    out = sdtune(*train())[1]
    assert "on Vertex AI in europe-west4, project my-project" in out
    assert "europe-west4-docker.pkg.dev/my-project/sdtune/sdtune-diffusers" in out
    code, _, err = sdtune("init")
    assert code == 2
    assert "is there already" in err
    assert sdtune("init", "--force")[0] == 0
    assert "Write your project's id into it" in sdtune("init", "--force")[1]


def test_a_copy_is_planned(sdtune: Command) -> None:
    share = ["--nfs", "10.0.0.2:/vol1=models", "--network", "projects/1/global/networks/n", "--project", "my-project"]
    copy = ["sync-nfs", "--from", "/gcs/my-bucket/cat", "--dry-run"]
    code, out, err = sdtune(*copy, *share, "--method", "kohya_lora", "--json")
    assert code == 0, err
    pool = job(out)["jobSpec"]["workerPoolSpecs"][0]
    assert pool["machineSpec"] == {"machineType": "e2-standard-4"}
    assert pool["containerSpec"]["args"] == [
        "sync-nfs", "--from=gs://my-bucket/cat", "--method=kohya-dreambooth-lora", "--nfs=/mnt/nfs/models",
    ]  # fmt: skip
    code, _, err = sdtune("sync-nfs", "--from", "here", "--project", "my-project", "--machine-type", "a2-highgpu-1g")
    assert code == 2
    for words in ("from: found 'here'", "nfs: missing", "a2-highgpu-1g"):
        assert words in err
