"""Nobody's settings, for the tests of commands that look for some."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder of its own, without the settings of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    for name in (
        "CLOUDSDK_CORE_PROJECT", "GOOGLE_CLOUD_PROJECT", "STORAGE_EMULATOR_HOST", "SDTUNE_BACKEND", "SDTUNE_GPU",
        "SDTUNE_OUTPUT", "SDTUNE_PROJECT",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
