"""The smoke test finds what is broken, tries the rest all the same, and knows every method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdtune import events
from sdtune.methods.catalog import METHODS
from sdtune.methods.layouts import check
from sdtune.training import smoke


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_tried_on_a_good_dataset(name: str, tmp_path: Path) -> None:
    method = METHODS[name].from_settings(smoke.SETTINGS[name])
    smoke.lay_out(method.layout, tmp_path / "data")
    report = check(tmp_path / "data", method.layout, resolution=smoke.SIDE)
    assert len(report.examples) == smoke.PICTURES
    checks = smoke.training_checks(method.container, tmp_path, tmp_path)
    assert f"train {name}" in [check for check, _ in checks]


def test_all_optimizers_that_a_cpu_has_are_tried() -> None:
    tried = {settings.get("optimizer", "adamw") for name, settings in smoke.SETTINGS.items() if "kohya" not in name}
    assert tried == {"adafactor", "adamw", "lion", "prodigy"}


def test_a_module_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "__init__.py").touch()
    (tmp_path / "half" / "pinned_wrong.py").write_text("from json import no_such_name")
    (tmp_path / "half" / "__main__.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(smoke.BrokenError, match=r"half\.pinned_wrong: cannot import name 'no_such_name'"):
        smoke.import_all("half")


def test_what_is_broken_is_told_and_the_rest_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smoke, "MODULES", ("sdtune.errors",))
    monkeypatch.setattr(smoke, "LIBRARIES", ("no_such_library", "json"))
    monkeypatch.setattr(smoke, "METHODS", {"dreambooth-lora": METHODS["dreambooth-lora"]})
    # Told before torch is imported, so that the test need not wait for that.
    monkeypatch.setenv("CLUSTER_SPEC", "none")
    assert smoke.main(["--container", "diffusers", "--base-model", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "BROKEN import no_such_library: ModuleNotFoundError" in told
    assert "ok     import json" in told
    assert "BROKEN train dreambooth-lora: exit code 3" in told
    assert "CLUSTER_SPEC: found 'none'" in told
    assert "2 of 4" in told


@pytest.mark.parametrize(
    ("values", "found"), [([0.0, 0.0], "all zero"), ([1.0, float("nan")], "not all numbers"), ([], "0 tensors")]
)
def test_weights_that_no_one_could_use(values: list[float], found: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({"lora_up": torch.tensor(values)} if values else {}, file)
    with pytest.raises(smoke.BrokenError, match=found):
        smoke.check_weights(file)


def test_a_result_needs_weights_and_a_picture(tmp_path: Path) -> None:
    with pytest.raises(smoke.BrokenError, match=r"told of lora\.safetensors, which is not there"):
        smoke.check_result([events.Artifact("lora", str(tmp_path / "lora.safetensors"))], tmp_path)
    with pytest.raises(smoke.BrokenError, match=r"left no \.safetensors"):
        smoke.check_result([], tmp_path)
    save_file({"lora_up": torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(smoke.BrokenError, match="drew no sample"):
        smoke.check_result([], tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.png").touch()
    assert smoke.check_result([], tmp_path) == ": lora.safetensors"
