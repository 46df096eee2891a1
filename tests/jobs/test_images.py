"""What an image is built from, and what it is called."""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path

import pytest
import yaml

import sdtune
from sdtune.errors import ProjectError, RecipeError
from sdtune.jobs.images import (
    CONTAINERS,
    BuildSettings,
    Source,
    bucket_of,
    find_source,
    pinned_bases,
    plan_image,
    record_bases,
)
from sdtune.jobs.placement import Placement
from sdtune.methods.settings import read_settings
from tests.conftest import ROOT

PLACEMENT = Placement(project="my-project")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout's containers and examples, with what does not belong there."""
    for name, text in {
        "containers/diffusers/Dockerfile": "FROM scratch",
        "containers/diffusers/requirements.txt": "torch==2",
        "containers/diffusers/.cache": "x",
        "containers/kohya/Dockerfile": "FROM scratch AS kohya",
        "examples/base-model/unet/config.json": "{}",
        "examples/base-model/unet/model.safetensors": "weights",
        "examples/base-model/README.md": "for people",
        "examples/base-model/grid.png": "for people",
        "examples/datasets/toy/1.jpg": "d",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def names(source: Source) -> list[str]:
    return [name for name, _ in source.files]


def test_the_source_is_what_trains_and_nothing_else(root: Path) -> None:
    found = names(find_source("diffusers", root))
    assert found == sorted(found)
    assert {name for name in found if not name.startswith("src/sdtune/")} == {
        "containers/diffusers/Dockerfile",
        "containers/diffusers/requirements.txt",
        "examples/base-model/unet/config.json",
        "examples/base-model/unet/model.safetensors",
    }
    wing = {name.split("/")[2] for name in found if name.startswith("src/sdtune/")}
    assert wing == {"__init__.py", "errors.py", "events.py", "methods", "training"}
    # Read as bytes when the trainer starts without a network.
    assert "src/sdtune/training/configs/clip/merges.txt.gz" in found
    assert not [name for name in found if "__pycache__" in name]


def test_a_notebooks_image_gets_what_sends_jobs_too(root: Path) -> None:
    found = names(find_source("diffusers", root, "workbench"))
    wing = {name.split("/")[2] for name in found if name.startswith("src/sdtune/")}
    assert wing > {"__init__.py", "methods", "training", "api", "backends", "cli", "commands", "jobs", "__main__.py"}
    assert "src/sdtune/api/training.py" in found
    assert plan_image("diffusers", "workbench", PLACEMENT, root).source.digest != find_source("diffusers", root).digest


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_checkout_has_all_that_the_dockerfile_copies(container: str) -> None:
    found = names(find_source(container, ROOT, "workbench"))
    dockerfile = (ROOT / "containers" / container / "Dockerfile").read_text().replace("\\\n", " ")
    copied = [
        word
        for words in re.findall(r"^COPY (?!.*--from)(.*)$", dockerfile, re.MULTILINE)
        for word in words.split()[:-1]
        if not word.startswith("--")
    ]
    copied += re.findall(r"--mount=type=bind,source=([^,\s]+)", dockerfile)
    assert "src/sdtune/training" in copied
    absent = [word for word in copied if word not in found and not any(n.startswith(f"{word}/") for n in found)]
    assert not absent
    assert "examples/base-model/unet/diffusion_pytorch_model.safetensors" in found


def test_the_same_files_are_packed_into_the_same_bytes(root: Path) -> None:
    once = find_source("diffusers", root)
    packed, digest = once.pack(), once.digest
    for name, path in once.files:
        if name.startswith(("containers", "examples")):
            os.utime(path, (1, 1))
            path.chmod(0o755)
    again = find_source("diffusers", root)
    assert again.pack() == packed
    assert again.digest == digest

    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == names(once)
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        first = archive.extractfile("containers/diffusers/Dockerfile")
        assert first
        assert first.read() == b"FROM scratch"
    assert packed[4:8] == b"\0\0\0\0"  # gzip's own time


def test_another_content_or_another_name_is_another_source(root: Path) -> None:
    digests = {find_source("diffusers", root).digest, find_source("kohya", root).digest}
    lock = root / "containers/diffusers/requirements.txt"
    lock.write_text("torch==3")
    digests.add(find_source("diffusers", root).digest)
    lock.rename(lock.with_name("lock.txt"))
    digests.add(find_source("diffusers", root).digest)
    assert len(digests) == 4


def test_bases_with_a_known_digest_are_pinned_and_part_of_the_source(root: Path) -> None:
    assert plan_image("diffusers", "train", PLACEMENT, root).bases == {}
    before = find_source("diffusers", root).digest
    bases = {"BASE": {"tag": "python:3", "digest": "sha256:01"}, "WORKBENCH_BASE": {"tag": "workbench:1", "digest": ""}}
    (root / "containers/base-images.yaml").write_text(yaml.safe_dump(bases))
    image = plan_image("diffusers", "train", PLACEMENT, root)
    assert image.bases == {"BASE": "python:3@sha256:01"}
    assert image.source.digest != before


def test_the_digest_of_a_base_is_noted_once_where_a_checkout_does_not_know_it(root: Path) -> None:
    file = root / "containers" / "base-images.yaml"
    file.write_text('# kept\nBASE:\n  tag: python:3\n  digest: ""\nOTHER:\n  tag: x/y:1\n  digest: sha256:00\n')
    used = ["docker.io/library/python:3@sha256:01", "x/y:1@sha256:02", "z:1@sha256:03"]
    assert record_bases(used, root) == ["python:3@sha256:01"]
    assert pinned_bases(root) == {"BASE": "python:3@sha256:01", "OTHER": "x/y:1@sha256:00"}
    assert file.read_text().startswith("# kept\n")
    assert record_bases(used, root) == []


def test_what_an_installed_package_carries_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "sources" / "containers" / "base-images.yaml"
    file.parent.mkdir(parents=True)
    file.write_text('BASE:\n  tag: python:3\n  digest: ""\n')
    assert record_bases(["python:3@sha256:01"], tmp_path / "sources") == []
    assert '""' in file.read_text()


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_bases_are_those_of_the_dockerfiles(container: str) -> None:
    dockerfile = (ROOT / "containers" / container / "Dockerfile").read_text()
    for name, base in read_settings(ROOT / "containers/base-images.yaml", "bases").items():
        assert f"ARG {name}={base['tag']}\n" in dockerfile or f"ARG {name}" not in dockerfile
    assert set(pinned_bases(ROOT)) <= {"BASE", "COMPILER_BASE", "WORKBENCH_BASE"}


def test_the_name_is_the_one_that_jobs_run(root: Path) -> None:
    image = plan_image("diffusers", "train", PLACEMENT, root)
    assert f"{image.address}:{sdtune.__version__}" == PLACEMENT.image_of("diffusers")
    assert image.tags == (f"{sdtune.__version__}-{image.source.digest[:12]}", sdtune.__version__, "latest")
    assert image.uri == f"us-central1-docker.pkg.dev/my-project/sdtune/sdtune-diffusers:{image.tag}"
    # An image of one's own for jobs does not say where sdtune's are built to.
    other = PLACEMENT.model_copy(update={"image": "docker.io/me/mine:1"})
    assert plan_image("diffusers", "train", other, root).uri == image.uri
    assert plan_image("kohya", "workbench", PLACEMENT, root).address.endswith("/sdtune/sdtune-kohya-workbench")


def test_an_unknown_image_and_an_installation_without_sources_are_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no image 'difusers'; there are: diffusers, kohya"):
        plan_image("difusers", "train", PLACEMENT, root)
    with pytest.raises(ProjectError, match=r"Dockerfile is not there.*install sdtune anew"):
        plan_image("diffusers", "train", PLACEMENT, tmp_path / "nothing")


def test_settings_are_taken_as_people_spell_them_and_all_mistakes_are_told() -> None:
    settings = BuildSettings.from_settings({"machine_type": "e2-highcpu-32", "disk_gb": "300", "timeout": "90m"})
    assert (settings.machine_type, settings.disk_gb, settings.timeout) == ("E2_HIGHCPU_32", 300, 5400)
    with pytest.raises(RecipeError) as raised:
        BuildSettings.from_settings(
            {"machine_type": "n2-standard-4", "disk_gb": "5000", "timeout": "2w", "service_account": "me"}
        )
    told = str(raised.value)
    assert "these 4 settings cannot be used" in told
    assert "wanted E2_HIGHCPU_8 or E2_HIGHCPU_32" in told
    assert "at most 4000" in told
    assert "wanted a duration such as 90m" in told
    assert "wanted NAME@PROJECT.iam.gserviceaccount.com" in told


def test_the_bucket_is_the_projects_or_one_that_can_be_made() -> None:
    assert bucket_of(Placement(project="my-project")) == "gs://my-project-sdtune"
    # A dot in a bucket's name asks for the proof that one owns the domain.
    assert bucket_of(Placement(project="example.com:my-project")) == "gs://example-com-my-project-sdtune"
    assert bucket_of(Placement(project="my-project", bucket="gs://shared/folder")) == "gs://shared/folder"
