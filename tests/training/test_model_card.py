"""The model card: what it says, that the Hub can read it, that its program runs, and what it keeps to itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

from sdtune import events
from sdtune.methods.catalog import METHODS
from sdtune.training.components.base_facts import BaseFacts, License, base_facts
from sdtune.training.components.model_card import CardFacts, DataCounts, Record, model_card
from sdtune.training.run import Run
from tests.conftest import BASE_MODEL
from tests.training.conftest import EntryPoint

pytestmark = pytest.mark.usefixtures("small")

PROMPT = "a photo of sks cat"
BASE = BaseFacts("someone/base", on_hub=True, single_file=False, license=License("mit", "mit"))


def facts(name: str = "dreambooth-lora", **settings: Any) -> CardFacts:
    method = METHODS[name]
    wanted = {"instance_prompt": PROMPT, "base_model": "someone/base", "sample_prompt": [PROMPT], **settings}
    return CardFacts(
        name="my cat",
        method=method.from_settings({key: value for key, value in wanted.items() if key in method.model_fields}),
        base=BASE,
        record=Record(
            files={"lora": ["pytorch_lora_weights.safetensors"], "kohya_lora": ["my cat.safetensors"]},
            measures=[events.Measure("held_out_loss", step, loss) for step, loss in ((0, 0.5), (2, 0.4), (4, 0.3))],
            samples={step: {PROMPT: [f"samples/{step}-0.png", f"samples/{step}-1.png"]} for step in (0, 2, 4)},
            data=DataCounts(pictures=8, shown=24, captions=3, held_out=2),
            class_pictures=12,
            trigger_words=[PROMPT],
        ),
        loss=0.25,
        seconds=3725.0,
        machine="NVIDIA L4",
        versions={"sdtune": "1", "torch": "2"},
    )


def test_the_hub_can_read_it() -> None:
    card = ModelCard(model_card(facts()))
    assert card.data.to_dict() == {
        "base_model": "someone/base",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "mit",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "stable-diffusion", "diffusers", "lora", "dreambooth", "sdtune"],
        "instance_prompt": PROMPT,
        "widget": [{"text": PROMPT, "output": {"url": "samples/4-0.png"}}],
        "model-index": [
            {
                "name": "my cat",
                "results": [
                    {
                        "task": {"type": "text-to-image"},
                        "dataset": {"name": "pictures kept out of training", "type": "imagefolder"},
                        "metrics": [{"type": "loss", "value": 0.3, "name": "denoising loss"}],
                    }
                ],
            }
        ],
    }


def test_it_says_what_was_trained() -> None:
    text = model_card(facts(learning_rate=2e-4))
    for words in (
        "A LoRA for Stable Diffusion, to put on [someone/base](https://huggingface.co/someone/base). "
        f"It has learned `{PROMPT}` from 8 pictures.",
        "| before | ![a photo of sks cat](samples/0-0.png) | ![a photo of sks cat](samples/0-1.png) |",
        "| after 4 steps | ![a photo of sks cat](samples/4-0.png) |",
        f"Put this into the prompt: `{PROMPT}`",
        "put `my cat.safetensors` into `models/Lora`",
        "`<lora:my cat:1>`",
        "| pictures | 8, 24 with repeats |",
        "| different captions | 3 |",
        "| kept out of training | 2 |",
        "| class pictures | 12 |",
        "| loss on pictures kept out of training | 0.5000 before, 0.3000 after |",
        "| time | 1 h 2 min on NVIDIA L4 |",
        "| made with | sdtune 1, torch 2 |",
        "That of the base model, `someone/base`: mit.",
    ):
        assert words in text, words
    changed, _, rest = text.partition("<details>")
    assert "| `learning_rate` | 0.0002 |" in changed
    assert "| `rank` | 16 |" in rest
    assert "push_to_hub" not in text
    assert model_card(facts(learning_rate=2e-4)) == text


def test_a_whole_model_is_opened_and_not_put_on_another() -> None:
    whole = facts("dreambooth")
    whole.record.files = {"model": ["."], "single_file": ["my cat.safetensors"]}
    text = model_card(whole)
    assert ModelCard(text).data.to_dict()["base_model_relation"] == "finetune"
    assert "lora" not in ModelCard(text).data.tags
    assert 'DiffusionPipeline.from_pretrained("my cat", dtype=torch.float16)' in text
    assert "put `my cat.safetensors` into `models/Stable-diffusion`" in text
    assert "load_lora_weights" not in text


def test_captions_take_the_place_of_trigger_words() -> None:
    captioned = facts("text-to-image-lora")
    captioned.record.trigger_words = []
    text = model_card(captioned)
    assert "It has learned from 8 captioned pictures." in text
    assert "There is no trigger word." in text
    assert "dreambooth" not in ModelCard(text).data.tags
    assert "instance_prompt" not in ModelCard(text).data.to_dict()


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        ("dreambooth-lora", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction')"),
        (
            "dreambooth-lora",
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            "prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing')",
        ),
        ("kohya-native-lora", {"v_parameterization": True}, "prediction_type='v_prediction')"),
    ],
)
def test_a_lora_is_drawn_with_the_schedule_it_was_trained_with(
    method: str, settings: dict[str, Any], told: str
) -> None:
    text = model_card(facts(method, **settings))
    assert f"pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, {told}" in text
    assert "from diffusers import DDIMScheduler, DiffusionPipeline" in text
    assert "It predicts the velocity" in text
    assert "DDIMScheduler" not in model_card(facts(method))


def test_layers_are_left_out_as_in_training() -> None:
    assert "clip_skip=1)" in model_card(facts(clip_skip=1))
    assert "clip_skip=1)" in model_card(facts("kohya-native-lora", clip_skip=2))
    assert "clip_skip" not in model_card(facts("kohya-native-lora", clip_skip=1)).partition("## Training")[0]


def test_no_folder_of_this_machine_is_told(tmp_path: Path) -> None:
    base = tmp_path / "sd15"
    base.mkdir()
    own = facts(
        base_model=str(base), with_prior_preservation=True, class_prompt="a cat", class_data_dir=str(tmp_path / "class")
    )
    text = model_card(replace(own, base=base_facts(str(base))))
    assert str(tmp_path) not in text
    assert "to put on `sd15`" in text
    assert "| `class_data_dir` | `class` |" in text
    # The Hub would take it for a model of its own.
    assert not {"base_model", "base_model_relation", "license"} & set(ModelCard(text).data.to_dict())
    assert "not known here; see the base model's own page" in text


@pytest.mark.parametrize(
    "prompt", ["a | b", "`c`", "<b>*d* [e](f)</b>", "g\n---\nh: i", "---", "x" * 10_000, "``` '\" \\"]
)
def test_awkward_prompts_break_nothing(prompt: str) -> None:
    awkward = facts(instance_prompt=prompt, sample_prompt=[prompt])
    awkward.record.trigger_words = [prompt]
    awkward.record.samples = {0: {prompt: ["a.png"]}, 4: {prompt: ["b.png"]}}
    card = ModelCard(model_card(awkward))
    assert card.data.to_dict()["instance_prompt"] == prompt
    assert card.text.startswith("\n# my cat\n")
    for row in re.findall(r"^\|.*$", card.text, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) in (3, 4), row[:200]
    assert "<b>" not in re.sub(r"```.*?^```|`[^`]*`", "", card.text, flags=re.DOTALL | re.MULTILINE)
    calls = [node for node in ast.walk(ast.parse(program(card.text))) if isinstance(node, ast.Call)]
    drawn_from = [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "pipeline"]
    assert drawn_from == [prompt]


def program(text: str) -> str:
    """The Python in a card."""
    found = re.search(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize(
    ("name", "more"),
    [("dreambooth-lora", {}), ("dreambooth", {}), ("peft-dreambooth-lora", {"adapter": "loha"})],
)
def test_the_program_of_a_real_card_draws(
    name: str, more: dict[str, Any], settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path,
    entry_point: EntryPoint,
) -> None:  # fmt: skip
    """As it stands, but for a machine without a GPU."""
    fields = METHODS[name].model_fields
    recipe = METHODS[name].from_settings({key: value for key, value in {**settings, **more}.items() if key in fields})
    output = tmp_path / "out"
    output.mkdir()
    (output / "README.md").write_text("of an earlier run")
    arguments = ["train", name, f"--dataset={pictures()}", f"--output={output}", *recipe.to_args()]
    code, told, errors = entry_point(arguments)
    assert code == 0, errors
    assert [event.kind for event in told if isinstance(event, events.Artifact)][-2:] == ["card", "recipe"]

    text = (output / "README.md").read_text()
    assert str(tmp_path) not in text
    assert str(BASE_MODEL.parent) not in text
    assert "license: apache-2.0" in text
    assert "It has learned `a photo of sks cat` from 3 pictures." in text
    for picture in re.findall(r"\]\((samples/[^)]*|contact_sheet.png)\)", text):
        assert Image.open(output / picture)
    assert len(re.findall(r"\]\(samples/", text)) == 2

    (tmp_path / "base-model").symlink_to(BASE_MODEL)
    draws = program(text).replace('"cuda"', '"cpu"').replace("torch.float16", "torch.float32")
    drawn = subprocess.run([sys.executable, "-c", draws], cwd=tmp_path, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert Image.open(tmp_path / "picture.png").size == (128, 128)
    assert "not expected" not in drawn.stderr


def test_a_new_run_takes_the_old_card_away(settings: dict[str, Any], tmp_path: Path) -> None:
    method = METHODS["dreambooth-lora"].from_settings(settings)
    (tmp_path / "README.md").write_text("of an earlier run")
    with Run.open(method, tmp_path, tmp_path) as run:
        assert (tmp_path / "README.md").exists()
        run.begin(method)
        assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("said", "license"),
    [
        ("CreativeML Open RAIL-M", License("creativeml-openrail-m", "CreativeML Open RAIL-M")),
        ("mit", License("mit", "mit")),
        ("Only for  my friends", License("other", "Only for my friends", "only-for-my-friends")),
        ("https://a.b/terms", License("other", "https://a.b/terms", "https-a.b-terms", "https://a.b/terms")),
        ("", None),
    ],
)
def test_the_licence_of_a_file_is_in_its_header(said: str, license: License | None, tmp_path: Path) -> None:
    file = tmp_path / "anything.safetensors"
    save_file({"weight": torch.zeros(1)}, file, {"modelspec.license": said})
    found = base_facts(str(file))
    assert found.license == license
    assert (found.name, found.single_file, found.on_hub) == ("anything.safetensors", True, False)


def test_a_single_file_is_opened_as_one(tmp_path: Path) -> None:
    own = facts()
    own.record.sdxl = True
    base = replace(BASE, name="anything.safetensors", on_hub=False, single_file=True)
    text = model_card(replace(own, base=base))
    assert 'StableDiffusionXLPipeline.from_single_file("anything.safetensors", dtype=torch.float16)' in text
    assert "stable-diffusion-xl" in ModelCard(text).data.tags


def test_without_a_network_the_licence_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert base_facts("someone/nothing-here") == BaseFacts("someone/nothing-here", True, False, None)


def test_a_model_in_a_bucket_is_named_by_its_last_part() -> None:
    assert base_facts("gs://bucket/models/sd15.safetensors") == BaseFacts("sd15.safetensors", False, True, None)


def test_the_revision_is_part_of_the_program() -> None:
    text = model_card(facts(revision="fp16"))
    assert 'from_pretrained("someone/base", dtype=torch.float16, revision="fp16")' in text


def test_adapters_that_only_peft_reads_are_loaded_by_it() -> None:
    own = facts("peft-dreambooth-lora", adapter="oft")
    own.record.files = {"peft": ["unet", "text_encoder"]}
    text = model_card(own)
    assert "Adapters of the kind OFT for Stable Diffusion" in text
    assert 'pipeline.unet = PeftModel.from_pretrained(pipeline.unet, "my cat", subfolder="unet")' in text
    assert 'PeftModel.from_pretrained(pipeline.text_encoder, "my cat", subfolder="text_encoder")' in text
    assert ModelCard(text).data.tags[3:5] == ["oft", "dreambooth"]
    assert "web UI" not in text
