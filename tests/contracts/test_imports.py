"""The floors hold, the container's part stands alone, and help costs next to nothing."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "src" / "sdtune"
CONTAINER_PART = ("__init__.py", "errors.py", "events.py", "methods", "training")

REFUSE = """
import builtins, sys

imported = builtins.__import__

def refusing(name, globals=None, *rest, **named):
    # Libraries may use what they like; our own modules may not.
    ours = (globals or {}).get("__name__", "").startswith("sdtune")
    if ours and name.split(".")[0] in ("google", "typer", "rich"):
        raise ImportError(f"the trainer must do without {name}")
    return imported(name, globals, *rest, **named)

builtins.__import__ = refusing
"""
HEAVY = ("torch", "google.cloud.", "google.auth", "google.api_core", "diffusers", "transformers")


def test_the_import_contract_holds() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    ran = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert "3 kept, 0 broken" in ran.stdout


def test_two_modules_of_the_trainer_may_import_google() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    ignored = [line for contract in contracts for line in contract.get("ignore_imports", [])]
    assert ignored == ["sdtune.training.components.store -> google", "sdtune.training.secrets -> google"]


@pytest.fixture
def container(tmp_path: Path, pictures: Callable[..., Path]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Trains with only what a container copies, in a Python that refuses Google's clients and the terminal's."""
    (tmp_path / "sdtune").mkdir()
    for name in CONTAINER_PART:
        source = PACKAGE / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / "sdtune" / name)
    dataset = pictures()

    def train(**settings: Any) -> subprocess.CompletedProcess[str]:
        words = ["train", "dreambooth-lora", f"--dataset={dataset}", f"--output={tmp_path / 'out'}"]
        script = REFUSE + (
            "from sdtune.training.__main__ import main\n"
            "assert not __import__('importlib.util').util.find_spec('sdtune.cli')\n"
            f"sys.exit(main({[*words, f'--recipe={json.dumps(settings)}']!r}))"
        )
        return subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)

    return train


def test_the_containers_part_trains_alone(container: Callable[..., Any], settings: dict[str, Any]) -> None:
    ran = container(**settings | {"max_train_steps": 2, "num_samples": 0})
    assert ran.returncode == 0, ran.stderr
    assert '"event": "finished"' in ran.stdout


def test_only_a_bucket_needs_googles_client(container: Callable[..., Any], settings: dict[str, Any]) -> None:
    ran = container(**settings | {"base_model": "gs://bucket/model"})
    assert ran.returncode == 3, ran.stderr
    assert "gs://bucket/model is read by google-cloud-storage, which this Python does not have; install" in ran.stdout


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    script = "import sys\nsys.argv = ['sdtune', '--help']\nfrom sdtune.cli.app import main\n" + (
        "try:\n    main()\nfinally:\n    print('LOADED', *sys.modules)"
    )
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    loaded = ran.stdout.partition("LOADED ")[2].split()
    assert "typer" in loaded
    assert not [name for name in loaded if name.startswith((*HEAVY, "pydantic", "rich", "PIL", "yaml"))]
    # Of the processor, which other tests are busy with at the same time; they only ever add to it, so the shortest run
    # is the one that tells.
    assert min(seconds) < 0.2


def test_the_launcher_checks_and_plans_without_torch_and_google(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "a.png")
    script = (
        "import sys\nfrom sdtune.cli.app import main\n"
        f"sys.argv = ['sdtune', 'train', 'dreambooth-lora', '--instance-prompt=x', '--dataset={tmp_path}/data', "
        f"'--output={tmp_path}/out', '--dry-run']\n"
        "try:\n    main()\nfinally:\n    print('LOADED', *sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    loaded = ran.stdout.partition("LOADED ")[2].split()
    assert "pydantic" in loaded
    assert not [name for name in loaded if name.startswith(HEAVY)]
