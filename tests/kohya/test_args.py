"""The argument list: what sd-scripts' parser accepts, and each setting where it belongs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdtune.methods.fields import CheckpointFields, PublishFields
from sdtune.methods.kohya import KohyaDreamBoothLora, KohyaFields, KohyaNativeLora
from sdtune.training.components.lora_weights import Family
from sdtune.training.kohya.args import Places, kohya_args
from sdtune.training.kohya.base import KohyaBase
from sdtune.training.kohya.dataset import StagedDataset
from sdtune.training.kohya.shape import Shape
from tests.contracts.test_one_value import BESIDE, VALUES

# Written by tools/kohya_options.py from sd-scripts at the commit of containers/kohya/SD_SCRIPTS_COMMIT.
OPTIONS = {
    row.split()[0]: row.partition("  #")[0].split()[1:]
    for row in (Path(__file__).parent / "options.txt").read_text(encoding="utf-8").splitlines()
}
PLACES = Places(Path("/run/out"), Path("/run/logs"), "my cat", Path("/run/prompts.json"))
FOLDERS = StagedDataset([], [], trigger_words=["sks cat"], dataset_config=Path("/run/dataset.json"))
REGULARISED = StagedDataset([], [], dataset_config=Path("/run/dataset.json"), regularisation="as many")
CAPTIONED = StagedDataset([], [], train_data_dir=Path("/run/images"), in_json=Path("/run/metadata.json"))


def args_of(
    method: KohyaFields,
    family: Family = Family.SD1,
    dataset: StagedDataset = FOLDERS,
    v_parameterization: bool = False,
    shape: Shape = Shape(),  # noqa: B008
) -> list[str]:
    base = KohyaBase(Path("/base"), family, v_parameterization, 512, Path("/tokenizers"), shape)
    resolved = method.model_copy(update={"resolution": method.resolution or 512, "mixed_precision": "no"})
    return kohya_args(resolved, base, dataset, PLACES)


def accept(arguments: list[str]) -> None:
    """What argparse would do with the options of options.txt."""
    several = None
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            assert several, argument
            continue
        kind, *rest = OPTIONS[name]
        several = name if "*" in rest else None
        choices = [word for word in rest if word != "*"]
        if kind == "switch":
            assert not equals, argument
        elif not several or equals:
            assert value, argument
            {"int": int, "float": float, "int_or_float": float}.get(kind, str)(value)
            assert not choices or value in choices, argument
    assert len({argument.partition("=")[0] for argument in arguments if argument.startswith("--")}) == len(
        [argument for argument in arguments if argument.startswith("--")]
    )


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("method", [KohyaDreamBoothLora(), KohyaNativeLora()])
def test_the_parser_accepts_the_defaults(method: KohyaFields, family: Family) -> None:
    accept(args_of(method, family, v_parameterization=family is Family.SD2))


# What acts on the run but not through an option: on the base model's place, the prompts, the process, the launcher.
ELSEWHERE = {"base_model", "revision", "v_parameterization", "sample_prompt", "num_samples", "sample_steps"}
ELSEWHERE |= {"guidance_scale", "mixed_precision", "class_data_dir", "held_out_images", "held_out_every"}
ELSEWHERE |= {*PublishFields.model_fields, *CheckpointFields.model_fields}


@pytest.mark.parametrize("field", [name for name in KohyaDreamBoothLora.model_fields if name not in ELSEWHERE])
def test_every_setting_changes_the_arguments(field: str) -> None:
    fields = KohyaDreamBoothLora.model_fields
    beside: dict[str, Any] = {name: value for name, value in BESIDE.get(field, {}).items() if name in fields}
    without = KohyaDreamBoothLora.from_settings(beside)
    changed = KohyaDreamBoothLora.from_settings({**beside, field: VALUES[field]})
    dataset = REGULARISED if field == "prior_loss_weight" else FOLDERS
    arguments = args_of(changed, dataset=dataset)
    accept(arguments)
    assert arguments != args_of(without, dataset=dataset)


def test_a_learning_rate_reaches_both_parts_unless_they_have_their_own() -> None:
    arguments = args_of(KohyaNativeLora(learning_rate=5e-5))
    assert "--learning_rate=5e-05" in arguments
    assert not [argument for argument in arguments if argument.startswith(("--unet_lr", "--text_encoder_lr"))]
    assert "--network_train_unet_only" not in arguments
    arguments = args_of(KohyaNativeLora(learning_rate=5e-5, text_encoder_lr=1e-6))
    assert {"--learning_rate=5e-05", "--text_encoder_lr=1e-06"} <= set(arguments)


def test_booleans_are_switches() -> None:
    assert "--network_train_unet_only" in args_of(KohyaNativeLora(train_text_encoder=False))
    assert "--enable_bucket" not in args_of(KohyaNativeLora(enable_bucket=False))
    assert not [argument for argument in args_of(KohyaNativeLora()) if argument.endswith(("=True", "=False"))]


@pytest.mark.parametrize(
    ("resolution", "shortest", "longest"), [(64, 64, 128), (512, 256, 1024), (768, 384, 1536), (520, 256, 1088)]
)
def test_buckets_fit_the_resolution(resolution: int, shortest: int, longest: int) -> None:
    arguments = args_of(KohyaNativeLora(resolution=resolution))
    assert {f"--min_bucket_reso={shortest}", f"--max_bucket_reso={longest}"} <= set(arguments)


def test_buckets_of_a_small_unet_are_finer() -> None:
    arguments = args_of(KohyaNativeLora(resolution=128), shape=Shape(bucket_steps=16))
    assert {"--min_bucket_reso=64", "--max_bucket_reso=256", "--bucket_reso_steps=16"} <= set(arguments)


def test_families() -> None:
    assert not {"--v2", "--v_parameterization", "--no_half_vae"} & set(args_of(KohyaNativeLora()))
    assert {"--v2", "--v_parameterization"} <= set(args_of(KohyaNativeLora(), Family.SD2, v_parameterization=True))
    assert "--no_half_vae" in args_of(KohyaNativeLora(), Family.SDXL)


def test_datasets() -> None:
    captioned = args_of(KohyaNativeLora(), dataset=CAPTIONED)
    assert {"--in_json=/run/metadata.json", "--train_data_dir=/run/images"} <= set(captioned)
    accept(captioned)
    regularised = args_of(KohyaDreamBoothLora(class_data_dir="/mine", prior_loss_weight=0.5), dataset=REGULARISED)
    assert {"--dataset_config=/run/dataset.json", "--prior_loss_weight=0.5"} <= set(regularised)
    assert not [argument for argument in regularised if argument.startswith("--train_data_dir")]
    assert "--metadata_trigger_phrase=sks cat" in args_of(KohyaDreamBoothLora())


def test_convolutions_and_optimizers() -> None:
    arguments = args_of(KohyaNativeLora(conv_dim=8))
    at = arguments.index("--network_args")
    assert arguments[at + 1 : at + 3] == ["conv_dim=8", "conv_alpha=8.0"]
    arguments = args_of(KohyaNativeLora(optimizer_type="AdaFactor", optimizer_args=("clip_threshold=2",)))
    at = arguments.index("--optimizer_args")
    assert "relative_step=False" in arguments[at:]
    assert "clip_threshold=2" in arguments[at:]
