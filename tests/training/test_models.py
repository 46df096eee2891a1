"""Base models load from a folder and from one file, to the same parts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdtune.errors import RecipeError, TrainingError
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.lora_weights import Family
from sdtune.training.components.models import load_parts
from sdtune.training.components.text import encode
from sdtune.training.run import Run
from tests.conftest import BASE_MODEL

pytestmark = pytest.mark.usefixtures("small")


def changed(method: DreamBoothLora, **settings: Any) -> DreamBoothLora:
    return method.model_copy(update=settings)


@pytest.fixture
def tiny_sdxl(tmp_path: Path) -> Path:
    """A pipeline of SDXL's kind with random weights."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BASE_MODEL, subfolder="tokenizer")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=3, vocab_size=len(tokenizer),
        projection_dim=32, **ends,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1], attention_head_dim=[2, 4], use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(BASE_MODEL, subfolder="vae"), unet=unet,
        text_encoder=CLIPTextModel(config), text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer, tokenizer_2=tokenizer,
        scheduler=DDPMScheduler.from_pretrained(BASE_MODEL, subfolder="scheduler"),
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "sdxl")
    return tmp_path / "sdxl"


def test_sdxl_is_encoded_as_diffusers_does(method: DreamBoothLora, run: Run, tiny_sdxl: Path) -> None:
    parts = load_parts(changed(method, base_model=str(tiny_sdxl)), run)
    assert parts.family is Family.SDXL
    ours = encode(parts, method, ["a red ball"])
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32)
    states, _, pooled, _ = pipeline.encode_prompt("a red ball", device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.encoder_hidden_states, states)
    torch.testing.assert_close(ours.pooled, pooled)


def test_a_lora_of_sdxl_trains_and_names_both_encoders(
    settings: dict[str, Any], run: Run, tiny_sdxl: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open

    from sdtune.training.trainers.dreambooth_lora import train

    more = {"base_model": str(tiny_sdxl), "train_text_encoder": True, "max_train_steps": 2, "max_token_length": 150}
    train(DreamBoothLora.from_settings({**settings, **more}), run)
    with safe_open(run.output / f"{run.output.name}.safetensors", "pt") as file:
        prefixes = {name.split("_")[1] for name in file.keys()}  # noqa: SIM118
        assert prefixes == {"unet", "te1", "te2"}
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"


@pytest.mark.parametrize(
    ("name", "words"),
    [("model_index.json", '"_class_name": "FluxPipeline"'), ("unet/config.json", "is not whole")],
)
def test_what_cannot_be_trained_is_named(
    method: DreamBoothLora, run: Run, tmp_path: Path, name: str, words: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(BASE_MODEL, broken)
    if name == "model_index.json":
        (broken / name).write_text("{" + words + "}")
        words = "is a FluxPipeline; dreambooth-lora trains Stable Diffusion 1.x, 2.x and XL"
    else:
        (broken / name).unlink()
    with pytest.raises(TrainingError) as caught:
        load_parts(changed(method, base_model=str(broken)), run)
    assert words in str(caught.value)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sprung,)


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
@pytest.mark.parametrize("trapped", [False, True], ids=["weights", "code"])
def test_pickled_weights_are_read_and_their_code_never_runs(
    method: DreamBoothLora, run: Run, tmp_path: Path, part: str, trapped: bool
) -> None:
    """A folder with .bin files alone, as older ones are."""
    folder, sprung = tmp_path / "pickled", tmp_path / "sprung"
    shutil.copytree(BASE_MODEL, folder)
    safe = next((folder / part).glob("*.safetensors"))
    weights: dict[str, Any] = load_file(safe)
    safe.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({**weights, "trap": Trap(sprung)} if trapped else weights, folder / part / name)
    if trapped:
        with pytest.raises(
            TrainingError, match=r"is not whole|the \.bin file of the text_encoder .* Pickled files can run"
        ):
            load_parts(changed(method, base_model=str(folder)), run)
    else:
        parts, expected = load_parts(changed(method, base_model=str(folder)), run), load_parts(method, run)
        for module, same in zip(parts.modules, expected.modules, strict=True):
            assert_close(module.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert not sprung.exists()
    torch.load(folder / part / name, weights_only=False)
    assert sprung.exists() is trapped  # so it would have sprung


@pytest.mark.parametrize("trained", [(), ("unet",), ("unet", "text_encoder")])
def test_frozen_weights_are_loaded_as_they_are_wanted(
    method: DreamBoothLora, run: Run, tiny_sdxl: Path, trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit what casting from float32 gives; and no frozen part but the VAE was float32 on its way."""
    whole = load_parts(changed(method, base_model=str(tiny_sdxl)), run)
    monkeypatch.setattr(Run, "weight_dtype", torch.bfloat16)
    read: dict[str, Any] = {}
    for kind in (UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection):
        spy(kind, read, monkeypatch)
    parts = load_parts(changed(method, base_model=str(tiny_sdxl)), run, trained)
    assert parts.vae.dtype == torch.float32
    encoders, unet = [torch.float32 if part in trained else torch.bfloat16 for part in ("text_encoder", "unet")]
    assert read == {"unet": unet, "text_encoder": encoders, "text_encoder_2": encoders}
    for module, expected in zip(parts.modules, whole.modules, strict=True):
        state = module.state_dict()
        cast = {key: value.to(state[key].dtype) for key, value in expected.state_dict().items()}
        assert_close(state, cast, rtol=0, atol=0)
        assert module.dtype in (unet, encoders, torch.float32)


def spy(kind: Any, read: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes the type of weights that each part has as it is read."""
    original = kind.from_pretrained

    def noted(*place: Any, subfolder: str, **options: Any) -> Any:
        part = original(*place, subfolder=subfolder, **options)
        read[subfolder] = part.dtype
        return part

    monkeypatch.setattr(kind, "from_pretrained", noted)


def test_a_file_that_is_no_checkpoint_is_named(method: DreamBoothLora, run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError):
        load_parts(changed(method, base_model=str(tmp_path / "model.safetensors")), run)


def test_more_layers_than_there_are_cannot_be_left_out(method: DreamBoothLora, run: Run) -> None:
    with pytest.raises(TrainingError, match="clip_skip: found 8, but this text encoder has 3 layers; at most 2"):
        load_parts(changed(method, clip_skip=8), run)


def test_noise_that_ends_in_pure_noise(method: DreamBoothLora, run: Run) -> None:
    velocity = changed(method, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    parts = load_parts(velocity, run)
    assert parts.v_prediction
    assert parts.noise_scheduler.alphas_cumprod[-1] == 0
    # The same first step as the base model's own schedule (arXiv:2305.08891, algorithm 1).
    own = load_parts(method, run).noise_scheduler.alphas_cumprod
    torch.testing.assert_close(parts.noise_scheduler.alphas_cumprod[0], own[0])
    assert own[-1] > 0
    # Pictures are drawn from there too.
    assert parts.noise_scheduler.config.timestep_spacing == "trailing"


def test_pure_noise_teaches_nothing_to_a_model_of_the_noise(method: DreamBoothLora, run: Run) -> None:
    with pytest.raises(RecipeError, match=r"rescale_betas_zero_snr: .*predicts the noise"):
        load_parts(changed(method, rescale_betas_zero_snr=True), run)
    with pytest.raises(RecipeError, match="rescale_betas_zero_snr: found true with prediction_type epsilon"):
        DreamBoothLora.from_settings(
            {"instance_prompt": "x", "prediction_type": "epsilon", "rescale_betas_zero_snr": True}
        )
