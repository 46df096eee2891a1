"""What a base model's name tells before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtune.errors import RecipeError
from sdtune.methods.base_models import find_base_model
from tests.conftest import BASE_MODEL


def test_a_folder_tells_its_resolution() -> None:
    found = find_base_model(str(BASE_MODEL))
    assert (found.path, found.resolution) == (BASE_MODEL.resolve(), 128)


def test_a_hub_id_is_taken_as_it_is() -> None:
    found = find_base_model("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert (found.path, found.resolution) == (None, None)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at all", "just-a-name", "a/b/c", "../up"])
def test_what_is_neither_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"no folder .* here, and it is no Hugging Face id"):
        find_base_model(name)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"without model_index\.json; wanted the folder of a whole diffusers"):
        find_base_model(str(tmp_path))


def test_a_pipeline_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(RecipeError, match="is the copy of the model whole"):
        find_base_model(str(tmp_path))


def test_a_checkpoint_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    found = find_base_model(str(tmp_path / "model.safetensors"))
    assert (found.path, found.resolution) == (tmp_path / "model.safetensors", None)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_text("")
    with pytest.raises(RecipeError, match=r"is a file, but none of \.safetensors, \.ckpt; wanted a diffusers folder"):
        find_base_model(str(tmp_path / "model.zip"))
