"""Where a setting comes from: typed, the environment, the recipe, sdtune.yaml, gcloud; in this order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from sdtune.errors import RecipeError
from sdtune.jobs import project
from sdtune.jobs.placement import Placement
from sdtune.jobs.project import (
    find_project_file,
    from_environment,
    gcloud_defaults,
    project_file_text,
    read_project_file,
    settled,
)


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of whoever runs the tests."""
    for name in ("CLOUDSDK_CORE_PROJECT", "GOOGLE_CLOUD_PROJECT", "CLOUDSDK_AI_REGION", "CLOUDSDK_ACTIVE_CONFIG_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))


def test_the_nearest_layer_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "from-gcloud")
    layers = [
        {"gpu": "typed"},
        {"gpu": "recipe", "image": "recipe"},
        {"gpu": "file", "image": "file", "network": "file"},
    ]
    assert settled(["gpu", "image", "network", "project"], *layers) == {
        "gpu": "typed", "image": "recipe", "network": "file", "project": "from-gcloud",
    }  # fmt: skip
    monkeypatch.setenv("SDTUNE_IMAGE", "environment")
    monkeypatch.setenv("SDTUNE_GPU", "environment")
    found = settled(["gpu", "image"], *layers)
    assert found == {"gpu": "typed", "image": "environment"}


def test_variables_with_several_values_have_a_line_for_each() -> None:
    found = from_environment(
        ["labels", "region", "gpu"], {"SDTUNE_LABELS": "a=b\nc=d", "SDTUNE_REGION": "x1,y2", "SDTUNE_GPU": ""}
    )
    assert found == {"labels": ["a=b", "c=d"], "region": "x1,y2"}


def test_gclouds_own_configuration_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "gcloud"
    (folder / "configurations").mkdir(parents=True)
    (folder / "active_config").write_text("work\n")
    (folder / "configurations" / "config_work").write_text(
        "[core]\nproject = my-project\naccount = 100%@x.y\n[ai]\nregion = europe-west4\n[compute]\nregion = us-east1\n"
    )
    environment = {"CLOUDSDK_CONFIG": str(folder)}
    assert gcloud_defaults(environment) == {"project": "my-project", "region": "europe-west4"}
    assert gcloud_defaults(environment | {"CLOUDSDK_CORE_PROJECT": "other"})["project"] == "other"
    (folder / "configurations" / "config_work").write_text("no section\n")
    assert gcloud_defaults(environment) == {}
    assert gcloud_defaults({"CLOUDSDK_CONFIG": str(tmp_path / "nowhere")}) == {}


def test_the_file_of_a_folder_above_counts(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "sdtune.yaml").write_text("gpu: l4\n")
    assert find_project_file(tmp_path / "a" / "b") == tmp_path / "sdtune.yaml"
    (tmp_path / "a" / "sdtune.yaml").write_text("gpu: t4\n")
    assert find_project_file(tmp_path / "a" / "b") == tmp_path / "a" / "sdtune.yaml"


def test_a_line_that_nobody_would_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sdtune.yaml"
    file.write_text("backend: vertex\nrank: 4\n")
    with pytest.raises(RecipeError, match="found 'rank', which is not a setting of a project"):
        read_project_file(file, more=("backend",))
    file.write_text("backend: vertex\ngpu: l4\n")
    assert read_project_file(file, more=("backend",)) == {"backend": "vertex", "gpu": "l4"}
    assert read_project_file(None) == {}


def test_the_file_that_init_writes_shows_every_setting_and_each_may_be_switched_on() -> None:
    text = project_file_text({"project": "my-project", "region": ["us-east1"]})
    assert yaml.safe_load(text) == {"project": "my-project", "region": ["us-east1"]}
    commented = [line.removeprefix("#") for line in text.splitlines() if re.match(r"#\S|# *- |#  ", line)]
    shown = yaml.safe_load("\n".join(commented))
    needed = {
        "network": "projects/1/global/networks/n", "strategy": "flex-start", "nfs": ["1.2.3.4:/v=m"],
        "service_account": "a@b.c", "project": "my-project",
    }  # fmt: skip
    assert {*shown, "project", "region"} == {*Placement.model_fields, "backend"}
    for name in Placement.model_fields:
        if name in shown:
            # Each line may be switched on, alone or with what it needs.
            assert Placement.from_settings({**needed, name: shown[name]}), name


def test_a_file_of_somebody_else_above_the_folder_is_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write to /tmp could otherwise say which bucket the files of a folder in it are uploaded to."""
    mine, shared = tmp_path / "shared" / "mine", tmp_path / "shared"
    mine.mkdir(parents=True)
    theirs = shared / "sdtune.yaml"
    theirs.write_text("bucket: gs://their-bucket\n")
    owners = {theirs: 2000, mine: 1000, shared: 0}
    monkeypatch.setattr(project, "_owner", owners.__getitem__)
    monkeypatch.setattr(project, "_user", lambda: 1000)
    for folder in (mine, shared):
        with pytest.raises(RecipeError, match=r"sdtune.yaml: belongs neither to you nor to whom .* belongs"):
            find_project_file(folder)
    # In a checkout of theirs it is what was meant, and so it is where an administrator has put it.
    owners[mine] = 2000
    assert find_project_file(mine) == theirs
    owners |= {mine: 1000, theirs: 0}
    assert find_project_file(mine) == theirs
    owners[theirs] = 1000
    assert find_project_file(mine) == theirs
