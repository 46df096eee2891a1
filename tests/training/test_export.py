"""LoRA files: the names of real models, the same picture after a real loader, honest metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdtune.errors import TrainingError
from sdtune.training.components.export import DIFFUSERS_FILE, kohya_metadata, write_diffusers_lora, write_kohya_lora
from sdtune.training.components.import_lora import read_lora
from sdtune.training.components.lora_names import classic_clip_path, kohya_name, path_of
from sdtune.training.components.lora_weights import Family, LoraModule, LoraWeights, collect_lora, lora_change

GOLDENS = Path(__file__).parent / "goldens"
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONV_TARGETS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]
CLIP_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}


def add_lora(model: nn.Module, targets: list[str], rank: int = 4, alpha: float = 2.0, **options: object) -> None:
    """A LoRA with random weights in both halves, on the CPU even where the model is on the meta device."""
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **options), adapter_name="default")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for half in (layer.lora_A["default"], layer.lora_B["default"]):
                half.to_empty(device="cpu")
                nn.init.normal_(half.weight, std=0.3)


@cache
def real_models(family: Family) -> dict[str, nn.Module]:
    """The UNet and the text encoders in their published shapes, without memory for their weights."""
    clip_l = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    clip_h = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
    clip_g = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
    wide = {"block_out_channels": (320, 640, 1280, 1280)}
    with torch.device("meta"):
        if family is Family.SDXL:
            unet = UNet2DConditionModel(
                block_out_channels=(320, 640, 1280),
                transformer_layers_per_block=[1, 2, 10],
                attention_head_dim=[5, 10, 20],
                cross_attention_dim=2048,
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
                **SDXL_UNET,
            )
            second = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=1280, **clip_g))
            return {"unet": unet, "text_encoder": CLIPTextModel(CLIPTextConfig(**clip_l)), "text_encoder_2": second}
        if family is Family.SD2:
            unet = UNet2DConditionModel(
                cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True, **wide
            )
            return {"unet": unet, "text_encoder": CLIPTextModel(CLIPTextConfig(**clip_h))}
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, **wide)
        return {"unet": unet, "text_encoder": CLIPTextModel(CLIPTextConfig(**clip_l))}


@cache
def real_lora(family: Family) -> LoraWeights:
    models = real_models(family)
    for component, model in models.items():
        add_lora(model, UNET_TARGETS if component == "unet" else CLIP_TARGETS)
    return collect_lora(**models)


def assert_same(found: LoraWeights, wanted: LoraWeights) -> None:
    assert {name: set(modules) for name, modules in found.items()} == {name: set(m) for name, m in wanted.items()}
    for component, modules in wanted.items():
        for path, module in modules.items():
            again = found[component][path]
            assert again.alpha == module.alpha, path
            assert torch.equal(again.down, module.down), path
            assert torch.equal(again.up, module.up), path


def keys_of(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return sorted(opened.keys())


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


METADATA = {
    "family": Family.SD1,
    "title": "sks dog",
    "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "rank": 4,
    "alpha": 2,
    "resolution": 512,
    "steps": 400,
    "epochs": 80,
    "learning_rate": 1e-4,
    "optimizer": "torch.optim.AdamW",
    "batch_size": 1,
    "num_train_images": 5,
    "seed": 7,
    "trigger_words": ["sks dog"],
    "captions": ["a photo of sks dog, park", "sks dog, Park, "],
}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", Family)
def test_every_module_of_the_real_models_keeps_its_name(family):
    for component, model in real_models(family).items():
        paths = [
            name.removesuffix(".base_layer")
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, LoraLayer) and "lora_" not in name
        ]
        assert len(paths) > 70
        if component != "unet":
            paths = [classic_clip_path(path) for path in paths]
        for sgm in {False, family is Family.SDXL and component == "unet"}:
            flat = [kohya_name("lora", path, sgm=sgm).removeprefix("lora_") for path in paths]
            assert len(set(flat)) == len(paths)
            assert [path_of(name) for name in flat] == paths


@pytest.mark.parametrize("family", Family)
def test_the_files_hold_the_names_that_loaders_look_for(family, tmp_path):
    kohya = keys_of(write_kohya_lora(real_lora(family), tmp_path / "a.safetensors", family, {}))
    diffusers = keys_of(write_diffusers_lora(real_lora(family), tmp_path))
    modules = sorted({key.partition(".")[0] for key in kohya})
    assert set(kohya) == {
        f"{name}.{part}" for name in modules for part in ("alpha", "lora_down.weight", "lora_up.weight")
    }
    if family is Family.SD1:  # 192 + 72: what kohya's own network has on SD 1.5
        assert modules == (GOLDENS / "kohya_sd15.txt").read_text().split()
        assert diffusers == (GOLDENS / "diffusers_sd15.txt").read_text().split()
    digest = {
        name: hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
        for name, keys in (("kohya", modules), ("diffusers", diffusers))
    }
    golden = json.loads((GOLDENS / "lora_names.json").read_text())[family]
    assert {"modules": len(modules), **digest} == golden


def test_sdxl_uses_the_block_names_of_its_original_unet():
    def name(path: str) -> str:
        return kohya_name("lora_unet", path, sgm=True)

    assert name("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q") == (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    )
    assert name("mid_block.attentions.0.proj_in") == "lora_unet_middle_block_1_proj_in"
    assert name("up_blocks.1.attentions.2.proj_out") == "lora_unet_output_blocks_5_1_proj_out"
    assert name("up_blocks.0.upsamplers.0.conv") == "lora_unet_output_blocks_2_2_conv"
    assert name("down_blocks.0.downsamplers.0.conv") == "lora_unet_input_blocks_3_0_op"
    assert name("mid_block.resnets.1.time_emb_proj") == "lora_unet_middle_block_2_emb_layers_1"
    with pytest.raises(TrainingError, match="another family"):
        name("down_blocks.3.resnets.0.conv1")


@pytest.mark.parametrize("family", Family)
def test_both_forms_come_back_as_they_were(family, tmp_path):
    weights = real_lora(family)
    write_diffusers_lora(weights, tmp_path)
    assert_same(read_lora(tmp_path), weights)
    file = write_kohya_lora(weights, tmp_path / "kohya.safetensors", family, {}, dtype=torch.float32)
    assert_same(read_lora(file), weights)


# --- the picture -----------------------------------------------------------------------------------------------------


def tiny_parts(sdxl: bool = False) -> dict[str, object]:
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=64,
        max_position_embeddings=16, projection_dim=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    blocks = dict(
        SDXL_UNET, addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8, cross_attention_dim=32
    )
    small = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
    }
    channels = (16, 32, 32) if sdxl else (16, 32)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=channels, layers_per_block=2, attention_head_dim=4, norm_num_groups=8,
        **(blocks if sdxl else small),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    parts: dict[str, object] = {
        "unet": unet,
        "vae": vae,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "tokenizer": None,
    }
    parts["text_encoder"] = CLIPTextModel(clip)
    if sdxl:
        return parts | {"text_encoder_2": CLIPTextModelWithProjection(clip), "tokenizer_2": None}
    return parts | {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def pipeline(parts: dict[str, object]) -> StableDiffusionPipeline:
    made = (StableDiffusionXLPipeline if "text_encoder_2" in parts else StableDiffusionPipeline)(**parts)
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def draw(made: StableDiffusionPipeline) -> torch.Tensor:
    """Latents after two steps; the prompt enters as token ids, so that no tokenizer is needed."""
    tokens = torch.tensor([[0, 5, 9, 33, 1] + [1] * 11])
    encoded = [made.text_encoder(tokens, output_hidden_states=True)]
    options: dict[str, object] = {}
    if (second := getattr(made, "text_encoder_2", None)) is not None:
        encoded.append(second(tokens, output_hidden_states=True))
        pooled = encoded[1].text_embeds
        options = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
    embeds = torch.cat([out.hidden_states[-1] for out in encoded], dim=-1)
    return made(
        prompt_embeds=embeds, negative_prompt_embeds=torch.zeros_like(embeds), num_inference_steps=2,
        output_type="latent", generator=torch.Generator().manual_seed(3), **options,
    ).images  # fmt: skip


def from_diffusers(weights: LoraWeights, folder: Path, family: Family) -> Path:
    write_kohya_lora(weights, folder / "for-uis.safetensors", family, {})  # stands beside it, and is not picked
    write_diffusers_lora(weights, folder)
    return folder


def from_kohya(weights: LoraWeights, folder: Path, family: Family) -> Path:
    return write_kohya_lora(weights, folder / "sks.safetensors", family, {}, dtype=torch.float32)


@pytest.mark.parametrize("write", [from_diffusers, from_kohya])
@pytest.mark.parametrize(
    ("family", "unet_targets", "clip_targets"),
    [
        (Family.SD1, ["to_q", "to_k", "to_v", "to_out.0"], []),
        (Family.SD1, UNET_TARGETS + CONV_TARGETS, CLIP_TARGETS),
        (Family.SD1, ["to_q", "to_v"], ["q_proj", "v_proj"]),
        (Family.SD1, [], ["fc1"]),
        (Family.SDXL, UNET_TARGETS + CONV_TARGETS, CLIP_TARGETS),
    ],
    ids=["attention", "everything", "q and v", "text only", "sdxl"],
)
def test_diffusers_draws_the_same_from_the_file(
    family: Family, unet_targets: list[str], clip_targets: list[str], write: Callable[..., Path], tmp_path: Path
):
    sdxl = family is Family.SDXL
    base = draw(pipeline(tiny_parts(sdxl)))
    trained = tiny_parts(sdxl)
    models = {name: trained[name] for name in ("unet", "text_encoder", "text_encoder_2") if name in trained}
    torch.manual_seed(1)
    for name, model in models.items():
        # another alpha for the text encoders: each part has its own scale
        if targets := unet_targets if name == "unet" else clip_targets:
            add_lora(model, targets, rank=4, alpha=2.0 if name == "unet" else 3.0)
    wanted = draw(pipeline(trained))
    weights = collect_lora(**models)
    assert lora_change(weights) > 0

    fresh = pipeline(tiny_parts(sdxl))
    fresh.load_lora_weights(str(write(weights, tmp_path, family)))
    found = draw(fresh)
    assert not torch.allclose(wanted, base, atol=1e-2)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("write", [from_diffusers, from_kohya])
def test_modules_of_different_rank_and_alpha_draw_the_same(write: Callable[..., Path], tmp_path: Path):
    trained = tiny_parts()
    add_lora(
        trained["unet"], ["to_q", "to_v", "conv1"], rank_pattern={"conv1": 2}, alpha_pattern={"to_v": 8, "conv1": 1}
    )
    add_lora(trained["text_encoder"], CLIP_TARGETS, rank_pattern={"fc1": 2}, alpha_pattern={"fc1": 8})
    weights = collect_lora(trained["unet"], trained["text_encoder"])
    file = write(weights, tmp_path, Family.SD1)
    fresh = pipeline(tiny_parts())
    fresh.load_lora_weights(str(file))
    torch.testing.assert_close(draw(fresh), draw(pipeline(trained)), atol=1e-4, rtol=1e-4)
    read = read_lora(file)
    for component, modules in weights.items():
        for path, module in modules.items():
            torch.testing.assert_close(read[component][path].delta(), module.delta())


def test_dora_draws_the_same_from_diffusers_file(tmp_path):
    trained = tiny_parts()
    add_lora(trained["unet"], ["to_q", "to_out.0", "conv1"], use_dora=True)
    for layer in trained["unet"].modules():
        if isinstance(layer, LoraLayer):
            layer.lora_magnitude_vector["default"].weight.data *= 1.5
    weights = collect_lora(trained["unet"])
    fresh = pipeline(tiny_parts())
    fresh.load_lora_weights(str(write_diffusers_lora(weights, tmp_path).parent))
    torch.testing.assert_close(draw(fresh), draw(pipeline(trained)), atol=1e-4, rtol=1e-4)

    file = write_kohya_lora(weights, tmp_path / "kohya.safetensors", Family.SD1, {}, dtype=torch.float32)
    read = read_lora(file)["unet"]
    for path, module in weights["unet"].items():
        assert torch.equal(read[path].magnitude, module.magnitude)
    shapes = {tuple(tensor.shape[1:]) for key, tensor in load_file(file).items() if key.endswith("dora_scale")}
    assert shapes == {(1,), (1, 1, 1)}


# --- collecting ------------------------------------------------------------------------------------------------------


def test_rank_stabilised_lora_keeps_its_scale():
    unet = tiny_parts()["unet"]
    add_lora(unet, ["to_q"], rank=16, alpha=2.0, use_rslora=True)
    layer = next(layer for layer in unet.modules() if isinstance(layer, LoraLayer))
    module = next(iter(collect_lora(unet)["unet"].values()))
    assert module.scale == pytest.approx(layer.scaling["default"])
    torch.testing.assert_close(module.delta(), layer.get_delta_weight("default"))


def test_the_strength_of_the_moment_is_not_exported():
    unet = tiny_parts()["unet"]
    add_lora(unet, ["to_q"], alpha=2.0)
    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(0.1)
    assert {module.alpha for module in collect_lora(unet)["unet"].values()} == {2.0}


def test_a_peft_model_is_collected_under_the_names_of_the_model():
    unet = tiny_parts()["unet"]
    wrapped = PeftModel(unet, LoraConfig(r=4, target_modules=["to_q"]))
    paths = set(collect_lora(wrapped)["unet"])
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q" in paths


def test_what_a_file_cannot_carry_is_refused():
    parts = tiny_parts()
    with pytest.raises(TrainingError, match="No LoRA adapter named 'default' in unet"):
        collect_lora(parts["unet"])
    add_lora(parts["text_encoder"], ["fc1"], lora_bias=True)
    with pytest.raises(TrainingError, match="lora_bias"):
        collect_lora(parts["unet"], parts["text_encoder"])


def test_change_is_zero_before_training_and_never_nan():
    unet = tiny_parts()["unet"]
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    weights = collect_lora(unet)
    assert lora_change(weights) == 0.0
    module = next(iter(weights["unet"].values()))
    module.up[0, 0] = -0.5
    module.down[0].fill_(2.0)
    assert lora_change(weights) == pytest.approx(0.5 * 2.0 * module.scale)
    module.up[0, 0] = float("inf")
    with pytest.raises(TrainingError, match="not finite"):
        lora_change(weights)
    with pytest.raises(TrainingError, match="nothing was written"):
        write_kohya_lora(weights, Path("never"), Family.SD1, {})
    assert not Path("never").exists()


# --- reading what others wrote ---------------------------------------------------------------------------------------


def test_older_diffusers_names_are_read(tmp_path):
    down, up = torch.randn(4, 16), torch.randn(16, 4)
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    file = tmp_path / "old.safetensors"
    save_file(
        {
            f"unet.{block}.processor.to_out_lora.down.weight": down,
            f"unet.{block}.processor.to_out_lora.up.weight": up,
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": down.clone(),
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight": up.clone(),
        },
        file,
    )
    weights = read_lora(file)
    assert set(weights["unet"]) == {f"{block}.to_out.0"}
    assert set(weights["text_encoder"]) == {"text_model.encoder.layers.0.self_attn.q_proj"}
    assert weights["unet"][f"{block}.to_out.0"].scale == 1.0


@pytest.mark.parametrize("targets", [["to_q"], UNET_TARGETS])
def test_what_diffusers_saved_is_read_with_its_alpha(tmp_path, targets):
    parts = tiny_parts()
    add_lora(parts["unet"], targets, alpha=3.0)
    add_lora(parts["text_encoder"], ["q_proj", "out_proj"], alpha=1.0)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(parts["unet"]),
        text_encoder_lora_layers=get_peft_model_state_dict(parts["text_encoder"]),
        **_collate_lora_metadata({"unet": parts["unet"], "text_encoder": parts["text_encoder"]}),
    )
    assert_same(read_lora(tmp_path / DIFFUSERS_FILE), collect_lora(parts["unet"], parts["text_encoder"]))


def test_sdxl_files_in_diffusers_block_names_are_read(tmp_path):
    file = tmp_path / "a.safetensors"
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_out_0"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}, file)
    module = read_lora(file)["unet"]["down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0"]
    assert module.alpha == 2  # absent alpha: scale 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 a zip of pickles", "not a safetensors file"),
        (save({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(2)}), "LoHa"),
        (save({"lora_unet_no_such_module.alpha": torch.ones(1)}), "not the name of a Stable Diffusion module"),
        (save({"lora_unet_conv_in.lora_up.weight": torch.ones(2, 2)}), "only one half"),
        (save({"transformer.blocks.0.weight": torch.ones(2, 2)}), "not a LoRA of Stable Diffusion"),
        (save({}), "no tensors"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        read_lora(file)


def test_a_missing_file_is_an_error_of_the_user(tmp_path):
    with pytest.raises(TrainingError, match=r"none\.safetensors"):
        read_lora(tmp_path / "none.safetensors")


# --- metadata and bytes ----------------------------------------------------------------------------------------------


def tiny_lora() -> LoraWeights:
    torch.manual_seed(2)
    paths = ["mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out"]
    return {"unet": {path: LoraModule(torch.randn(4, 600), torch.randn(600, 4), 2.0) for path in paths}}


def test_kohya_metadata_says_what_uis_show(tmp_path):
    file = write_kohya_lora(tiny_lora(), tmp_path / "a.safetensors", Family.SD1, kohya_metadata(**METADATA))
    found = metadata_of(file)
    assert all(isinstance(value, str) for value in found.values())
    assert (
        found
        | {
            "ss_base_model_version": "sd_v1",
            "ss_sd_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "4",
            "ss_network_alpha": "2.0",
            "ss_v2": "False",
            "ss_resolution": "(512, 512)",
            "ss_learning_rate": "0.0001",
            "ss_seed": "7",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.resolution": "512x512",
            "modelspec.prediction_type": "epsilon",
            "modelspec.trigger_phrase": "sks dog",
            "modelspec.title": "sks dog",
        }
        == found
    )
    assert json.loads(found["ss_tag_frequency"]) == {"images": {"park": 2, "a photo of sks dog": 1, "sks dog": 1}}


@pytest.mark.parametrize(
    ("family", "v_prediction", "version", "architecture"),
    [
        (Family.SD1, True, "sd_v1_v", "stable-diffusion-v1/lora"),
        (Family.SD2, False, "sd_v2", "stable-diffusion-v2-512/lora"),
        (Family.SD2, True, "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        (Family.SDXL, False, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_family_is_told(family, v_prediction, version, architecture):
    found = kohya_metadata(**METADATA | {"family": family, "v_prediction": v_prediction, "resolution": (768, 1024)})
    assert found["ss_base_model_version"] == version
    assert found["modelspec.architecture"] == architecture
    assert found["modelspec.resolution"] == "768x1024"
    assert found["modelspec.prediction_type"] == ("v" if v_prediction else "epsilon")


@pytest.mark.parametrize(
    ("base_model", "told"),
    [
        ("owner/model", "owner/model"),
        ("/home/anna/models/dream.safetensors", "dream.safetensors"),
        ("gs://bucket/secret/sdxl", "sdxl"),
        ("../sd15/", "sd15"),
        ("./sd15", "sd15"),
        (r"C:\Users\anna\sd15.safetensors", "sd15.safetensors"),
        ("sd15", "sd15"),
    ],
)
def test_folders_of_this_machine_are_not_told(base_model, told):
    assert kohya_metadata(**METADATA | {"base_model": base_model})["ss_sd_model_name"] == told


def test_hashes_are_those_that_kohya_computes(tmp_path):
    metadata = kohya_metadata(**METADATA)
    weights = tiny_lora()
    big = LoraModule(torch.randn(300, 1000), torch.randn(1000, 300), 1.0)  # beyond the first MiB, for the legacy hash
    weights["unet"]["mid_block.attentions.0.transformer_blocks.0.ff.net.2"] = big
    file = write_kohya_lora(weights, tmp_path / "a.safetensors", Family.SD1, metadata)
    found = metadata_of(file)
    # kohya: a file of the same tensors with the ss_ entries alone
    again = save(load_file(file), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    data = again[8 + int.from_bytes(again[:8], "little") :]
    assert found["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert found["sshs_legacy_hash"] == hashlib.sha256(again[0x100000:0x110000]).hexdigest()[:8]
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]


def test_the_same_weights_make_the_same_bytes(tmp_path):
    def written(folder: Path) -> list[bytes]:
        kohya = write_kohya_lora(tiny_lora(), folder / "a.safetensors", Family.SD1, kohya_metadata(**METADATA))
        return [kohya.read_bytes(), write_diffusers_lora(tiny_lora(), folder).read_bytes()]

    assert written(tmp_path / "1") == written(tmp_path / "2")
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == ["a.safetensors", DIFFUSERS_FILE]


def test_the_diffusers_file_needs_no_header_to_have_its_scale(tmp_path):
    """Older diffusers and UIs read no alpha from the header: the tensors alone are the change."""
    weights = tiny_lora()
    file = write_diffusers_lora(weights, tmp_path, metadata={"trigger": "sks"})
    tensors = load_file(file)
    for path, module in weights["unet"].items():
        product = tensors[f"unet.{path}.lora.up.weight"] @ tensors[f"unet.{path}.lora.down.weight"]
        torch.testing.assert_close(product, module.delta())
    header = json.loads(metadata_of(file)["lora_adapter_metadata"])
    assert header["unet.r"] == header["unet.lora_alpha"] == 4
    assert metadata_of(file)["trigger"] == "sks"


def test_two_text_encoders_are_sdxl():
    weights = {"text_encoder_2": tiny_lora()["unet"]}
    with pytest.raises(TrainingError, match="only SDXL has two"):
        write_kohya_lora(weights, Path("never"), Family.SD1, {})
