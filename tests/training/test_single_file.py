"""Single-file checkpoints: the names of the published models, the way there and back, what is refused, and why."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdtune.errors import TrainingError
from sdtune.training.components.lora_weights import Family
from sdtune.training.components.single_file import config_folder, detect_family, read_single_file
from sdtune.training.components.single_file_names import PREFIXES
from sdtune.training.components.single_file_write import layout, write_single_file
from tests.conftest import BASE_MODEL

FAMILIES = list(Family)
CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
# Names and shapes of whole checkpoints, one per line. Made by converting models of the published shapes with the
# functions of kohya-ss/sd-scripts (model_util, sdxl_model_util) under transformers 4.54; those of diffusers'
# scripts/convert_diffusers_to_original_*.py gave the same, but for SDXL's logit_scale, which they leave out.
GOLDEN = Path(__file__).parent / "goldens" / "single_file.txt.gz"
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


@cache
def golden(family: Family) -> dict[str, list[int]]:
    lines = (line.split(" ") for line in gzip.decompress(GOLDEN.read_bytes()).decode().splitlines())
    return {name: [int(side) for side in shape.split("x") if side] for of, name, shape in lines if of == family}


def settings_of(family: Family) -> dict[str, dict[str, Any]]:
    folder = config_folder(family)
    return {component: json.loads((folder / component / "config.json").read_text()) for component in PREFIXES[family]}


def build(component: str, settings: Mapping[str, Any]) -> nn.Module:
    if component in ("unet", "vae"):
        return CLASSES[component].from_config(settings)
    return CLASSES[component](CLIPTextConfig(**settings)).eval()


@cache
def real_models(family: Family) -> dict[str, nn.Module]:
    """The parts in their published shapes, without memory for their weights."""
    with torch.device("meta"):
        return {component: build(component, settings) for component, settings in settings_of(family).items()}


@cache
def narrow(family: Family) -> dict[str, dict[str, Any]]:
    """The shipped settings with the same blocks, made narrow."""
    settings = settings_of(family)
    text = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "vocab_size": 60,
        "projection_dim": 32,
    }
    settings["text_encoder"] |= text
    settings["vae"] |= {"block_out_channels": [8, 16, 16, 24], "norm_num_groups": 8}
    levels = len(settings["unet"]["block_out_channels"])
    settings["unet"] |= {
        "block_out_channels": [8, 16, 24, 24][:levels],
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    }
    if family is Family.SDXL:
        settings["text_encoder_2"] |= text | {"hidden_size": 48, "projection_dim": 40}
        settings["unet"] |= {"cross_attention_dim": 80, "addition_time_embed_dim": 8}
        settings["unet"] |= {"projection_class_embeddings_input_dim": 40 + 6 * 8}
    return settings


@cache
def narrow_parts(family: Family) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {component: build(component, settings) for component, settings in narrow(family).items()}


@pytest.fixture
def config(tmp_path: Path) -> Callable[[Family], Path]:
    """Makes the shipped folder of a family, with the narrow settings."""

    def make(family: Family) -> Path:
        folder = shutil.copytree(config_folder(family), tmp_path / f"config-{family}")
        for component, settings in narrow(family).items():
            (folder / component / "config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a narrow checkpoint, in float32 unless told."""

    def make(family: Family, name: str = "model.safetensors", **options: Any) -> Path:
        parts = {**narrow_parts(family), **options.pop("parts", {})}
        return write_single_file(parts, tmp_path / name, family, **{"dtype": torch.float32, **options})

    return make


def bare_file(path: Path, shapes: Mapping[str, list[int]], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of these shapes whose data are a hole in the disk."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    os.truncate(path, 8 + len(encoded) + end)
    return path


def assert_same(read: Mapping[str, Any], written: Mapping[str, nn.Module]) -> None:
    for component, model in written.items():
        weights, expected = read[component].state_dict(), model.state_dict()
        assert weights.keys() == expected.keys()
        for key, weight in expected.items():
            assert torch.equal(weights[key], weight), f"{component} {key}"


# --- the published models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_published_models(family):
    written = {name: list(source.shape) for name, source in layout(real_models(family), family).items()}
    assert written == golden(family)


def test_some_names_spelled_out():
    sd1, sd2, sdxl = (golden(family) for family in FAMILIES)
    assert [len(names) for names in (sd1, sd2, sdxl)] == [1130, 1214, 2514]
    assert sd1["model.diffusion_model.output_blocks.2.1.conv.weight"] == [1280, 1280, 3, 3]
    assert sd1["model.diffusion_model.output_blocks.5.2.conv.weight"] == [1280, 1280, 3, 3]
    assert sd1["first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"] == [128, 256, 1, 1]
    assert sd1["first_stage_model.encoder.mid.attn_1.proj_out.weight"] == [512, 512, 1, 1]
    assert sd1["cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight"] == [3072, 768]
    assert sd2["cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight"] == [3072, 1024]
    assert not any(".resblocks.23." in name for name in sd2)
    assert sdxl["model.diffusion_model.label_emb.0.0.weight"] == [1280, 2816]
    assert sdxl["model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_k.weight"] == [1280, 2048]
    assert sdxl["conditioner.embedders.1.model.text_projection"] == [1280, 1280]
    assert sdxl["conditioner.embedders.1.model.logit_scale"] == []


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        (Family.SD1, {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        (Family.SD2, {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            Family.SDXL,
            {
                "unet": 2_567_463_684,
                "vae": 83_653_863,
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
            },
        ),
    ],
)
def test_shipped_settings_make_models_of_the_published_sizes(family, counts):
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in real_models(family).items()} == counts


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_detected_by_the_header(family, tmp_path):
    assert detect_family(bare_file(tmp_path / "model.safetensors", golden(family))) is family


REAL = {family: golden(family) for family in FAMILIES}
UNET = {name: shape for name, shape in REAL[Family.SD1].items() if name.startswith("model.diffusion_model.")}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (REAL[Family.SD1] | {CONV_IN: [320, 9, 3, 3]}, "an inpainting model"),
        (REAL[Family.SDXL] | {CONV_IN: [320, 9, 3, 3]}, "an inpainting model"),
        (REAL[Family.SD2] | {CONV_IN: [320, 5, 3, 3]}, "depth-to-image"),
        (REAL[Family.SD1] | {CONV_IN: [320, 8, 3, 3]}, "InstructPix2Pix"),
        (REAL[Family.SD1] | {"control_model.time_embed.0.weight": [1280, 320]}, "a ControlNet"),
        (REAL[Family.SDXL] | {"edm_mean": [4]}, "an EDM model"),
        (
            {
                CONV_IN: [384, 4, 3, 3],
                "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [768, 1280],
                "conditioner.embedders.0.model.ln_final.weight": [1280],
            },
            "SDXL's refiner",
        ),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": [4, 320]}, "a LoRA"),
        ({"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": [4, 320]}, "a LoRA"),
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight": [64, 64]}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.proj.weight": [64, 64]}, "Flux"),
        ({"first_stage_model.encoder.conv_in.weight": [128, 3, 3, 3]}, "a VAE alone"),
        ({"decoder.conv_in.weight": [128, 4, 3, 3]}, "a VAE alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": [320, 320, 3, 3]}, "name the folder"),
        ({"emb_params": [4, 768]}, "a textual inversion"),
        ({"weight": [4, 768]}, "something else"),
    ],
)
def test_other_files_are_named(shapes, said, tmp_path):
    with pytest.raises(TrainingError, match=said) as error:
        detect_family(bare_file(tmp_path / "other.safetensors", shapes))
    assert "other.safetensors" in str(error.value)
    assert "Stable Diffusion 1.x, 2.x or SDXL" in str(error.value)


def test_a_unet_alone_says_what_is_missing(tmp_path):
    with pytest.raises(TrainingError, match="has no vae"):
        read_single_file(bare_file(tmp_path / "unet.safetensors", UNET), torch.float16)


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, file, config):
    path = file(family)
    assert detect_family(path) is family
    read = read_single_file(path, torch.float32, config=config(family))
    assert_same(read, narrow_parts(family))
    pipeline = StableDiffusionXLPipeline if family is Family.SDXL else StableDiffusionPipeline
    extra = {} if family is Family.SDXL else {"safety_checker": None, "feature_extractor": None}
    pipeline(**read, **extra)
    assert not any(read[component].training for component in PREFIXES[family])


def test_round_trip_of_a_model_with_other_blocks(tmp_path):
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(BASE_MODEL, subfolder="unet"),
        "vae": AutoencoderKL.from_pretrained(BASE_MODEL, subfolder="vae"),
        "text_encoder": CLIPTextModel.from_pretrained(BASE_MODEL, subfolder="text_encoder", dtype=torch.float32),
    }
    path = write_single_file(parts, tmp_path / "small.safetensors", Family.SD1, dtype=torch.float32)
    read = read_single_file(path, torch.float32, config=BASE_MODEL)
    assert_same(read, parts)
    tokenizer = CLIPTokenizer.from_pretrained(BASE_MODEL, subfolder="tokenizer")
    assert read["tokenizer"]("a red cat").input_ids == tokenizer("a red cat").input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_what_is_written(family, file, config):
    path, folder = file(family), config(family)
    ours = read_single_file(path, torch.float32, config=folder)
    loader = StableDiffusionXLPipeline if family is Family.SDXL else StableDiffusionPipeline
    tokenizers = {name: part for name, part in ours.items() if name.startswith("tokenizer")}
    theirs = loader.from_single_file(str(path), config=str(folder), local_files_only=True, **tokenizers)
    for component, model in narrow_parts(family).items():
        weights = getattr(theirs, component).state_dict()
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[key], weight) for key, weight in model.state_dict().items()), component
    unet = narrow_parts(family)["unet"]
    latents, context = torch.randn(1, 4, 16, 16), torch.randn(1, 7, unet.config.cross_attention_dim)
    added = None
    if family is Family.SDXL:
        added = {"text_embeds": torch.randn(1, 40), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    with torch.no_grad():
        expected, drawn = (
            model(latents, 7, context, added_cond_kwargs=added).sample for model in (unet.eval(), theirs.unet)
        )
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)  # as equal as alignment in memory lets them be


def test_half_precision_by_default_and_any_precision_in_memory(file, config):
    path = file(Family.SD1, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    read = read_single_file(path, torch.bfloat16, config=config(Family.SD1))
    assert {weight.dtype for weight in read["unet"].parameters()} == {torch.bfloat16}
    expected = narrow_parts(Family.SD1)["unet"].conv_in.weight.half().bfloat16()
    assert torch.equal(read["unet"].conv_in.weight, expected)


def test_same_bytes_for_the_same_model(file):
    metadata = {"modelspec.title": "Cat", "modelspec.date": "2026-11-22", "modelspec.license": "none"}
    first = file(Family.SDXL, "first.safetensors", metadata=metadata)
    second = file(Family.SDXL, "second.safetensors", metadata=dict(reversed(metadata.items())))
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", **metadata}


def test_nothing_is_written_of_a_broken_model(tmp_path):
    parts = {**narrow_parts(Family.SD1), "vae": build("vae", narrow(Family.SD1)["vae"])}
    with torch.no_grad():
        parts["vae"].decoder.conv_in.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(TrainingError, match=r"model\.decoder\.conv_in\.weight: not finite in torch\.float16"):
        write_single_file(parts, tmp_path / "broken.safetensors", Family.SD1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrainingError, match="needs its text_encoder_2"):
        write_single_file(parts, tmp_path / "broken.safetensors", Family.SDXL)
    with pytest.raises(TrainingError, match="float16, bfloat16 or float32"):
        write_single_file(parts, tmp_path / "broken.safetensors", Family.SD1, dtype=torch.float64)


def test_a_weight_without_a_place_is_an_error(tmp_path):
    unet = build("unet", narrow(Family.SD1)["unet"] | {"class_embed_type": "timestep"})
    with pytest.raises(TrainingError, match=r"class_embedding\.linear_1\.\w+ has no place"):
        write_single_file({**narrow_parts(Family.SD1), "unet": unet}, tmp_path / "x.safetensors", Family.SD1)


# --- what files of other programs look like --------------------------------------------------------------------------


def renamed(path: Path, rename: Callable[[str], str], more: Mapping[str, torch.Tensor] | None = None) -> Path:
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file({**tensors, **(more or {})}, path)
    return path


def test_text_encoders_under_other_names(file, config):
    old = renamed(file(Family.SD1), lambda name: name.replace("transformer.text_model.", "transformer."))
    assert_same(read_single_file(old, torch.float32, config=config(Family.SD1)), narrow_parts(Family.SD1))
    sgm = renamed(file(Family.SD2), lambda name: name.replace("cond_stage_model.", "conditioner.embedders.0."))
    sizes = {name: list(tensor.shape) for name, tensor in load_file(sgm).items()}
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert detect_family(bare_file(sgm.with_name("real.safetensors"), sizes | {key: [320, 1024]})) is Family.SD2


def test_tensors_that_diffusers_has_no_use_for(file, config):
    prefix = "cond_stage_model.model."
    more = {
        f"{prefix}transformer.resblocks.23.ln_1.weight": torch.ones(32),
        f"{prefix}text_projection": torch.ones(32, 32),
        f"{prefix}logit_scale": torch.tensor(4.6),
        "alphas_cumprod": torch.ones(1000),
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(1),
    }
    path = renamed(file(Family.SD2), lambda name: name, more)
    assert_same(read_single_file(path, torch.float32, config=config(Family.SD2)), narrow_parts(Family.SD2))


def test_projections_of_either_form(file, config):
    path = file(Family.SDXL)
    tensors = load_file(path)
    name = "conditioner.embedders.1.model.text_projection"
    tensors[f"{name}.weight"] = tensors.pop(name).T.contiguous()
    for attention in ("encoder.mid.attn_1.q", "decoder.mid.attn_1.proj_out"):
        key = f"first_stage_model.{attention}.weight"
        tensors[key] = tensors[key][:, :, 0, 0].contiguous()
    save_file(tensors, path)
    assert_same(read_single_file(path, torch.float32, config=config(Family.SDXL)), narrow_parts(Family.SDXL))


def test_damaged_and_different_models_are_refused(file, config, tmp_path):
    path, folder = file(Family.SD1), config(Family.SD1)
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "decoder.mid" not in name}, path)
    with pytest.raises(TrainingError, match=r"its vae lacks \d+ of the 248 weights of sd1, such as first_"):
        read_single_file(path, torch.float32, config=folder)
    save_file({**tensors, "model.diffusion_model.time_embed.cond_proj.weight": torch.ones(2, 2)}, path)
    with pytest.raises(TrainingError, match=r"1 weights that sd1's has not, such as .*cond_proj"):
        read_single_file(path, torch.float32, config=folder)
    with pytest.raises(TrainingError, match=r"is \[8, 4, 3, 3\]; sd1's unet wants \[320, 4, 3, 3\]"):
        read_single_file(file(Family.SD1), torch.float32)
    half = tmp_path / "half.safetensors"
    half.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match="not a whole safetensors file"):
        detect_family(half)
    with pytest.raises(TrainingError, match="cannot be read"):
        detect_family(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_ckpt_is_read_without_unpickling(zipped, file, config):
    path = file(Family.SD1)
    pickled = path.with_suffix(".ckpt")
    content = {"state_dict": load_file(path), "global_step": 7}
    torch.save(content, pickled, _use_new_zipfile_serialization=zipped)
    assert detect_family(pickled) is Family.SD1
    assert_same(read_single_file(pickled, torch.float32, config=config(Family.SD1)), narrow_parts(Family.SD1))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_pickled_code_never_runs(save, tmp_path):
    path, sprung = tmp_path / "model.ckpt", tmp_path / "sprung"
    save({"state_dict": {"weight": torch.ones(1)}, "callbacks": Trap(sprung)}, path)
    with pytest.raises(TrainingError, match="not a file of weights alone"):
        detect_family(path)
    assert not sprung.exists()


# --- prediction type -------------------------------------------------------------------------------------------------


def predicts(path: Path, folder: Path, **options: Any) -> tuple[str, bool]:
    settings = read_single_file(path, torch.float32, config=folder, **options)["scheduler"].config
    return settings.prediction_type, bool(settings.get("rescale_betas_zero_snr"))


@pytest.mark.parametrize(
    ("family", "prediction_type", "zero_snr"),
    [
        (Family.SD1, "epsilon", False),
        (Family.SD1, "v_prediction", False),
        (Family.SD2, "epsilon", False),
        (Family.SDXL, "v_prediction", True),
    ],
)
def test_prediction_type_comes_back(family, prediction_type, zero_snr, file, config):
    scheduler = DDIMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    path = file(family, parts={"scheduler": scheduler})
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == {"v_prediction": "v"}.get(prediction_type, "epsilon")
        marks = {"v_pred": prediction_type == "v_prediction", "ztsnr": zero_snr}
        assert {name: name in opened.keys() for name in marks} == marks  # noqa: SIM118
    assert predicts(path, config(family)) == (prediction_type, zero_snr)


def test_prediction_type_is_found_in_files_of_others(file, config):
    folder = config(Family.SD1)
    marked = renamed(file(Family.SD1), lambda name: name, {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)})
    assert predicts(marked, folder) == ("v_prediction", True)
    assert predicts(marked, folder, prediction_type="epsilon") == ("epsilon", True)
    with pytest.raises(TrainingError, match="epsilon or v_prediction, not sample"):
        predicts(marked, folder, prediction_type="sample")
    folder = config(Family.SD2)
    telling = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    more = {telling: torch.linspace(-0.3, 0.3, 8)}
    scheduler_config = folder / "scheduler" / "scheduler_config.json"
    scheduler_config.write_text(scheduler_config.read_text().replace("v_prediction", "epsilon"))
    assert predicts(file(Family.SD2), folder) == ("epsilon", False)
    assert predicts(renamed(file(Family.SD2), lambda name: name, more), folder) == ("v_prediction", False)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_tokens_of_clip(file, config):
    read = read_single_file(file(Family.SDXL), torch.float32, config=config(Family.SDXL))
    first, second = read["tokenizer"], read["tokenizer_2"]
    assert len(first) == 49408
    assert first.model_max_length == second.model_max_length == 77
    assert first("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert first("Ünïcode, it's 2026…").input_ids == second("Ünïcode, it's 2026…").input_ids
    assert first("cat", padding="max_length").input_ids[3:] == [49407] * 74
    assert second("cat", padding="max_length").input_ids[3:] == [0] * 74
