"""``sdtune convert`` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from sdtune.commands import convert as command
from sdtune.training.components.export import write_diffusers_lora, write_kohya_lora
from sdtune.training.components.import_lora import read_lora
from sdtune.training.components.lora_names import Family
from sdtune.training.components.lora_weights import LoraModule, LoraWeights
from sdtune.training.components.peft_folder import write_peft_lora
from tests.conftest import Command

BLOCK = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture
def convert(sdtune: Command) -> Command:
    """Runs ``sdtune convert``."""
    return partial(sdtune, "convert")


def lora(context: int = 768) -> LoraWeights:
    """Two modules of a UNet, whose cross-attention reads ``context`` numbers per token, and one of a text encoder."""
    torch.manual_seed(2)

    def module(in_features: int, rank: int, alpha: float) -> LoraModule:
        return LoraModule(torch.randn(rank, in_features).half(), torch.randn(8, rank).half(), alpha)

    return {
        "unet": {f"{BLOCK}.attn1.to_q": module(8, 4, 2.0), f"{BLOCK}.attn2.to_k": module(context, 2, 1.5)},
        "text_encoder": {"text_model.encoder.layers.0.mlp.fc2": module(16, 4, 4.0)},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_kohya_lora(lora(), tmp_path / "fox.safetensors", Family.SD1, {}, one_alpha=False)


def test_it_says_what_was_read_and_written(convert: Command, file: Path, tmp_path: Path) -> None:
    code, out, err = convert(file, tmp_path / "peft", "--to", "peft")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"Read {file} (kohya, sd1, float16)",
        "  unet           2 modules, rank 2, 4, alpha 1.5, 2",
        "  text_encoder   1 module, rank 4, alpha 4",
        f"Wrote {tmp_path / 'peft'} (peft, sd1, float16)",
    ]
    assert set(read_lora(tmp_path / "peft")) == {"unet", "text_encoder"}


def test_json_is_one_object(convert: Command, file: Path, tmp_path: Path) -> None:
    code, out, err = convert(file, tmp_path / "a", "--to", "diffusers", "--json")
    line = json.loads(out)
    assert (code, err, line["event"], line["family"]) == (0, "", "conversion", "sd1")
    assert line["source"] == {"path": str(file), "form": "kohya", "dtypes": ["float16"]}
    assert line["target"]["dtypes"] == ["float32"]  # 1.5 / 2 is not exact in half precision
    assert line["parts"][0] == {"name": "unet", "modules": 2, "ranks": [2, 4], "alphas": [1.5, 2.0], "dora": False}


def test_what_diffusers_would_read_wrong_is_pointed_out(convert: Command, file: Path, tmp_path: Path) -> None:
    note = "note: The alphas of its modules differ."
    assert note in convert(file, tmp_path / "a.safetensors", "--to", "kohya")[1]
    assert note not in convert(file, tmp_path / "a", "--to", "diffusers")[1]


def test_nothing_is_overwritten_unasked(convert: Command, file: Path, tmp_path: Path) -> None:
    peft, kohya = tmp_path / "peft", tmp_path / "b.safetensors"
    for target, form in ((peft, "peft"), (kohya, "kohya"), (tmp_path / "a", "diffusers")):
        assert convert(file, target, "--to", form)[0] == 0
        code, _, err = convert(file, target, "--to", form)
        assert code == 2
        assert f"output: {target} is there already; choose another name or add --overwrite." in err
    only_unet = write_diffusers_lora({"unet": lora()["unet"]}, tmp_path / "unet-only").parent
    assert convert(only_unet, peft, "--to", "peft", "--overwrite")[0] == 0
    assert set(read_lora(peft)) == {"unet"}  # no text encoder is left of the first


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_a_folder_with_other_things_is_left_alone(convert: Command, file: Path, tmp_path: Path, form: str) -> None:
    other = tmp_path / "mine" / "unet" / "notes.txt"
    other.parent.mkdir(parents=True)
    other.touch()
    code, _, err = convert(file, tmp_path / "mine", "--to", form, "--overwrite")
    assert code == 2
    first = "unet/notes.txt" if form == "peft" else "unet"
    assert f"mine holds other files, such as {first}; choose a new folder." in err
    assert [path for path in (tmp_path / "mine").rglob("*") if path.is_file()] == [other]


def test_the_source_is_never_replaced(convert: Command, file: Path, tmp_path: Path) -> None:
    folder = write_peft_lora(lora(), tmp_path / "peft")
    for source, form in ((file, "kohya"), (folder, "peft")):
        code, _, err = convert(source, source, "--to", form, "--overwrite", "--dtype", "bf16")
        assert code == 2
        assert "is what is to be converted; choose another name." in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/none", "{tmp}/a", "--to", "peft"], "none does not exist; give a .safetensors file or a folder"),
        (["{tmp}/fox.safetensors", "{tmp}", "--to", "kohya"], "--to kohya writes one file: give a name that ends in"),
        (["{tmp}/fox.safetensors", "{tmp}/a.ckpt", "--to", "kohya"], "give a name that ends in .safetensors"),
        (["{tmp}/fox.safetensors", "{tmp}/b.safetensors", "--to", "peft"], "but --to peft writes a folder"),
        (["{tmp}/fox.safetensors", "{tmp}/notes.txt", "--to", "peft"], "is a file; --to peft writes a folder"),
        (["{tmp}/fox.safetensors", "{tmp}/notes.txt/a", "--to", "peft"], "notes.txt/a cannot be written: Not a dir"),
        (["{tmp}/notes.txt", "{tmp}/a", "--to", "peft"], "not a safetensors file"),
        (["{tmp}", "{tmp}/a", "--to", "peft"], "no LoRA found; wanted pytorch_lora_weights.safetensors, or PEFT's"),
        (
            ["{tmp}/fox.safetensors", "{tmp}/a.safetensors", "--to", "kohya", "--family", "sdxl"],
            "family: found sdxl, but the modules of this LoRA are of sd1.",
        ),
    ],
)
def test_wrong_input_is_one_clear_message(
    convert: Command, file: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "notes.txt").write_text("no LoRA")
    code, out, err = convert(*[word.format(tmp=tmp_path) for word in words])
    assert (code, out) == (2, "")
    assert message in err.replace("\n", " ")
    assert err.startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox.safetensors", "notes.txt"]


def test_the_family_is_asked_for_where_it_cannot_be_told(convert: Command, tmp_path: Path) -> None:
    folder = write_diffusers_lora(lora(context=128), tmp_path / "a").parent
    code, _, err = convert(folder, tmp_path / "b.safetensors", "--to", "kohya")
    assert code == 2
    assert "fit sd1 or sd2 or sdxl, and kohya's form names them by family; give --family sd1|sd2|sdxl." in err
    assert convert(folder, tmp_path / "b.safetensors", "--to", "kohya", "--family", "sd2")[0] == 0
    # what the header says is believed where the modules do not speak against it
    code, out, _ = convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "kohya")
    assert code == 0
    assert "(kohya, sd2, float32)" in out


def test_without_torch_it_says_what_to_install(
    convert: Command, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    code, _, err = convert(file, tmp_path / "a", "--to", "peft")
    assert code == 3
    assert "pip install -e '.[train]'" in err


def test_its_help_loads_no_torch() -> None:
    script = (
        "import sys\nfrom sdtune.cli.app import main\nsys.argv = ['sdtune', 'convert', '--help']\n"
        "try:\n    main()\nfinally:\n    print('LOADED', *sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = ran.stdout.partition("LOADED ")[2].split()
    assert "sdtune.cli.convert" in loaded
    assert not {"torch", "peft", "diffusers", "transformers", "safetensors"} & set(loaded)
