"""A Hugging Face id with a revision, from a cache as the hub's client lays it out: no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdtune import events
from tests.conftest import BASE_MODEL
from tests.training.test_entry import train

BRANCHES = {"main": "a" * 40, "square": "b" * 40}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """someone/tiny with two branches, whose models say that they are made for 128 and for 64 pixels."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for branch, commit in BRANCHES.items():
        (repository / "refs" / branch).write_text(commit)
        for path in BASE_MODEL.rglob("*.*"):
            copy = repository / "snapshots" / commit / path.relative_to(BASE_MODEL)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    unet = repository / "snapshots" / BRANCHES["square"] / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"sample_size": 8}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_run_trains_the_branch_that_was_asked_for(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = pictures()
    shared = {**settings, "base_model": "someone/tiny", "max_train_steps": 2, "num_samples": 0}
    code, told, errors = train({**shared, "revision": "square"}, dataset, tmp_path / "out")
    assert code == 0, errors
    assert "Encoding 3 pictures at 64 px" in [event.text for event in told if isinstance(event, events.Phase)]
    assert "revision: square" in (tmp_path / "out" / "recipe.yaml").read_text()
    code, told, _ = train({**shared, "revision": "none"}, dataset, tmp_path / "other")
    assert code == 5
    assert isinstance(told[-1], events.Failed)
    assert "base_model: someone/tiny cannot be loaded" in told[-1].text


@pytest.mark.parametrize(("revision", "commit"), [(None, BRANCHES["main"]), ("square", BRANCHES["square"])])
def test_the_kohya_trainer_fetches_it_too(revision: str | None, commit: str) -> None:
    script = (
        "from sdtune.training.kohya.base import _fetched\n"
        "from sdtune.methods.kohya import KohyaNativeLora\n"
        f"print('FETCHED', _fetched(KohyaNativeLora(base_model='someone/tiny', revision={revision!r})))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert ran.stdout.strip().endswith(f"snapshots/{commit}"), ran.stderr


def test_a_run_started_by_hand_tells_of_a_model_that_moved(
    settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    code, told, _ = train({**settings, "base_model": "runwayml/stable-diffusion-v1-5"}, pictures(), tmp_path / "out")
    assert code == 5
    note, failed = told
    assert isinstance(note, events.Note)
    assert "runwayml/stable-diffusion-v1-5 is no longer on Hugging Face; its copy" in note.text
    assert isinstance(failed, events.Failed)
    assert "base_model: stable-diffusion-v1-5/stable-diffusion-v1-5 cannot be loaded" in failed.text
