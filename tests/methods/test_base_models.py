"""What a base model's name tells before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sdtune.errors import RecipeError
from sdtune.methods import base_models
from sdtune.methods.base_models import MOVED, files_to_load, find_base_model
from tests.conftest import BASE_MODEL


def test_a_folder_tells_its_resolution() -> None:
    found = find_base_model(str(BASE_MODEL))
    assert (found.path, found.resolution) == (BASE_MODEL.resolve(), 128)


def test_a_hub_id_is_taken_as_it_is() -> None:
    found = find_base_model("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert (found.path, found.resolution) == (None, None)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at all", "just-a-name", "a/b/c", "../up", "x" * 5000, "~nobody/x", "a\0/b"]
)
def test_what_is_neither_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"no folder or file .* here, and it is neither a Hugging Face id"):
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


def test_a_link_keeps_the_suffix_that_tells_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "model.ckpt").symlink_to("blob")
    assert find_base_model(str(tmp_path / "model.ckpt")).path == tmp_path / "model.ckpt"


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_text("")
    with pytest.raises(RecipeError, match=r"is a file, but none of \.safetensors, \.ckpt; wanted a diffusers folder"):
        find_base_model(str(tmp_path / "model.zip"))


def test_an_id_that_was_taken_away_is_told_and_replaced() -> None:
    found = find_base_model("runwayml/stable-diffusion-v1-5")
    assert (found.name, found.path) == ("stable-diffusion-v1-5/stable-diffusion-v1-5", None)
    assert found.note == (
        "base_model: runwayml/stable-diffusion-v1-5 is no longer on Hugging Face; "
        "its copy stable-diffusion-v1-5/stable-diffusion-v1-5 is used."
    )
    assert not {find_base_model(name).name for name in MOVED} & set(MOVED)
    assert find_base_model("runwayml/stable-diffusion-inpainting").note is None


def test_a_folder_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runwayml" / "stable-diffusion-v1-5"
    shutil.copytree(BASE_MODEL, folder)
    monkeypatch.chdir(tmp_path)
    found = find_base_model("runwayml/stable-diffusion-v1-5")
    assert (found.path, found.note, found.resolution) == (folder, None, 128)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("gs://bucket/a/sd.safetensors", "gs://bucket/a/sd.safetensors"),
        ("gs://bucket/sd-1.5/", "gs://bucket/sd-1.5"),
        ("gs://bucket", "gs://bucket"),
        ("/gcs/bucket/sd", "gs://bucket/sd"),
    ],
)
def test_of_a_bucket_the_name_is_all_that_is_told(name: str, address: str) -> None:
    found = find_base_model(name)
    assert (found.name, found.path, found.resolution) == (address, None, None)


@pytest.mark.parametrize("name", ["gs://", "gs:///x", "gs://B/x", "/gcs/", "/gcs/gs://bucket/x"])
def test_what_no_bucket_can_be_called_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="is no place in Cloud Storage; wanted gs://bucket/path"):
        find_base_model(name)


def test_a_mounted_bucket_is_a_folder_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_models, "MOUNT", str(tmp_path / "gcs"))
    shutil.copytree(BASE_MODEL, tmp_path / "gcs" / "bucket" / "sd")
    found = find_base_model(str(tmp_path / "gcs" / "bucket" / "sd"))
    assert (found.name, found.path) == (str(found.path), tmp_path / "gcs" / "bucket" / "sd")
    assert found.resolution == 128
    assert find_base_model(str(tmp_path / "gcs" / "bucket" / "other")).name == "gs://bucket/other"


@pytest.mark.parametrize("name", [str(BASE_MODEL), "gs://bucket/sd", "/gcs/bucket/sd.safetensors"])
def test_only_an_id_has_revisions(name: str) -> None:
    assert find_base_model("someone/model", "v2").name == "someone/model"
    with pytest.raises(
        RecipeError, match=r"revision: found 'v2', but .* is no Hugging Face id, so it has none; drop it"
    ):
        find_base_model(name, "v2")


def test_of_a_published_model_only_what_is_read_is_fetched() -> None:
    """The files of stable-diffusion-v1-5, as its owner lists them, and of one with sharded and pickled weights."""
    read = [
        "feature_extractor/preprocessor_config.json", "model_index.json", "scheduler/scheduler_config.json",
        "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    more = [
        ".gitattributes", "README.md", "v1-5-pruned.safetensors", "v1-5-pruned-emaonly.ckpt", "v1-inference.yaml",
        "safety_checker/config.json", "safety_checker/model.safetensors", "text_encoder/pytorch_model.bin",
        "text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
    ]  # fmt: skip
    assert files_to_load("sd", [*more, *read]) == read
    shards = [f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    shards += ["unet/diffusion_pytorch_model.safetensors.index.json"]
    pickled = ["vae/diffusion_pytorch_model.bin", "text_encoder_2/config.json", "text_encoder_2/pytorch_model.bin"]
    other = [name for name in read if not name.endswith("pytorch_model.safetensors")] + shards + pickled
    assert files_to_load("sd", other) == sorted(other)
    with pytest.raises(RecipeError, match="sd has no weights in text_encoder_2/"):
        files_to_load("sd", other[:-1])
