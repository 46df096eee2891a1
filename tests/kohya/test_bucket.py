"""kohya's trainer around the stand-in for sd-scripts: from a bucket, with regularisation pictures, into a bucket."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sdtune import events
from sdtune.methods.kohya import KohyaDreamBoothLora
from sdtune.training.__main__ import main
from sdtune.training.components.fetch import FETCHED
from sdtune.training.destinations import RUN_FOLDER
from sdtune.training.kohya.process import FOLDER, PYTHON
from tests.conftest import DATASETS
from tests.kohya.test_base import model
from tests.servers.storage import StorageServer

FAKE = Path(__file__).parent / "fake"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {FOLDER: str(FAKE), PYTHON: sys.executable, "SDTUNE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    for name in (FETCHED, RUN_FOLDER):
        monkeypatch.setenv(name, "{}")
        monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("fake", "code"), [("learn", 0), ("diverge", 5)])
def test_a_run_from_a_bucket_to_a_bucket(
    fake: str, code: int, storage: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("FAKE", fake)
    picture = (DATASETS / "images" / "chelsea-1.jpg").read_bytes()
    storage.put("pets", "dog/3_sks dog/a.jpg", picture)
    storage.put("pets", "dogs/1_dog/b.jpg", picture)
    model(tmp_path / "base")
    method = KohyaDreamBoothLora.from_settings({
        "base_model": str(tmp_path / "base"), "class_data_dir": "gs://pets/dogs", "max_train_steps": 5,
        "num_samples": 1, "sample_every": 3,
    })  # fmt: skip
    words = ["--dataset=gs://pets/dog", "--output=/gcs/pets/my dog", *method.to_args()]
    assert main(["train", "kohya-dreambooth-lora", *words]) == code
    told = [event for line in capsys.readouterr().out.splitlines() if (event := events.parse(line))]
    found = {name for name in storage.buckets["pets"] if name.startswith("my dog/") and "logs" not in name}
    drawn = {f"my dog/samples/step-{step:06}/prompt-0-sample-0.png" for step in (0, 3, 5)}
    result = {".sdtune", "README.md", "my dog.safetensors", "pytorch_lora_weights.safetensors", "recipe.yaml"}
    assert [name for name in storage.buckets["pets"] if name.startswith("my dog/logs/events.out.tfevents.")]
    assert not list((tmp_path / "cache" / "runs").iterdir())
    if code:
        assert isinstance(told[-1], events.Failed)
        assert found == {"my dog/.sdtune", "my dog/samples/step-000000/prompt-0-sample-0.png"}
        return
    assert found == drawn | {f"my dog/{name}" for name in (*result, "contact_sheet.png")}
    newest = max(storage.buckets["pets"].values(), key=lambda stored: stored.generation)
    assert newest.name == "my dog/recipe.yaml"
    recipe = yaml.safe_load(newest.data)
    assert recipe["class_data_dir"] == "gs://pets/dogs"
    assert any(isinstance(event, events.Note) and "regularisation pictures" in event.text for event in told)
    artifacts = {event.kind: event.path for event in told if isinstance(event, events.Artifact)}
    assert artifacts["kohya_lora"] == "gs://pets/my dog/my dog.safetensors"
