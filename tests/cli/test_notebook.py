"""sdtune notebook run, as a user runs it: planned, as a job on the loopback's Vertex AI, and on this machine."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.notebooks import printed, read, write
from tests.servers.cloud import Cloud, loopback_cloud
from tests.servers.storage import StorageServer

SDTUNE = str(Path(sys.executable).with_name("sdtune"))
NETWORK = ["--network", "projects/123456789012/global/networks/vpc"]
SHARE = [*NETWORK, "--nfs", "10.0.0.2:/vol1=/mnt/nfs/models"]
IN_CLOUD = ["--output", "gs://my-bucket/runs", "--project", "my-project"]


@pytest.fixture
def run_notebook(alone: None, sdtune: Command) -> Command:
    """Runs ``sdtune notebook run``, without anybody's settings."""
    return partial(sdtune, "notebook", "run")


def told(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def job(out: str) -> dict[str, Any]:
    return next(line for line in told(out) if line["event"] == "dry_run")


# --- planned ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_job_and_makes_no_call(run_notebook: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "train.ipynb", ("steps = 1", "parameters"), "print(steps)")
    words = [file, *IN_CLOUD, "-p", "steps=5", "--gpu", "t4", "--spot", "--cell-timeout", "2h", "--kernel", "python3",
             "--container", "kohya", *SHARE, "--dry-run", "--json"]  # fmt: skip
    # What is for training alone is left out, and not refused.
    (tmp_path / "sdtune.yaml").write_text("replicas: 4\nlabels: {team: art}\nrestart_on_preemption: true\n")
    code, out, err = run_notebook(*words)
    assert code == 0, err
    rendered = job(out)
    (pool,) = rendered["jobSpec"]["workerPoolSpecs"]
    assert rendered["displayName"] == "train"
    assert {**rendered["labels"], "sdtune-run": "x", "sdtune": "x"} == {
        "sdtune": "x", "sdtune-task": "notebook", "sdtune-run": "x", "team": "art",
    }  # fmt: skip
    assert pool["machineSpec"]["acceleratorType"] == "NVIDIA_TESLA_T4"
    assert pool["replicaCount"] == "1"
    assert pool["nfsMounts"] == [{"server": "10.0.0.2", "path": "/vol1", "mountPoint": "models"}]
    assert pool["containerSpec"]["imageUri"].endswith("/sdtune-kohya:0.1.0")
    assert rendered["jobSpec"]["scheduling"]["strategy"] == "SPOT"
    assert "restartJobOnWorkerRestart" not in rendered["jobSpec"]["scheduling"]
    assert not {"tensorboard", "baseOutputDirectory"} & set(rendered["jobSpec"])
    notebook = pool["containerSpec"]["args"][1]
    assert notebook.startswith("--notebook=gs://my-bucket/sdtune/notebooks/train.ipynb-")
    assert notebook.endswith("/train.ipynb")
    assert pool["containerSpec"]["args"] == [
        "notebook", notebook, "--output=gs://my-bucket/runs", "--kernel=python3", "--cell-timeout=7200",
        '--parameters={"steps": 5}',
    ]  # fmt: skip
    # The content decides where it is.
    assert job(run_notebook(*words)[1])["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"][1] == notebook
    write(file, "print(2)")
    assert job(run_notebook(*words)[1])["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"][1] != notebook


def test_the_plan_says_what_with_what_and_where(run_notebook: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "train.ipynb", ("max_steps = 1\nlr = 1e-4", "parameters"))
    _, out, _ = run_notebook(file, *IN_CLOUD, "-p", "max_step=5", "-p", "lr=1e-3", "-r", "lr2=7", *SHARE, "--dry-run")
    assert "notebook on Vertex AI in us-central1, project my-project" in out
    for row in ("max_step = 5", "lr = 0.001", "lr2 = '7'"):
        assert f"  parameter   {row}" in out
    assert "output      gs://my-bucket/runs/train.ipynb" in out
    assert "shares      10.0.0.2:/vol1 at /mnt/nfs/models" in out
    assert "which sets max_steps, lr: max_step (did you mean max_steps?), lr2" in out
    assert "Nothing was started" in out
    write(file, "print(1)")
    assert "no cell tagged 'parameters'" in run_notebook(file, *IN_CLOUD, "-p", "a=1", "--dry-run")[1]
    assert "warning" not in run_notebook(file, *IN_CLOUD, "--dry-run")[1]
    # A notebook in a bucket is read in place, and where no call is made, not looked at.
    args = job(run_notebook("gs://my-bucket/x.ipynb", *IN_CLOUD, "--dry-run", "--json")[1])["jobSpec"][
        "workerPoolSpecs"
    ][0]
    assert args["containerSpec"]["args"][1] == "--notebook=gs://my-bucket/x.ipynb"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import sdtune\nrun = sdtune.train('dreambooth-lora')", "train"),
        ("from sdtune import jobs, hpo", "hpo|jobs"),
        ("import sdtune.training.smoke\nsdtune.training.smoke", ""),
        ("# sdtune.train(...) would", ""),
    ],
)
def test_what_the_image_does_not_have_is_told_before_it_is_paid_for(
    run_notebook: Command, source: str, name: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "x.ipynb", source)
    _, out, _ = run_notebook(file, *IN_CLOUD, "--dry-run")
    assert bool(re.search(rf"a cell uses sdtune\.({name}), which is not in the image diffusers", out)) == bool(name)
    assert "a cell uses" not in run_notebook(file, *IN_CLOUD, "--image", "my/own:1", "--dry-run")[1]
    assert "a cell uses" not in run_notebook(file, "--output", "out", "--dry-run")[1]


def test_parameters_come_from_all_places_in_papermills_order(run_notebook: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "x.ipynb", "1")
    (tmp_path / "a.yaml").write_text("one: file\ntwo: file\nranks: [4, 8]\nday: 2026-11-25\n")
    words = ["-f", tmp_path / "a.yaml", "-y", "{two: yaml, three: yaml, deep: {a: [1.5, null, true]}}",
             "-p", "three=3", "-p", "four=a=b", "-r", "four=5", "-p", "four=6", "-p", "text=",
             "-p", "emoji=🐈 \"x\"\n$(HOME)"]  # fmt: skip
    code, out, err = run_notebook(file, *IN_CLOUD, *words, "--dry-run", "--json")
    assert code == 0, err
    plan = told(out)[0]
    assert plan["parameters"] == {
        "one": "file", "two": "yaml", "ranks": [4, 8], "day": "2026-11-25", "three": 3,
        "deep": {"a": [1.5, None, True]}, "four": "5", "text": "", "emoji": "🐈 \"x\"\n$(HOME)",
    }  # fmt: skip
    argument = job(out)["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"][-1]
    assert "$" not in argument
    assert json.loads(argument.removeprefix("--parameters=")) == plan["parameters"]


def test_every_mistake_is_told_at_once(run_notebook: Command, tmp_path: Path) -> None:
    (tmp_path / "script.ipynb").write_text("import torch\n")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    code, _, err = run_notebook(
        "script.ipynb", "--output", "gs://my-bucket", "--project", "my-project",
        "-p", "a", "-p", "é=1", "-p", "class=2", "-f", "list.yaml", "-f", "nothing.yaml",
        "-y", "{", "--cell-timeout", "soon", "--gpu", "l5", "--container", "x",
        "--dry-run",
    )  # fmt: skip
    assert code == 2
    for words in (
        "param: found 'a', wanted NAME=VALUE", "the name 'é', which is no name of a variable",
        "the name 'class', which is a word of Python's own", "list.yaml holds a list; wanted lines",
        "nothing.yaml cannot be read",
        "param_yaml: it is not YAML", "cell_timeout: found 'soon', wanted a duration", "l5",
        "container: found 'x', wanted diffusers or kohya", "gs://my-bucket is a whole bucket; wanted a folder in it",
        "script.ipynb is a text that begins with 'import torch'; wanted a notebook as Jupyter saves it",
        "jupytext --to notebook",
    ):  # fmt: skip
        assert words in err, words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{here}"], "output: missing; give --output"),
        ([*IN_CLOUD], "notebook: missing; give a notebook"),
        (["nothing.ipynb", *IN_CLOUD], "nothing.ipynb cannot be read (No such file or directory)"),
        (["{here}", "--output", "out", "--backend", "vertex", "--project", "my-project"], "which a job cannot reach"),
        (["{here}", "--output", "out", "--gpu", "l4", "--project", "my-project"], "which a job cannot reach"),
        (["{here}", "--output", "out", "--backend", "local", "--spot"], "is for jobs in Google Cloud"),
        (["{here}", "--output", "."], "the folder of the notebook itself, which would be written over"),
        (["{here}", *IN_CLOUD, "-r", "key=hf_abcdefghijklmnop"], "looks like a secret"),
        (["{here}", *IN_CLOUD, "--cell-timeout", "0s"], "cell_timeout: found 0s, wanted at least 1s"),
        (["{here}", *IN_CLOUD, "--gpu", "none", "--gpus", "2"], "gpus: found 2 with --gpu none"),
        (["{here}", *IN_CLOUD, "--gpu", "none", "--machine-type", "a2-highgpu-1g"], "comes with GPUs"),
        (["r.ipynb", *IN_CLOUD], "is written in r (its kernel is ir)"),
        (["x.txt", *IN_CLOUD], "wanted a name that ends with .ipynb"),
    ],
)
def test_what_cannot_be_is_refused(run_notebook: Command, words: list[str], said: str, tmp_path: Path) -> None:
    write(tmp_path / "x.ipynb", "1")
    write(tmp_path / "r.ipynb", "1", kernel="ir", language="R")
    write(tmp_path / "x.txt", "1")
    code, out, err = run_notebook(*(word.format(here="x.ipynb") for word in words), "--dry-run")
    assert code == 2, out
    assert said in err


def test_a_machine_without_a_gpu_will_do(run_notebook: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "x.ipynb", "1")
    pool = job(run_notebook(file, *IN_CLOUD, "--gpu", "none", "--dry-run", "--json")[1])["jobSpec"]["workerPoolSpecs"][
        0
    ]
    assert pool["machineSpec"] == {"machineType": "e2-standard-4"}


# --- on this machine --------------------------------------------------------------------------------------------------


def test_this_machine_runs_it_and_the_exit_code_tells(run_notebook: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "lab" / "x.ipynb", ("n = 0", "parameters"), "print('n is', n)\n10 / n")
    words = [file, "--output", tmp_path / "out"]
    code, out, err = run_notebook(*words)
    assert code == 7
    assert "n is 0" in out
    assert "cell [2], \"print('n is', n)\", failed: ZeroDivisionError: division by zero; at line 2: 10 / n" in err
    assert f"The notebook as far as it came: {tmp_path}/out/x.ipynb" in err
    # What broke off makes room, as an unfinished training does; what came to its end does not.
    code, out, err = run_notebook(*words, "-p", "n=5")
    assert code == 0, err
    assert "Done in" in out
    assert "3 cells run" in out
    assert f"{tmp_path}/out/x.ipynb" in out
    assert printed(read(tmp_path / "out" / "x.ipynb").cells[2]) == "n is 5\n2.0"
    code, _, err = run_notebook(*words, "-p", "n=4")
    assert code == 2
    assert "already holds x.ipynb; choose another --output or add --overwrite" in err
    assert run_notebook(*words, "-p", "n=4", "--overwrite")[0] == 0
    assert run_notebook(*words, "--detach", "--overwrite")[0] == 2


def test_ctrl_c_stops_it_and_leaves_what_there_is(run_notebook: Command, tmp_path: Path) -> None:
    write(tmp_path / "x.ipynb", "print('begun', flush=True)\nimport time\ntime.sleep(600)")
    with subprocess.Popen(
        [SDTUNE, "notebook", "run", "x.ipynb", "--output", "out"], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stdout
        for line in process.stdout:
            if line == "begun\n":
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(60) == 130, rest
    assert f"Stopped. The notebook as far as it came: {tmp_path}/out/x.ipynb" in rest
    left = read(tmp_path / "out" / "x.ipynb")
    assert printed(left.cells[0]).startswith("begun\n")


# --- as a job ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cloud(run_notebook: Command, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud[StorageServer]]:
    """Vertex AI, Cloud Logging and Cloud Storage on this machine, with a bucket and a share."""
    with loopback_cloud() as found:
        found.vertex.projects["my-project"] = "123456789012"
        found.vertex.nfs("10.0.0.2", "/vol1")
        found.storage.put("my-bucket", "x", b"")
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def stored(cloud: Cloud[StorageServer], name: str) -> Any:
    found = cloud.storage.buckets["my-bucket"].get(name)
    return read(found.data) if found else None


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SDTUNE, *words], capture_output=True, text=True, cwd=cwd, timeout=300)


def test_a_job_runs_a_notebook_of_this_machine(cloud: Cloud[StorageServer], tmp_path: Path) -> None:
    write(
        tmp_path / "train.ipynb", ("name = 'x'\nshare = ''", "parameters"),
        "from pathlib import Path\nprint('named', name)\nPath(share, 'from-a-cell.txt').write_text('on the share')",
        "from PIL import Image\nImage.new('RGB', (8, 8), 'red')",
    )  # fmt: skip
    words = ["notebook", "run", "train.ipynb", "--output", "gs://my-bucket/runs", "--gpu", "l4", *SHARE]
    name = 'cat "sks"\n$(HOME) 🐈'
    ran = command(*words, "-p", f"name={name}", "-p", "share=/mnt/nfs/models", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = told(ran.stdout)
    kinds = [line["event"] for line in lines]
    assert kinds.index("plan") < kinds.index("submitted") < kinds.index("log") < kinds.index("executed")
    said = [line["text"] for line in lines if line["event"] == "log"]
    assert "[3] from pathlib import Path" in said
    assert 'named cat "sks"' in said
    assert [line["state"] for line in lines if line["event"] == "state"][-1] == "succeeded"
    left = stored(cloud, "runs/train.ipynb")
    assert printed(left.cells[2]).startswith(f"named {name}\n")
    assert "runs/train_files/cell-04-output-1.png" in cloud.storage.buckets["my-bucket"]
    share = cloud.vertex.nfs("10.0.0.2", "/vol1")
    assert (share / "from-a-cell.txt").read_text() == "on the share"

    (listed,) = told(command("jobs", "list", "--json", cwd=tmp_path).stdout)
    assert (listed["name"], listed["task"], listed["state"], listed["gpu"], listed["output"]) == (
        "train", "notebook", "succeeded", "l4", "gs://my-bucket/runs",
    )  # fmt: skip
    assert "notebook" in command("jobs", "list", cwd=tmp_path).stdout
    again = command("jobs", "logs", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "[3] from pathlib import Path" in again.stdout
    assert "gs://my-bucket/runs/train.ipynb" in again.stdout
    # What has come to its end is not written over, unasked.
    refused = command(*words, cwd=tmp_path)
    assert refused.returncode == 2
    assert "already holds train.ipynb" in refused.stderr


def test_a_failing_cell_of_a_job_has_its_exit_code_and_leaves_the_notebook(
    cloud: Cloud[StorageServer], tmp_path: Path
) -> None:
    file = write(tmp_path / "x.ipynb", "print('before')", "raise KeyError('lost')", "print('never')")
    cloud.storage.put("my-bucket", "books/x.ipynb", file.read_bytes())
    file.unlink()
    words = ["notebook", "run", "gs://my-bucket/books/x.ipynb", "--output", "gs://my-bucket/runs"]
    ran = command(*words, cwd=tmp_path)
    assert ran.returncode == 7, ran.stdout + ran.stderr
    assert "before" in ran.stdout
    assert "failed: KeyError: 'lost'; at line 1: raise KeyError('lost')" in ran.stderr
    assert "gs://my-bucket/runs/x.ipynb" in ran.stderr
    left = stored(cloud, "runs/x.ipynb")
    assert [printed(cell) for cell in left.cells] == ["before\n", "KeyError", ""]
    followed = command("jobs", "logs", "-f", cwd=tmp_path)
    assert followed.returncode == 7
    assert "failed: KeyError" in followed.stderr
    words[2] = "gs://my-bucket/books/y.ipynb"
    ran = command(*words, cwd=tmp_path)
    assert ran.returncode == 2
    assert "gs://my-bucket/books/y.ipynb cannot be read (there is no such file); check the path." in ran.stderr


def test_a_job_that_is_cancelled_leaves_what_there_was(cloud: Cloud[StorageServer], tmp_path: Path) -> None:
    write(tmp_path / "x.ipynb", "print('first')", "import time\nprint('begun', flush=True)\ntime.sleep(600)", "'never'")
    ran = command("notebook", "run", "x.ipynb", "--output", "gs://my-bucket/runs", "--detach", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    number = next(line["number"] for line in told(ran.stdout) if line["event"] == "submitted")
    deadline = time.monotonic() + 300
    while not ((left := stored(cloud, "runs/x.ipynb")) and "begun\n" in printed(left.cells[1])):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert command("jobs", "cancel", number, cwd=tmp_path).returncode == 0
    followed = command("jobs", "logs", "-f", number, cwd=tmp_path)
    assert followed.returncode == 4
    assert "begun" in followed.stdout
    left = stored(cloud, "runs/x.ipynb")
    assert printed(left.cells[0]) == "first\n"
    assert left.metadata.sdtune.finished is False
    shown = told(command("jobs", "show", number, "--json", cwd=tmp_path).stdout)[0]
    assert shown["state"] == "cancelled"
