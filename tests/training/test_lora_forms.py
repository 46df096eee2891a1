"""The three forms of a LoRA hold the same: from one to another and back, not a bit is lost."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from sdtune.commands.convert import Dtype, convert
from sdtune.errors import RecipeError, TrainingError
from sdtune.training.components import scale
from sdtune.training.components.export import DIFFUSERS_FILE, write_diffusers_lora, write_kohya_lora
from sdtune.training.components.import_lora import lora_files, read_lora, read_lora_file
from sdtune.training.components.kohya_metadata import HASHES
from sdtune.training.components.lora_family import possible_families
from sdtune.training.components.lora_names import Family, Form, classic_clip_path
from sdtune.training.components.lora_weights import LoraModule, LoraWeights, collect_lora
from sdtune.training.components.peft_folder import CONFIG_FILE, WEIGHTS_FILE, write_peft_lora
from sdtune.training.components.scale import ROUNDING_KEY, TRAINED_ALPHA_KEY, TRAINED_DTYPE_KEY
from tests.conftest import BASE_MODEL
from tests.training.test_export import METADATA, kohya_metadata, metadata_of, real_models, tiny_parts

PAIRS = list(product(Form, Form))
RANKS = (3, 2, 1, 3)
ALPHAS = (2.0, 1.0, 0.7, 3.0, 2.0)
"""Scales that half precision holds and others that no float holds; 0.7 is none of float32 either."""


def module(out_features: int, in_features: int, *kernel: int, rank: int = 2, alpha: float = 1.0) -> LoraModule:
    ones = [1] * len(kernel)
    return LoraModule(torch.randn(rank, in_features, *kernel), torch.randn(out_features, rank, *ones), alpha)


def real_modules(family: Family, dtype: torch.dtype, dora: bool, every: int = 3) -> LoraWeights:
    """A LoRA of different ranks and alphas on every third layer of the real models, which are many and alike."""
    torch.manual_seed(4)
    weights: LoraWeights = {}
    for component, model in real_models(family).items():
        modules = weights[component] = {}
        layers = [
            (name.removesuffix(".base_layer"), layer)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and not isinstance(layer, LoraLayer) and "lora_" not in name
        ]
        for number, (name, layer) in enumerate(layers[::every]):
            path = name if component == "unet" else classic_clip_path(name)
            one = module(*layer.weight.shape, rank=RANKS[number % 4], alpha=ALPHAS[number % 5])
            magnitude = torch.rand(layer.weight.shape[0]) + 1 if dora else None
            modules[path] = LoraModule(one.down, one.up, one.alpha, magnitude).to(dtype)
    return weights


def write(weights: LoraWeights, form: Form, folder: Path, family: Family) -> Path:
    """The first file or folder of a chain: in the types of ``weights``, with a header where there is one."""
    metadata = kohya_metadata(**METADATA | {"family": family})
    if form is Form.KOHYA:
        return write_kohya_lora(weights, folder / "a.safetensors", family, metadata, dtype=None, one_alpha=False)
    if form is Form.DIFFUSERS:
        return write_diffusers_lora(weights, folder / "a", dtype=None, metadata=metadata).parent
    return write_peft_lora(weights, folder / "a", base_model=str(METADATA["base_model"]), metadata=metadata)


def content(path: Path) -> dict[str, object]:
    """Every byte of every tensor with its type and shape, every header but the hashes, every configuration."""
    found: dict[str, object] = {}
    for file in lora_files(path):
        where = file.relative_to(path).as_posix() if path.is_dir() else ""
        for key, tensor in load_file(file).items():
            whole = tensor.reshape(-1).contiguous().view(torch.uint8)
            found[f"{where}:{key}"] = (tensor.dtype, tuple(tensor.shape), bytes(whole.numpy()))
        found[f"{where}:header"] = {key: value for key, value in metadata_of(file).items() if key not in HASHES}
        if (config := file.parent / CONFIG_FILE).exists():
            found[f"{where}:config"] = config.read_text()
    return found


def there_and_back(weights: LoraWeights, first: Form, second: Form, folder: Path, family: Family) -> None:
    a = write(weights, first, folder, family)
    ending = {form: ".safetensors" if form is Form.KOHYA else "" for form in Form}
    b, again = folder / f"b{ending[second]}", folder / f"again{ending[first]}"
    to_second = convert(str(a), str(b), second)
    to_first = convert(str(b), str(again), first)
    assert (to_second.source.form, to_first.source.form) == (first, second)
    assert content(again) == content(a)


# --- without loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_form_comes_back_from_every_other_bit_for_bit(family, first, second, tmp_path):
    weights = real_modules(family, torch.float16, dora=False, every=1 if family is Family.SD1 else 3)
    there_and_back(weights, first, second, tmp_path, family)


@pytest.mark.parametrize(("dtype", "dora"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_whatever_the_type_and_with_dora(first, second, dtype, dora, tmp_path):
    weights = real_modules(Family.SD1, dtype, dora)
    # the ends of the type's range, where a product underflows; a negative zero
    ends = next(iter(weights["unet"].values())).up.flatten()
    ends[0], ends[1], ends[2] = torch.finfo(dtype).smallest_normal / 4, -0.0, torch.finfo(dtype).max / 8
    there_and_back(weights, first, second, tmp_path, Family.SD1)


def test_the_neutral_form_is_what_was_written(tmp_path):
    """Equal files could be equally wrong: what is read is what was trained."""
    weights = real_modules(Family.SD1, torch.float32, dora=True)
    for form in Form:
        read = read_lora(write(weights, form, tmp_path / form, Family.SD1))
        assert {name: set(modules) for name, modules in read.items()} == {name: set(m) for name, m in weights.items()}
        for component, modules in weights.items():
            for path, one in modules.items():
                found = read[component][path]
                assert found.alpha == one.alpha
                for part, tensor in one.tensors.items():
                    assert torch.equal(found.tensors[part], tensor), (form, path, part)


@pytest.mark.parametrize(
    ("alpha", "dtype", "stored", "entries"),
    [
        (1.0, torch.float16, "float16", {TRAINED_ALPHA_KEY}),  # scale 1/4: only the exponent changes
        (3.0, torch.float16, "float32", {TRAINED_ALPHA_KEY, TRAINED_DTYPE_KEY}),
        (3.0, torch.float32, "float32", {TRAINED_ALPHA_KEY, ROUNDING_KEY}),
    ],
)
def test_diffusers_form_is_as_narrow_as_it_can_be(alpha, dtype, stored, entries, tmp_path):
    torch.manual_seed(3)
    one = module(64, 16, rank=4 if alpha == 1 else 7, alpha=alpha).to(dtype)
    folder = write_diffusers_lora({"unet": {"conv_in": one}}, tmp_path, dtype=None).parent
    file = folder / DIFFUSERS_FILE
    tensors = load_file(file)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{stored}"}
    assert {key for key in metadata_of(file) if key.startswith("sdtune_")} == entries
    change = tensors["unet.conv_in.lora.up.weight"].float() @ tensors["unet.conv_in.lora.down.weight"].float()
    torch.testing.assert_close(change, one.delta(), atol=1e-5, rtol=0)


def test_rounding_that_no_header_holds_is_left_out_with_the_alpha(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "MOST_ROUNDING", 10)
    weights = {"unet": {"conv_in": module(64, 16, rank=7, alpha=3.0)}}
    file = write_diffusers_lora(weights, tmp_path, dtype=None)
    found = read_lora(file)["unet"]["conv_in"]
    assert found.alpha == found.rank == 7
    torch.testing.assert_close(found.delta(), weights["unet"]["conv_in"].delta())


@pytest.mark.parametrize("target", Form)
def test_a_narrower_type_is_rounded_once_and_then_kept(target, tmp_path):
    torch.manual_seed(3)
    weights = {"unet": {"mid_block.attentions.0.proj_in": module(16, 16, 1, 1, rank=3, alpha=2.0)}}
    a = write(weights, Form.PEFT, tmp_path, Family.SD1)
    narrow = tmp_path / ("b.safetensors" if target is Form.KOHYA else "b")
    assert convert(str(a), str(narrow), target, dtype=Dtype.FP16).target.dtypes == ["float16"]
    again = tmp_path / ("c.safetensors" if target is Form.KOHYA else "c")
    convert(str(narrow), str(tmp_path / "peft"), Form.PEFT)
    convert(str(tmp_path / "peft"), str(again), target)
    assert content(again) == content(narrow)


def test_the_header_travels_and_its_hashes_do_not(tmp_path):
    a = write(real_modules(Family.SD1, torch.float16, dora=False), Form.KOHYA, tmp_path, Family.SD1)
    for form in (Form.DIFFUSERS, Form.PEFT):
        convert(str(a), str(tmp_path / form), form)
        for file in lora_files(tmp_path / form):
            header = metadata_of(file)
            assert header["modelspec.trigger_phrase"] == "sks dog"
            assert header["ss_learning_rate"] == "0.0001"
            assert not set(HASHES) & set(header)
    config = json.loads((tmp_path / "peft" / "unet" / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == METADATA["base_model"]


def test_a_kohya_file_without_a_history_says_what_is_known(tmp_path):
    weights = real_modules(Family.SDXL, torch.float16, dora=False)
    a = write_peft_lora(weights, tmp_path / "a", base_model="/home/anna/models/dream")
    convert(str(a), str(tmp_path / "fox.safetensors"), Form.KOHYA)
    header = metadata_of(tmp_path / "fox.safetensors")
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.title"] == header["ss_output_name"] == "fox"
    assert header["ss_sd_model_name"] == "dream"
    assert not {"ss_network_dim", "ss_network_alpha", "ss_steps"} & set(header)  # ranks differ; steps are unknown


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_the_folder_into_the_base_model(dora, tmp_path):
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(BASE_MODEL, subfolder="unet")
    encoder = CLIPTextModel.from_pretrained(BASE_MODEL, subfolder="text_encoder", dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 2, "use_dora": dora, "init_lora_weights": False}
    unet.add_adapter(
        LoraConfig(
            **options, target_modules=["to_q", "to_out.0", "conv1", "proj_in"],
            rank_pattern={"to_q": 3}, alpha_pattern={"conv1": 0.7, "to_q": 1},
        )
    )  # fmt: skip
    encoder.add_adapter(LoraConfig(**options, target_modules=["q_proj", "fc1"], alpha_pattern={"fc1": 8}))
    weights = collect_lora(unet, encoder)
    folder = write_peft_lora(weights, tmp_path / "peft", base_model="owner/model")

    for name, trained in (("unet", unet), ("text_encoder", encoder)):
        fresh = type(trained).from_pretrained(BASE_MODEL, subfolder=name).float()
        loaded = PeftModel.from_pretrained(fresh, folder / name)
        again = loaded.load_adapter(folder / name, "again")
        assert not again.unexpected_keys
        assert not [key for key in again.missing_keys if "lora" in key]
        wanted = {path: layer for path, layer in trained.named_modules() if isinstance(layer, LoraLayer)}
        found = {
            path.removeprefix("base_model.model."): layer
            for path, layer in loaded.named_modules()
            if isinstance(layer, LoraLayer)
        }
        assert set(found) == set(wanted)
        assert len(wanted) == len(weights[name])
        for path, layer in wanted.items():
            assert torch.equal(found[path].get_delta_weight("default"), layer.get_delta_weight("default")), path
            if dora:
                magnitudes = [one.lora_magnitude_vector["default"].weight for one in (found[path], layer)]
                assert torch.equal(*magnitudes)


@pytest.mark.parametrize("sdxl", [False, True])
@pytest.mark.parametrize("classic", [False, True])
def test_what_peft_saved_is_read_whatever_transformers_calls_its_modules(sdxl, classic, tmp_path):
    torch.manual_seed(1)
    parts = tiny_parts(sdxl)
    models = {name: parts[name] for name in ("unet", "text_encoder", "text_encoder_2") if name in parts}
    for name, model in models.items():
        config = LoraConfig(
            r=4, lora_alpha=3, init_lora_weights=False, use_dora=True,
            target_modules=["to_q", "conv1"] if name == "unet" else ["q_proj", "fc1"],
            rank_pattern={"fc1": 2}, alpha_pattern={"conv1": 1, "fc1": 7, "mlp.fc1": 5},  # the first that fits counts
        )  # fmt: skip
        models[name] = get_peft_model(model, config)
        models[name].save_pretrained(tmp_path / name)
        if classic and name == "text_encoder":  # as transformers before 5.6 has it
            file = tmp_path / name / WEIGHTS_FILE
            prefix = "base_model.model."
            renamed = {
                prefix + classic_clip_path(key.removeprefix(prefix)): one for key, one in load_file(file).items()
            }
            save_file(renamed, file, {"format": "pt"})
            assert all(".text_model.encoder." in key for key in renamed)
    read = read_lora_file(tmp_path)
    wanted = collect_lora(**models)
    assert read.form is Form.PEFT
    assert {name: set(modules) for name, modules in read.weights.items()} == {
        name: set(m) for name, m in wanted.items()
    }
    for component, modules in wanted.items():
        for path, one in modules.items():
            found = read.weights[component][path]
            assert (found.alpha, found.rank) == (one.alpha, one.rank)
            assert all(torch.equal(found.tensors[part], tensor) for part, tensor in one.tensors.items())


def test_rank_stabilised_lora_keeps_its_scale_in_every_form(tmp_path):
    model = get_peft_model(
        tiny_parts()["unet"], LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=["to_q", "to_k"])
    )
    model.save_pretrained(tmp_path / "peft" / "unet")
    scale = {module.scale for module in collect_lora(model)["unet"].values()}
    source = str(tmp_path / "peft")
    for form, name in ((Form.KOHYA, "a.safetensors"), (Form.DIFFUSERS, "b"), (Form.PEFT, "c")):
        convert(source, str(tmp_path / name), form, family=Family.SD1)
        source = str(tmp_path / name)
        assert {module.scale for module in read_lora(Path(source))["unet"].values()} == scale


# --- what cannot be read or written ----------------------------------------------------------------------------------


def test_folders_without_a_lora_are_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(TrainingError, match=r"no LoRA found; wanted pytorch_lora.*notes\.txt"):
        read_lora(tmp_path)
    weights = {"unet": {"conv_in": module(4, 4, 3, 3)}}
    folder = write_peft_lora(weights, tmp_path / "peft")
    with pytest.raises(TrainingError, match="put it into a folder under that model's name"):
        read_lora(folder / "unet")
    (folder / "unet" / WEIGHTS_FILE).unlink()
    with pytest.raises(TrainingError, match="has no adapter_model"):
        read_lora(folder)
    (folder / "unet" / CONFIG_FILE).write_text("[")
    with pytest.raises(TrainingError, match="not a configuration of PEFT"):
        read_lora(folder)


def test_other_kinds_of_adapters_are_refused(tmp_path):
    get_peft_model(tiny_parts()["unet"], LoHaConfig(target_modules=["to_q"])).save_pretrained(tmp_path / "unet")
    with pytest.raises(TrainingError, match="a PEFT adapter of the kind LOHA; only LoRA"):
        read_lora(tmp_path)


def test_parts_that_only_peft_knows_are_refused(tmp_path):
    config = LoraConfig(target_modules=["to_q"], modules_to_save=["conv_in"])
    get_peft_model(tiny_parts()["unet"], config).save_pretrained(tmp_path / "unet")
    with pytest.raises(TrainingError, match=r"found conv_in\.bias, conv_in\.weight"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {TRAINED_ALPHA_KEY: "{"},
        {TRAINED_ALPHA_KEY: '{"unet": 2}', TRAINED_DTYPE_KEY: '{"unet": "int8"}'},
        {TRAINED_ALPHA_KEY: '{"unet": 2}', ROUNDING_KEY: '{"unet.conv_in": "AAAA"}'},
        {"lora_adapter_metadata": "[1]"},
    ],
)
def test_a_spoilt_header_is_one_clear_message(entry, tmp_path):
    names = {"unet.conv_in.lora.down.weight": (2, 4, 3, 3), "unet.conv_in.lora.up.weight": (4, 2, 1, 1)}
    save_file({name: torch.ones(shape) for name, shape in names.items()}, tmp_path / "a.safetensors", entry)
    with pytest.raises(TrainingError, match="its header's entries about the LoRA are spoilt"):
        read_lora(tmp_path / "a.safetensors")


def test_dora_on_some_modules_only_stays_in_kohyas_form(tmp_path):
    weights = real_modules(Family.SD1, torch.float16, dora=True)
    path, one = next(iter(weights["unet"].items()))
    weights["unet"][path] = LoraModule(one.down, one.up, one.alpha)
    there_and_back(weights, Form.KOHYA, Form.KOHYA, tmp_path, Family.SD1)
    for form in (Form.DIFFUSERS, Form.PEFT):
        with pytest.raises(RecipeError, match=rf"others, such as {path}, have not.*only kohya's form"):
            convert(str(tmp_path / "a.safetensors"), str(tmp_path / form), form)
        assert not (tmp_path / form).exists()


def test_a_module_of_zeros_is_kept_unless_it_was_filled_in(tmp_path):
    zeros = LoraModule(torch.zeros(2, 768), torch.zeros(768, 2), 2.0)
    attention = "text_model.encoder.layers.0.self_attn"
    weights = {
        "unet": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": zeros},
        "text_encoder": {f"{attention}.q_proj": module(768, 768)},
    }
    file = write_kohya_lora(weights, tmp_path / "a.safetensors", Family.SD1, {})
    assert any(key.endswith("self_attn_out_proj.lora_up.weight") for key in load_file(file))
    assert {name: set(modules) for name, modules in read_lora(file).items()} == {
        name: set(modules) for name, modules in weights.items()
    }


# --- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", Family)
def test_the_family_is_found_in_names_and_shapes(family):
    weights = real_modules(family, torch.float16, dora=False)
    assert possible_families(weights) == {family}
    unet = {path: one for path, one in weights["unet"].items() if path.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
    assert possible_families({"unet": unet}) == {family}
    blind = {path: one for path, one in unet.items() if ".attn1." in path}
    expected = {Family.SDXL} if family is Family.SDXL else {Family.SD1, Family.SD2}
    assert possible_families({"unet": blind}) == expected
    encoder = {"text_encoder": weights["text_encoder"]}
    assert possible_families(encoder) == ({Family.SD2} if family is Family.SD2 else {Family.SD1, Family.SDXL})
    if family is not Family.SDXL:
        assert possible_families({"unet": blind, **encoder}) == {family}
