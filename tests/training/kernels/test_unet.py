"""A fused UNet against a plain one: the shipped base model's, with all kernels interpreted."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from sdtune.training.components.fused import can_fuse, fuse
from sdtune.training.kernels.modules import FusedBasicTransformerBlock, FusedGEGLU, FusedNormSilu, FusedResnetBlock2D
from sdtune.training.kernels.processor import FusedAttnProcessor
from tests.conftest import BASE_MODEL


def unet(lora: bool, **config):
    torch.manual_seed(0)
    model = UNet2DConditionModel.from_pretrained(BASE_MODEL / "unet")
    if lora:
        model.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, **config))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
    return model.train()


def unet_as_of_xl():
    """Linear projections and several blocks behind each other, of which the shipped model has none; all is trained."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=128,
        attention_head_dim=(1, 2), transformer_layers_per_block=2, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).train()  # fmt: skip


def learn(model):
    """The loss, and the gradient of every weight that is trained."""
    torch.manual_seed(1)
    latents, text = torch.randn(1, 4, 4, 6), torch.randn(1, 7, 128)
    loss = model(latents, torch.tensor([300]), text).sample.square().mean()
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal_learning(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert (found[1][name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA with checkpointing", "all weights"])
def test_the_same_loss_and_gradients(lora):
    plain, fused = (unet(lora=True) if lora else unet_as_of_xl() for _ in range(2))
    before = {name: (weight.shape, weight.clone()) for name, weight in fused.state_dict().items()}
    assert fuse(fused, pytest.fail)
    if lora:
        fused.enable_gradient_checkpointing()
    assert_equal_learning(learn(fused), learn(plain))
    after = fused.state_dict()
    assert list(after) == list(before)
    assert all(
        after[name].shape == shape and torch.equal(after[name], value) for name, (shape, value) in before.items()
    )
    kinds = {type(module) for module in fused.modules()}
    assert {FusedResnetBlock2D, FusedBasicTransformerBlock, FusedGEGLU, FusedNormSilu} <= kinds
    assert all(type(one) is FusedAttnProcessor for one in fused.attn_processors.values())
    assert all((one.projections[0].group is not None) is lora for one in fused.attn_processors.values())


def attended(model):
    """By one attention with its layers, as the UNet calls it; the rest of the UNet tells no more of adapters."""
    attn = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    if type(attn.processor) is FusedAttnProcessor:
        attn.processor.bind(attn)
        (hook,) = model._forward_pre_hooks.values()
        hook()
    torch.manual_seed(2)
    return attn(torch.randn(1, 5, 80))


def test_what_peft_does_to_adapters_is_seen():
    """Switched off, with another scale, merged, taken away: as without the kernels."""
    plain, fused = unet(True), unet(True)
    assert fuse(fused, pytest.fail)
    changes = (
        lambda model: None,
        lambda model: model.disable_adapters(),
        lambda model: model.enable_adapters(),
        lambda model: [m.set_scale("default", 3) for m in model.modules() if hasattr(m, "set_scale")],
        lambda model: model.fuse_lora(),
        lambda model: model.unfuse_lora(),
        lambda model: model.delete_adapters("default"),
    )
    results = []
    for change in changes:
        change(plain)
        change(fused)
        results.append(attended(plain))
        assert (attended(fused) - results[-1]).abs().max() < 1e-5
    assert not torch.allclose(results[0], results[1])


def test_adapters_that_come_back_find_their_tensors():
    """A CUDA graph was recorded with them."""
    fused = unet(True)
    assert fuse(fused, pytest.fail)
    processor = fused.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor
    groups = []
    for change in (lambda: None, fused.disable_adapters, fused.enable_adapters):
        change()
        attended(fused)
        groups.append(processor.projections[0].group)
    assert groups[0] is groups[2]
    assert groups[1] is None
    assert groups[0] is not None


def test_adapters_may_come_after_fusing():
    fused, plain = unet(False), unet(True)
    fused.requires_grad_(False)
    assert fuse(fused, pytest.fail)
    attended(fused)
    fused.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    plain.delete_adapters("default")
    assert (attended(fused) - attended(plain)).abs().max() < 1e-5
    attn = fused.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    assert attn.processor.projections[0].group.ranks == [4, 0, 4]


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_adapters_of_other_kinds_stay_pefts(config):
    plain, fused = unet(True, **config).eval(), unet(True, **config).eval()
    assert fuse(fused, pytest.fail)
    assert (attended(fused) - attended(plain)).abs().max() < 1e-5
    assert all(one.projections == [] or one.projections[0].group is None for one in fused.attn_processors.values())


def test_a_copy_has_adapters_of_its_own():
    fused = unet(True)
    assert fuse(fused, pytest.fail)
    before = attended(fused)
    other = copy.deepcopy(fused)
    for name, weight in other.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
    assert not torch.allclose(attended(other), before)
    assert torch.equal(attended(fused), before)


def test_on_the_cpu_nothing_changes(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    model = unet(True)
    kinds = [type(module) for module in model.modules()]
    assert not can_fuse(torch.device("cpu"))
    assert not fuse(model, pytest.fail)
    assert [type(module) for module in model.modules()] == kinds
