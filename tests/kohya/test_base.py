"""What sd-scripts would make of a base model: told, refused or mended before it is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from sdtune.errors import RecipeError, SdtuneError, TrainingError
from sdtune.methods.kohya import KohyaNativeLora
from sdtune.training.components.lora_weights import Family
from sdtune.training.kohya.base import CLIP_L, OPEN_CLIP_G, OPEN_CLIP_H, TOKENIZERS, KohyaBase, prepare_base
from sdtune.training.kohya.shape import Shape

SD_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
}
SDXL_UNET = SD_UNET | {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
}


def model(
    folder: Path,
    unet: dict[str, Any] = SD_UNET,
    scheduler: dict[str, Any] | None = None,
    kind: str = "StableDiffusionPipeline",
    scaling_factor: float = 0.18215,
    vae: dict[str, Any] | None = None,
    layers: int = 12,
) -> Path:
    """A diffusers folder with configurations, tokenizers and a text encoder, all that is looked at."""
    tokenizers = ["tokenizer", "tokenizer_2"] if "XL" in kind else ["tokenizer"]
    for name in ("unet", "vae", "scheduler", "text_encoder", *tokenizers):
        (folder / name).mkdir(parents=True)
    write(folder / "model_index.json", {"_class_name": kind})
    write(folder / "unet" / "config.json", unet)
    write(folder / "vae" / "config.json", {"scaling_factor": scaling_factor, **(vae or {})})
    write(folder / "scheduler" / "scheduler_config.json", scheduler or {})
    write(folder / "text_encoder" / "config.json", {"num_hidden_layers": layers})
    save_file({"text_model.encoder.x": torch.ones(2)}, folder / "text_encoder" / "model.safetensors")
    for name in tokenizers:
        write(folder / name / "vocab.json", {"a": 0})
        (folder / name / "merges.txt").write_text("#version: 0.2\n")
    return folder


def write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def prepared(folder: Path, work: Path, **settings: Any) -> KohyaBase:
    return prepare_base(KohyaNativeLora(base_model=str(folder), **settings), work)


def test_families(tmp_path: Path) -> None:
    v = {"prediction_type": "v_prediction"}
    one = prepared(model(tmp_path / "1"), tmp_path / "work1")
    two = prepared(
        model(tmp_path / "2", SD_UNET | {"cross_attention_dim": 1024, "sample_size": 96}, v), tmp_path / "w2"
    )
    xl = prepared(model(tmp_path / "x", SDXL_UNET, None, "StableDiffusionXLPipeline", 0.13025), tmp_path / "w3")
    assert [(base.family, base.v_parameterization, base.resolution) for base in (one, two, xl)] == [
        (Family.SD1, False, 512), (Family.SD2, True, 768), (Family.SDXL, False, 1024),
    ]  # fmt: skip
    laid = [sorted(path.name for path in base.tokenizers.iterdir()) for base in (one, two, xl)]
    assert laid == [[CLIP_L], [OPEN_CLIP_H], sorted([CLIP_L, OPEN_CLIP_G])]
    assert one.path == (tmp_path / "1").resolve()


def test_the_shape_of_stable_diffusion_is_told_as_sd_scripts_has_it(tmp_path: Path) -> None:
    """What library/original_unet.py says at the pinned commit."""
    shape = prepared(model(tmp_path / "1"), tmp_path / "work").shape
    assert shape == Shape(
        {
            "BLOCK_OUT_CHANNELS": [320, 640, 1280, 1280],
            "TIMESTEP_INPUT_DIM": 320,
            "TIME_EMBED_DIM": 1280,
            "TIME_EMBED_FLIP_SIN_TO_COS": True,
            "TIME_EMBED_FREQ_SHIFT": 0,
            "LAYERS_PER_BLOCK": 2,
            "LAYERS_PER_BLOCK_UP": 3,
            "NORM_GROUPS": 32,
            "NORM_EPS": 1e-5,
            "TRANSFORMER_NORM_NUM_GROUPS": 32,
            "DOWN_BLOCK_TYPES": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "UP_BLOCK_TYPES": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
        vae_scale_factor=0.18215,
        bucket_steps=64,
    )


def test_the_shape_of_the_shipped_model_is_its_own(tmp_path: Path) -> None:
    base = prepared(Path(__file__).parents[2] / "examples" / "base-model", tmp_path)
    assert (base.resolution, base.shape.vae_scale_factor, base.shape.bucket_steps) == (128, 0.4357, 16)
    told = base.shape.unet_constants
    assert (told["BLOCK_OUT_CHANNELS"], told["TIME_EMBED_DIM"], told["NORM_GROUPS"]) == ([80, 96], 256, 16)
    assert (told["LAYERS_PER_BLOCK"], told["LAYERS_PER_BLOCK_UP"]) == (1, 2)
    assert told["UP_BLOCK_TYPES"] == ["CrossAttnUpBlock2D"] * 2


def test_sdxl_and_files_are_left_as_sd_scripts_has_them(tmp_path: Path) -> None:
    folder = model(tmp_path / "x", SDXL_UNET, None, "StableDiffusionXLPipeline", 0.13025)
    assert prepared(folder, tmp_path / "work").shape == Shape({}, None, 64)


def test_a_setting_wins_over_the_scheduler(tmp_path: Path) -> None:
    assert prepared(model(tmp_path / "1"), tmp_path / "work", v_parameterization=True).v_parameterization


@pytest.mark.parametrize(
    ("changes", "settings", "error", "words"),
    [
        ({"unet": SDXL_UNET | {"block_out_channels": [80, 96]}, "kind": "StableDiffusionXLPipeline"}, {}, TrainingError,
         "has block_out_channels [80, 96]; sd-scripts builds [320, 640, 1280], whatever the model says"),
        ({"unet": SD_UNET | {"up_block_types": ["AttnUpBlock2D"] * 4}}, {}, TrainingError,
         "has up_block_types AttnUpBlock2D; sd-scripts builds CrossAttnUpBlock2D or UpBlock2D"),
        ({"unet": SD_UNET | {"layers_per_block": [1, 2, 2, 2]}}, {}, TrainingError,
         "has layers_per_block [1, 2, 2, 2]; sd-scripts builds one number for all blocks"),
        ({"unet": SD_UNET | {"transformer_layers_per_block": 2}}, {}, TrainingError, "transformer_layers_per_block 2"),
        ({"unet": SD_UNET | {"block_out_channels": [320] * 5}}, {}, TrainingError, "builds at most 4, unless each has"),
        ({"vae": {"latent_channels": 16}}, {}, TrainingError, "the VAE of .* has latent_channels 16"),
        ({"vae": {"block_out_channels": [32, 64]}}, {}, TrainingError, "VAE of .* has block_out_channels [32, 64]"),
        ({"unet": SD_UNET | {"in_channels": 9}}, {}, TrainingError, "the UNet of .* has in_channels 9"),
        ({"unet": SDXL_UNET, "kind": "StableDiffusionXLPipeline"}, {}, TrainingError,
         "VAE of .* has scaling_factor 0.18215; sd-scripts builds 0.13025"),
        ({"scheduler": {"beta_schedule": "linear"}}, {}, TrainingError, "schedule of .* has beta_schedule linear"),
        ({"kind": "FluxPipeline"}, {}, TrainingError, "is a FluxPipeline; kohya-native-lora trains"),
        ({"unet": SDXL_UNET, "kind": "StableDiffusionXLPipeline", "scaling_factor": 0.13025, "layers": 3}, {},
         TrainingError, "the text encoder of .* has num_hidden_layers 3; sd-scripts builds 12"),
        ({"layers": 3}, {"clip_skip": 4}, RecipeError, "clip_skip: found 4, but this text encoder has 3 layers"),
        ({}, {"zero_terminal_snr": True}, RecipeError, "zero_terminal_snr: .* predicts the noise"),
        (
            {"unet": SDXL_UNET, "kind": "StableDiffusionXLPipeline", "scaling_factor": 0.13025},
            {"clip_skip": 2}, RecipeError, "clip_skip: found 2, but SDXL",
        ),
    ],
)  # fmt: skip
def test_what_sd_scripts_would_train_wrongly_is_refused(
    changes: dict[str, Any], settings: dict[str, Any], error: type[SdtuneError], words: str, tmp_path: Path
) -> None:
    import re

    with pytest.raises(error, match=re.sub(r"[\[\]]", lambda bracket: "\\" + bracket[0], words)):
        prepared(model(tmp_path / "model", **changes), tmp_path / "work", **settings)


def test_a_text_encoder_with_new_names_gets_the_old_ones(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    save_file({"encoder.x": torch.ones(2)}, folder / "text_encoder" / "model.safetensors")
    base = prepared(folder, tmp_path / "work")
    assert base.path != folder.resolve()
    assert list(load_file(base.path / "text_encoder" / "model.safetensors")) == ["text_model.encoder.x"]
    assert (base.path / "unet" / "config.json").is_file()
    assert list(load_file(folder / "text_encoder" / "model.safetensors")) == ["encoder.x"]


def test_a_tokenizer_in_one_file_is_taken_apart(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(TrainingError, match=r"tokenizer/ has no vocab.json and merges.txt"):
        prepared(folder, tmp_path / "work")
    merges = [["a", "b</w>"], "c d"]
    write(folder / "tokenizer" / "tokenizer.json", {"model": {"vocab": {"ä": 0}, "merges": merges}})
    base = prepared(folder, tmp_path / "again")
    assert (base.tokenizers / CLIP_L / "merges.txt").read_text() == "#version: 0.2\na b</w>\nc d\n"
    assert json.loads((base.tokenizers / CLIP_L / "vocab.json").read_text(encoding="utf-8")) == {"ä": 0}


def single_file(file: Path, width: int, metadata: dict[str, str] | None = None) -> Path:
    """As much of a checkpoint as its family is told by. width: of the text that the UNet reads."""
    block = "4.1" if width == 2048 else "1.1"
    unet = "model.diffusion_model.input_blocks"
    tensors = {
        f"{unet}.0.0.weight": torch.ones(320, 4, 3, 3),
        f"{unet}.{block}.transformer_blocks.0.attn2.to_k.weight": torch.ones(1, width),
    }
    save_file(tensors, file, metadata)
    return file


@pytest.mark.parametrize(
    ("width", "metadata", "settings", "expected"),
    [
        (768, {}, {}, (Family.SD1, False, 512)),
        (2048, {}, {}, (Family.SDXL, False, 1024)),
        (1024, {"modelspec.prediction_type": "v"}, {}, (Family.SD2, True, 768)),
        (1024, {}, {"v_parameterization": False}, (Family.SD2, False, 512)),
    ],
)
def test_single_files(
    width: int, metadata: dict[str, str], settings: dict[str, Any], expected: tuple[Family, bool, int], tmp_path: Path
) -> None:
    base = prepared(single_file(tmp_path / "model.safetensors", width, metadata), tmp_path / "work", **settings)
    assert (base.family, base.v_parameterization, base.resolution) == expected
    for wanted in TOKENIZERS[base.family].values():
        vocabulary = json.loads((base.tokenizers / wanted / "vocab.json").read_text(encoding="utf-8"))
        assert len(vocabulary) == 49408
        tokenizer = CLIPTokenizer.from_pretrained(base.tokenizers / wanted)
        assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_single_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not say what it predicts"):
        prepared(single_file(tmp_path / "model.safetensors", 1024), tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    with pytest.raises(TrainingError, match="can run code"):
        prepared(tmp_path / "model.ckpt", tmp_path)
