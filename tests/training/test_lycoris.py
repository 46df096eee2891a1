"""LoHa, LoKr and HRA under LyCORIS' keys: what ComfyUI makes of the file is what PEFT trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import BOFTConfig, HRAConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sdtune.errors import TrainingError
from sdtune.training.components.import_lora import read_lora
from sdtune.training.components.lora_names import Family, classic_clip_path, kohya_layer
from sdtune.training.components.lycoris import write_lycoris
from tests.training.test_export import METADATA, kohya_metadata, tiny_parts

LINEAR = ["to_q", "to_k", "to_out.0", "ff.net.0.proj", "proj_in"]
CONVOLUTIONS = ["conv1", "conv_shortcut", "downsamplers.0.conv"]
CLIP = ["q_proj", "fc1"]


def adapted(config: type, sdxl: bool = False, **options: object) -> dict[str, nn.Module]:
    """Models with an adapter of random weights, small enough that nothing overflows and nothing is zero."""
    torch.manual_seed(5)
    parts = tiny_parts(sdxl)
    models = {name: parts[name] for name in ("unet", "text_encoder", "text_encoder_2") if name in parts}
    for name, model in models.items():
        targets = CLIP if name != "unet" else options.pop("unet_targets", LINEAR + CONVOLUTIONS)
        inject_adapter_in_model(config(target_modules=targets, **options), model)
        for layer in layers(model).values():
            for part in layer.adapter_layer_names:
                for weight in getattr(layer, part).parameters():
                    nn.init.normal_(weight, std=0.3)
    return models


def layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def tucker(t: Tensor, wa: Tensor, wb: Tensor) -> Tensor:
    """[r, r, kh, kw], [r, out], [r, in] -> [out, in, kh, kw]."""
    return torch.einsum("abkl,ao,bi->oikl", t, wa, wb)


def merged(weight: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """The layer's weight with the adapter, by the formulas of ComfyUI's loader (comfy/weight_adapter), strength 1."""
    stored = {name: tensor.float() for name, tensor in stored.items()}
    alpha = stored["alpha"].item()
    if "hada_w1_a" in stored:
        halves = []
        for number in (1, 2):
            a, b, t = (stored.get(f"hada_{name}") for name in (f"w{number}_a", f"w{number}_b", f"t{number}"))
            halves.append(a @ b if t is None else tucker(t, a, b))
        return weight + alpha / stored["hada_w1_b"].shape[0] * (halves[0] * halves[1]).reshape(weight.shape)
    if "a1.weight" in stored:
        a1, a2, b1, b2 = (stored[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
        rank = a1.shape[0]
        assert a2.shape[1] == b1.shape[0] == b2.shape[1] == rank  # what tells GLoRA's older layout
        flat = weight.flatten(1)
        return weight + alpha / rank * (flat @ a2 @ a1 + b2 @ b1).reshape(weight.shape)
    rank = None
    w1, w2 = stored.get("lokr_w1"), stored.get("lokr_w2")
    if w1 is None:
        rank = stored["lokr_w1_b"].shape[0]
        w1 = stored["lokr_w1_a"] @ stored["lokr_w1_b"]
    if w2 is None:
        rank = stored["lokr_w2_b"].shape[0]
        w2 = stored["lokr_w2_a"] @ stored["lokr_w2_b"]
        assert "lokr_t2" not in stored  # ComfyUI fails on it
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    return weight + (alpha / rank if rank else 1.0) * torch.kron(w1, w2).reshape(weight.shape)


def wanted(layer: BaseTunerLayer) -> Tensor:
    """The layer's weight as PEFT merges it."""
    layer.merge()
    weight = layer.get_base_layer().weight.detach().clone()
    return weight.float()


@pytest.mark.parametrize("sdxl", [False, True])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LoHaConfig, {"r": 3, "alpha": 2}),
        (LoHaConfig, {"r": 3, "alpha": 2, "use_effective_conv2d": True, "rank_pattern": {"to_k": 2}}),
        (LoKrConfig, {"r": 2, "alpha": 3}),
        (LoKrConfig, {"r": 2, "alpha": 3, "use_effective_conv2d": True, "alpha_pattern": {"to_k": 1}}),
        (LoKrConfig, {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4}),
        (LoKrConfig, {"r": 64, "alpha": 16}),  # whole matrices, of which no reader applies alpha
        (HRAConfig, {"r": 4}),
        (HRAConfig, {"r": 3, "apply_GS": True}),
    ],
)
def test_comfyui_merges_what_peft_merges(config: type, options: dict, sdxl: bool, tmp_path: Path):
    models = adapted(config, sdxl, **options)
    family = Family.SDXL if sdxl else Family.SD1
    before = {
        (component, name): layer.get_base_layer().weight.detach().clone()
        for component, model in models.items()
        for name, layer in layers(model).items()
    }
    file = load_file(write_lycoris(models, tmp_path / "a.safetensors", family, {}, dtype=torch.float32))
    kernels = set()
    for component, model in models.items():
        for name, layer in layers(model).items():
            path = name if component == "unet" else classic_clip_path(name)
            prefix = kohya_layer(component, path, family) + "."
            stored = {key.removeprefix(prefix): file.pop(key) for key in list(file) if key.startswith(prefix)}
            weight = before[component, name]
            kernels.add(tuple(weight.shape[2:]))
            torch.testing.assert_close(merged(weight, stored), wanted(layer), atol=2e-5, rtol=2e-4)
            assert not torch.allclose(layer.get_base_layer().weight, weight, atol=1e-3)
    assert not file  # nothing is stored that no module reads
    assert kernels == {(), (1, 1), (3, 3)}


def test_a_small_change_of_paired_reflections_survives_half_precision(tmp_path: Path):
    """HRA starts from pairs that cancel; what a short training makes of them is small beside each."""
    torch.manual_seed(6)
    unet = tiny_parts()["unet"]
    inject_adapter_in_model(HRAConfig(r=4, target_modules=["to_q"]), unet)
    for layer in layers(unet).values():
        layer.hra_u["default"].data += 1e-3 * torch.randn_like(layer.hra_u["default"])
    file = load_file(write_lycoris({"unet": unet}, tmp_path / "a.safetensors", Family.SD1, {}))
    for name, layer in layers(unet).items():
        prefix = kohya_layer("unet", name, Family.SD1) + "."
        stored = {key.removeprefix(prefix): tensor for key, tensor in file.items() if key.startswith(prefix)}
        weight = layer.get_base_layer().weight.detach().clone()
        found = merged(weight, stored) - weight
        change = wanted(layer) - weight
        assert change.abs().max() < 0.05
        assert (found - change).norm() < 5e-3 * change.norm()


def test_the_header_names_the_algorithm(tmp_path: Path):
    models = adapted(LoKrConfig, r=2, alpha=2)
    file = write_lycoris(models, tmp_path / "a.safetensors", Family.SD1, kohya_metadata(**METADATA))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
        assert {str(opened.get_tensor(key).dtype) for key in opened.keys() if not key.endswith("alpha")} == {  # noqa: SIM118
            "torch.float16"
        }
    assert header["ss_network_module"] == "lycoris.kohya"
    assert header["ss_network_args"] == '{"algo": "lokr"}'
    assert header["modelspec.trigger_phrase"] == "sks dog"
    assert len(header["sshs_model_hash"]) == 64
    with pytest.raises(TrainingError, match="LoKr, Tucker"):
        read_lora(file)


def test_the_strength_of_the_moment_is_not_written(tmp_path: Path):
    models = adapted(LoHaConfig, r=3, alpha=2)
    for layer in layers(models["unet"]).values():
        layer.scale_layer(0.1)
    file = load_file(write_lycoris(models, tmp_path / "a.safetensors", Family.SD1, {}))
    assert {tensor.item() for key, tensor in file.items() if key.endswith(".alpha")} == {2.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OFTConfig(target_modules=["to_q"], oft_block_size=4), "to_q: an adapter of the kind oft"),
        (BOFTConfig(target_modules=["to_q"], boft_block_size=4), "to_q: an adapter of the kind boft"),
        (LoraConfig(target_modules=["to_q"]), "to_q: an adapter of the kind lora"),
        (LoHaConfig(target_modules=["to_q"]), "not finite in torch.float16; nothing was written"),
    ],
)
def test_what_has_no_equivalent_is_refused(config, message: str, tmp_path: Path):
    unet = tiny_parts()["unet"]
    inject_adapter_in_model(config, unet)
    for layer in layers(unet).values():
        if hasattr(layer, "hada_w1_a"):
            layer.hada_w1_a["default"].data.fill_(1e6)
    with pytest.raises(TrainingError, match=message):
        write_lycoris({"unet": unet}, tmp_path / "a.safetensors", Family.SD1, {})
    assert not list(tmp_path.iterdir())


def test_models_without_adapters_and_mixed_kinds_are_refused(tmp_path: Path):
    models = {name: tiny_parts()[name] for name in ("unet", "text_encoder")}
    with pytest.raises(TrainingError, match="No LoHa, LoKr or HRA adapter named 'default' in unet, text_encoder"):
        write_lycoris(models, tmp_path / "a.safetensors", Family.SD1, {})
    inject_adapter_in_model(LoHaConfig(target_modules=["to_q"]), models["unet"])
    inject_adapter_in_model(LoKrConfig(target_modules=["fc1"]), models["text_encoder"])
    with pytest.raises(TrainingError, match="several kinds"):
        write_lycoris(models, tmp_path / "a.safetensors", Family.SD1, {})
