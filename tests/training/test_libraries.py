"""What takes long to import is imported while something is fetched; what is wrong with it is told by who needs it."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

import pytest

from sdtune.methods.catalog import find_method
from sdtune.training import __main__ as entry
from sdtune.training import libraries
from tests.conftest import BASE_MODEL, DATASETS

METHOD = "text-to-image-lora"


def method() -> Any:
    return find_method(METHOD).from_settings({"base_model": str(BASE_MODEL)})


def test_it_is_imported_in_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[tuple[str, threading.Thread]] = []
    monkeypatch.setattr(importlib, "import_module", lambda name: imported.append((name, threading.current_thread())))
    before = set(threading.enumerate())
    libraries.import_ahead(method())
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    [(name, thread)] = imported
    assert name == "sdtune.training.trainers.text_to_image_lora"
    # A daemon: a run that has failed by then does not wait for it.
    assert thread is not threading.current_thread()
    assert thread.daemon


def test_what_is_wrong_is_told_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libcudnn.so.9 is missing")

    monkeypatch.setattr(importlib, "import_module", broken)
    before = set(threading.enumerate())
    libraries.import_ahead(method())
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ImportError, match="libcudnn"):
        libraries.import_trainer(method())


@pytest.mark.parametrize(
    ("base", "wanted"),
    [
        ("gs://bucket/model", ["imports begin", "the dataset", "the base model", "training"]),
        (str(BASE_MODEL), ["the dataset", "training"]),
    ],
    ids=["fetched", "here"],
)
def test_only_while_something_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: str, wanted: list[str]
) -> None:
    did: list[str] = []
    monkeypatch.setattr(entry, "import_ahead", lambda method: did.append("imports begin"))
    monkeypatch.setattr(entry, "folder_here", lambda place, what: did.append("the dataset") or Path(place))
    monkeypatch.setattr(entry, "fetch_base_model", lambda method: did.append("the base model"))
    monkeypatch.setattr(entry, "run_training", lambda *given: did.append("training"))
    words = [f"--dataset={DATASETS / 'captioned'}", f"--output={tmp_path / 'out'}", "--processes=1"]
    assert entry.main(["train", METHOD, *words, f"--base_model={base}"]) == 0
    assert did == wanted
