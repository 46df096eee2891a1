"""Nothing that can run code is opened: no pickle, no code of a model's repository, no archive that unpacks itself."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from sdtune.errors import RecipeError, TrainingError
from sdtune.methods.base_models import find_base_model
from sdtune.methods.kohya import KohyaNativeLora
from sdtune.training.components.single_file import read_single_file
from sdtune.training.kohya.base import prepare_base
from tests.conftest import BASE_MODEL, ROOT
from tests.security.command_line import ends_well
from tests.security.test_no_shell import SOURCES, calls

OPENERS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "dill.loads", "cloudpickle.load",
    "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "torch.jit.load", "shutil.unpack_archive",
}  # fmt: skip


def sins(source: str) -> list[str]:
    """The calls of ``source`` that could run what a file holds."""
    found = []
    # yaml.load is as good as its loader.
    safe = {
        node.name for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]
    }  # fmt: skip
    for name, call in calls(source):
        if name == "yaml.load" and len(call.args) == 2 and ast.unparse(call.args[1]) in {"yaml.SafeLoader", *safe}:
            continue
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in OPENERS:
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if "allow_pickle" in given or given.get("trust_remote_code", "False") != "False":
            found.append(f"{name} with allow_pickle or trust_remote_code")
        if name.endswith((".extractall", ".extract")):
            found.append(name)
        if "custom_pipeline" in given:
            found.append(f"{name} with custom_pipeline")
    return found


def test_the_rule_finds_what_it_is_for() -> None:
    for line in (
        "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.loads(data)", "yaml.load(text)",
        "numpy.load(f, allow_pickle=1)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "x.extractall(to)",
    ):  # fmt: skip
        assert sins(line), line
    assert not sins("class Mine(yaml.SafeLoader): ...\nyaml.load(text, Mine)\nyaml.load(text, yaml.SafeLoader)")
    assert sins("class Mine(yaml.Loader): ...\nyaml.load(text, Mine)")
    assert not sins("torch.load(path, weights_only=True)\nyaml.safe_load(text)\npickle.UnpicklingError")


def test_no_code_of_ours_opens_what_can_run_code() -> None:
    found = {str(path.relative_to(ROOT)): sins(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert not {name: lines for name, lines in found.items() if lines}


# --- what is opened, and what is not ----------------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sprung),)


def as_zip(trap: Trap, path: Path) -> None:
    torch.save({"unet.weight": torch.zeros(2), "trap": trap}, path)


def as_old(trap: Trap, path: Path) -> None:
    torch.save({"trap": trap}, path, _use_new_zipfile_serialization=False)


def as_bare(trap: Trap, path: Path) -> None:
    path.write_bytes(pickle.dumps({"trap": trap}))


def as_numpy(trap: Trap, path: Path) -> None:
    with path.open("wb") as stream:
        numpy.save(stream, numpy.array([trap], dtype=object), allow_pickle=True)


SAVES = [as_zip, as_old, as_bare, as_numpy]
Save = Callable[[Trap, Path], None]


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    return tmp_path / "sprung"


@pytest.mark.parametrize("save", SAVES)
def test_the_trap_is_one(save: Save, sprung: Path, tmp_path: Path) -> None:
    save(Trap(sprung), tmp_path / "file")
    with (tmp_path / "file").open("rb") as stream:
        if save is as_numpy:
            numpy.load(stream, allow_pickle=True)
        elif save is as_bare:
            pickle.load(stream)  # noqa: S301
        else:
            torch.load(stream, weights_only=False)
    assert sprung.is_dir()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".safetensors"])
def test_a_base_model_in_one_file(save: Save, suffix: str, sprung: Path, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    save(Trap(sprung), path)
    with pytest.raises(TrainingError, match=r"not a file of weights alone|not a whole safetensors file"):
        read_single_file(path, torch.float32)
    assert not sprung.exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_base_model_for_sd_scripts(suffix: str, sprung: Path, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    as_zip(Trap(sprung), path)
    with pytest.raises(TrainingError):
        prepare_base(KohyaNativeLora.from_settings({"base_model": str(path)}), tmp_path / "work")
    assert not sprung.exists()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.ckpt", "lora.safetensors"])
def test_a_lora_to_convert(save: Save, name: str, sprung: Path, tmp_path: Path) -> None:
    save(Trap(sprung), tmp_path / name)
    ended = ends_well(["convert", str(tmp_path / name), str(tmp_path / "out"), "--to", "diffusers"])
    assert ended.code == 2
    assert name in ended.said
    assert "not a safetensors file" in ended.said
    assert not sprung.exists()


def test_an_adapter_of_peft_to_convert(sprung: Path, tmp_path: Path) -> None:
    folder = tmp_path / "peft" / "unet"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    as_zip(Trap(sprung), folder / "adapter_model.bin")
    ended = ends_well(["convert", str(tmp_path / "peft"), str(tmp_path / "out"), "--to", "kohya"])
    assert ended.code == 2
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["a.png", "metadata.parquet", "metadata.jsonl", "metadata.csv", "a.txt"])
def test_a_dataset(name: str, sprung: Path, pictures: Callable[..., Path]) -> None:
    folder = pictures()
    as_bare(Trap(sprung), folder / name)
    ended = ends_well(["validate", "dreambooth-lora", str(folder)])
    assert ended.code == 2 or name == "a.txt"  # a caption of no picture is a warning
    assert name in ended.said
    assert not sprung.exists()


def test_a_model_that_brings_its_own_pipeline(tmp_path: Path, pictures: Callable[..., Path]) -> None:
    """diffusers would import ``my_pipeline.py`` of such a folder if it were told to trust it."""
    model, sprung = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(BASE_MODEL, model)
    (model / "model_index.json").write_text('{"_class_name": ["my_pipeline", "Mine"], "unet": ["my_unet", "Mine"]}')
    for name in ("my_pipeline.py", "unet/my_unet.py", "pipeline.py"):
        (model / name).write_text(f"import os\nos.mkdir({str(sprung)!r})\nclass Mine: ...\n")
    words = ["train", "dreambooth-lora", "--base-model", str(model), "--dataset", str(pictures()), "--output"]
    ended = ends_well([*words, str(tmp_path / "out"), "--instance-prompt", "x", "--max-train-steps", "1"])
    assert ended.code == 5
    assert "trains Stable Diffusion 1.x, 2.x and XL" in ended.said
    assert not sprung.exists()


def test_archives_are_named_and_not_unpacked(tmp_path: Path, pictures: Callable[..., Path]) -> None:
    folder = pictures()
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.writestr("../../escaped.txt", "x")
        archive.writestr("/tmp/sdtune-escaped.txt", "x")
    ended = ends_well(["validate", "dreambooth-lora", str(folder)])
    assert "more.zip" in ended.said
    assert "is an archive and is not opened" in ended.said
    assert not (tmp_path / "escaped.txt").exists()
    with pytest.raises(RecipeError, match=r"none of \.safetensors, \.ckpt"):
        find_base_model(str(folder / "more.zip"))
