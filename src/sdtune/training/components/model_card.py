"""The model card: what a run made, for people and for the Hugging Face Hub. Facts in, text out; nothing is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sdtune import events
from sdtune.methods.fields import CommonFields, PublishFields
from sdtune.methods.ledger import Layout
from sdtune.methods.places import BUCKETS
from sdtune.training.components.base_facts import BaseFacts
from sdtune.training.components.kohya_metadata import public_name

CARD_FILE = "README.md"
MOST_SAMPLES = 4
"""Pictures of one prompt that are shown."""
LONGEST = 200
"""Characters of a prompt that are shown where it is not needed word for word."""


@dataclass(frozen=True)
class DataCounts:
    """The training pictures: how many, in one round with their repeats, with how many different captions."""

    pictures: int
    shown: int
    captions: int
    held_out: int = 0


@dataclass
class Record:
    """What a run has told and found, remembered for its card.

    files: of the result, by the kind of artifact, relative to the output. samples: by step and prompt. sdxl: the
    base model is one.
    """

    files: dict[str, list[str]] = field(default_factory=dict)
    measures: list[events.Measure] = field(default_factory=list)
    samples: dict[int, dict[str, list[str]]] = field(default_factory=dict)
    data: DataCounts | None = None
    class_pictures: int = 0
    trigger_words: list[str] = field(default_factory=list)
    sdxl: bool = False

    def file(self, kind: str) -> str | None:
        """The first file of this kind."""
        return next(iter(self.files.get(kind, [])), None)


@dataclass(frozen=True)
class CardFacts:
    """Everything that the card says. method: resolved; hub_id: of the repository it is uploaded to."""

    name: str
    method: CommonFields
    base: BaseFacts
    record: Record
    loss: float
    seconds: float
    machine: str
    versions: Mapping[str, str]
    hub_id: str | None = None

    @property
    def whole(self) -> bool:
        """The result is a whole model; else it is put on one."""
        return "model" in self.record.files

    @property
    def adapter(self) -> str:
        """What is put on the base model."""
        kind = str(self.method.settings().get("adapter", "lora"))
        return {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}.get(kind, kind.upper())

    @property
    def family(self) -> str:
        return "Stable Diffusion XL" if self.record.sdxl else "Stable Diffusion"

    @property
    def sampled(self) -> list[int]:
        """The steps to compare: before the first and after the last, as far as samples were drawn."""
        steps = sorted(self.record.samples)
        return steps if len(steps) < 2 else [steps[0], steps[-1]]

    @property
    def held_out(self) -> list[events.Measure]:
        """The held-out loss before and after training."""
        measured = [measure for measure in self.record.measures if measure.name == "held_out_loss"]
        return measured if len(measured) < 2 else [measured[0], measured[-1]]

    @property
    def measured_on(self) -> str:
        return (
            "pictures kept out of training" if self.record.data and self.record.data.held_out else "training pictures"
        )


def model_card(facts: CardFacts) -> str:
    """README.md: front matter that the Hub reads, then the card."""
    parts = [
        f"# {_plain(facts.name)}", _lead(facts), *_samples(facts), *_trigger_words(facts), *_use(facts),
        *_training(facts), *_settings(facts), *_license(facts),
    ]  # fmt: skip
    return str(ModelCard(f"---\n{front_matter(facts).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def front_matter(facts: CardFacts) -> ModelCardData:
    """The card's metadata. A base model that is not on the Hub is not named: the Hub would take it for one that is."""
    license, base = facts.base.license, facts.base
    dreambooth = facts.method.layout is not Layout.CAPTIONED
    tags = [
        "text-to-image", "stable-diffusion-xl" if facts.record.sdxl else "stable-diffusion", "diffusers",
        *([] if facts.whole else [facts.adapter.lower()]), *(["dreambooth"] if dreambooth else []), "sdtune",
    ]  # fmt: skip
    more: dict[str, Any] = {}
    if base.on_hub:
        more["base_model_relation"] = "finetune" if facts.whole else "adapter"
    if facts.record.trigger_words:
        more["instance_prompt"] = facts.record.trigger_words[0]
    if facts.record.samples:
        last = facts.record.samples[facts.sampled[-1]]
        more["widget"] = [{"text": prompt, "output": {"url": paths[0]}} for prompt, paths in last.items()]
    return ModelCardData(
        base_model=base.name if base.on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license.id if license else None,
        license_name=license.name if license else None,
        license_link=license.link if license else None,
        tags=tags,
        model_name=facts.name if facts.held_out else None,
        eval_results=_eval_results(facts) or None,
        **more,
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="imagefolder",
            dataset_name=facts.measured_on,
            metric_type="loss",
            metric_name="denoising loss",
            metric_value=measure.value,
        )
        for measure in facts.held_out[-1:]
    ]


def _lead(facts: CardFacts) -> str:
    base = facts.base.name
    named = f"[{base}](https://huggingface.co/{base})" if facts.base.on_hub else f"`{base}`"
    kind = f"A {facts.family} model, fine-tuned from {named}"
    if not facts.whole:
        one = "A LoRA" if facts.adapter == "LoRA" else f"Adapters of the kind {facts.adapter}"
        kind = f"{one} for {facts.family}, to put on {named}"
    learned = ""
    if facts.record.trigger_words:
        learned = f" It has learned {_and(_code(word) for word in facts.record.trigger_words)}"
        learned += f" from {_count(facts.record.data.pictures, 'picture')}." if facts.record.data else "."
    elif facts.record.data:
        learned = f" It has learned from {_count(facts.record.data.pictures, 'captioned picture')}."
    return f"{kind}.{learned}"


def _trigger_words(facts: CardFacts) -> list[str]:
    words = facts.record.trigger_words
    if words:
        text = "Put this into the prompt:" if len(words) == 1 else "Put one of these into the prompt:"
        return ["## Trigger words", f"{text} {_and(map(_code, words), 'or')}"]
    return ["## Prompts", "There is no trigger word. Write prompts in the manner of the captions it was trained on."]


def _use(facts: CardFacts) -> list[str]:
    return ["## Use it", "With [diffusers](https://huggingface.co/docs/diffusers):", _python(facts), *_web_uis(facts)]


def _python(facts: CardFacts) -> str:
    """A program that draws one picture. The names are those of folders beside it, or of repositories of the Hub."""
    result, base = facts.hub_id or facts.name, facts.base
    kind, opened = "DiffusionPipeline", "from_pretrained"
    if base.single_file and not facts.whole:
        kind, opened = f"StableDiffusion{'XL' if facts.record.sdxl else ''}Pipeline", "from_single_file"
    prompt = next((prompt for step in facts.sampled[-1:] for prompt in facts.record.samples[step]), None)
    prompt = prompt or next(iter(facts.record.trigger_words), "a photo of a cat")
    lora = facts.record.file("lora")
    peft = facts.record.files.get("peft", []) if lora is None else []
    revision = facts.method.revision
    place = [_literal(result if facts.whole else base.name), "dtype=torch.float16"]
    place += [f"revision={_literal(revision)}"] if revision and not facts.whole else []
    schedule = _schedule(facts.method)
    kinds = ", ".join([*(["DDIMScheduler"] if schedule and not facts.whole else []), kind])
    lines = ["import torch", f"from diffusers import {kinds}", *(["from peft import PeftModel"] if peft else []), ""]
    lines += [f"pipeline = {kind}.{opened}({', '.join(place)})"]
    lines += [
        f"pipeline.{part} = PeftModel.from_pretrained(pipeline.{part}, {_literal(result)}, subfolder={_literal(part)})"
        for part in peft
    ]
    if schedule and not facts.whole:
        told = ", ".join(f"{name}={value!r}" for name, value in schedule.items())
        lines.append(f"pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, {told})")
    lines.append('pipeline.to("cuda")')
    if lora is not None:
        lines.append(f"pipeline.load_lora_weights({_literal(result)}, weight_name={_literal(lora)})")
    options = [_literal(prompt), *_options(facts.method)]
    lines.append(f'pipeline({", ".join(options)}).images[0].save("picture.png")')
    return "```python\n" + "\n".join(lines) + "\n```"


def _schedule(method: CommonFields) -> dict[str, object]:
    """What the run changed of the base model's noise schedule, by diffusers' names; a LoRA is drawn with it too."""
    settings = method.settings()
    changed: dict[str, object] = {}
    if settings.get("v_parameterization") is not None:
        changed["prediction_type"] = "v_prediction" if settings["v_parameterization"] else "epsilon"
    if settings.get("prediction_type"):
        changed["prediction_type"] = settings["prediction_type"]
    if settings.get("rescale_betas_zero_snr") or settings.get("zero_terminal_snr"):
        changed |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changed


def _schedule_of_uis(method: CommonFields) -> list[str]:
    if not (changed := _schedule(method)):
        return []
    kind = (
        "predicts the velocity"
        if changed.get("prediction_type", "v_prediction") == "v_prediction"
        else "predicts the noise"
    )
    zero = " with noise that ends in pure noise (zero terminal SNR)" if "rescale_betas_zero_snr" in changed else ""
    return [
        f"It {kind}{zero}, and is drawn so alone: in ComfyUI by the node *ModelSamplingDiscrete*, elsewhere by the "
        "settings of the model."
    ]


def _options(method: CommonFields) -> list[str]:
    """What the samples were drawn with."""
    skipped = method.settings().get("clip_skip") or 0
    # sd-scripts counts the last layer as 1, as web UIs do; diffusers counts what it leaves out.
    skipped -= 1 if method.container == "kohya" and skipped else 0
    options = [f"num_inference_steps={method.sample_steps}", f"guidance_scale={method.guidance_scale:g}"]
    return options + ([f"clip_skip={skipped}"] if skipped else [])


def _web_uis(facts: CardFacts) -> list[str]:
    if (lora := facts.record.file("kohya_lora")) is not None:
        stem = lora.removesuffix(".safetensors")
        return [
            f"With a web UI: put {_code(lora)} into `models/Lora` of A1111, Forge or SD.Next and write "
            f"{_code(f'<lora:{stem}:1>')} into the prompt, or into `models/loras` of ComfyUI and load it with "
            "*Load LoRA*.",
            *_schedule_of_uis(facts.method),
        ]
    if (single := facts.record.file("single_file")) is not None:
        return [
            f"With a web UI: put {_code(single)} into `models/Stable-diffusion` of A1111, Forge or SD.Next, or into "
            "`models/checkpoints` of ComfyUI."
        ]
    return []


def _samples(facts: CardFacts) -> list[str]:
    """Of each prompt, a row before training and one after it; the same column began with the same noise."""
    steps, record, method = facts.sampled, facts.record, facts.method
    if not steps:
        return []
    blocks = []
    for prompt, last in record.samples[steps[-1]].items():
        rows = []
        for step in steps:
            paths = record.samples[step].get(prompt, [])[:MOST_SAMPLES]
            label = "before" if step == 0 else f"after {step} steps"
            rows.append([label, *(f"![{_plain(prompt, 60)}]({path})" for path in paths)])
        blocks += [f"“{_plain(prompt)}”", _table([""] * (1 + len(last[:MOST_SAMPLES])), rows)]
    drawn = (
        f"Pictures under each other began with the same noise. {method.sample_steps} steps, "
        f"guidance {method.guidance_scale:g}, {method.resolution} px, seeds from {method.seed} on."
    )
    # It shows the training pictures, so it is not uploaded.
    sheet = record.file("contact_sheet")
    beside = [f"[All of them beside the training pictures]({sheet})"] if sheet and not facts.hub_id else []
    return ["## Before and after", *blocks, drawn, *beside]


def _training(facts: CardFacts) -> list[str]:
    record, rows = facts.record, [["method", _code(f"sdtune train {facts.method.name}")]]
    if data := record.data:
        rows.append(["pictures", f"{data.pictures}" + (f", {data.shown} with repeats" * (data.shown > data.pictures))])
        rows.append(["different captions", f"{data.captions}"])
        if data.held_out:
            rows.append(["kept out of training", f"{data.held_out}"])
    if record.class_pictures:
        rows.append(["class pictures", f"{record.class_pictures}"])
    rows.append(["steps", f"{facts.method.max_train_steps}"])
    rows.append(["loss over the last tenth", f"{facts.loss:.4f}"])
    if len(facts.held_out) == 2:
        before, after = facts.held_out
        rows.append([f"loss on {facts.measured_on}", f"{before.value:.4f} before, {after.value:.4f} after"])
    rows.append(["time", f"{_duration(facts.seconds)} on {_plain(facts.machine)}"])
    rows.append(["made with", ", ".join(f"{name} {version}" for name, version in facts.versions.items())])
    return ["## Training", _table(["", ""], rows)]


def _settings(facts: CardFacts) -> list[str]:
    """Those that are not the method's defaults, and folded away, the rest."""
    method = facts.method
    fields = [name for name in type(method).model_fields if name not in PublishFields.model_fields]
    changed = [name for name in fields if getattr(method, name) != type(method).model_fields[name].default]
    rows = {name: [_code(name), _value(getattr(method, name))] for name in fields}
    rest = [rows[name] for name in fields if name not in changed]
    return [
        "## Settings",
        _table(["setting", "value"], [rows[name] for name in changed]),
        "<details>\n<summary>All others, which are the defaults</summary>",
        _table(["setting", "value"], rest),
        "</details>",
    ]


def _value(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "<br>".join(_code(_short(str(one))) for one in value)
    if isinstance(value, str):
        # A folder of this machine or of a bucket is told by its last part.
        place = PurePath(value).is_absolute() or value.startswith(("~", "./", "../", BUCKETS))
        return _code(_short(public_name(value) if place else value))
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _license(facts: CardFacts) -> list[str]:
    license, base = facts.base.license, facts.base
    page = f"[its page](https://huggingface.co/{base.name})" if base.on_hub else "the base model's own page"
    if license is None:
        return ["## Licence", f"That of the base model, {_code(base.name)}, which is not known here; see {page}."]
    named = f"[{_plain(license.text)}]({license.link})" if license.link else _plain(license.text)
    return ["## Licence", f"That of the base model, {_code(base.name)}: {named}."]


# --- Markdown --------------------------------------------------------------------------------------------------------


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _plain(text: str, longest: int = LONGEST) -> str:
    """``text`` as it stands, whatever Markdown and HTML would make of it, on one line."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", escape(_short(" ".join(text.split()), longest), quote=False))


def _code(text: str) -> str:
    """``text`` as a code span, on one line; also in a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    ticks = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _literal(text: str) -> str:
    """A Python string: JSON's are among them."""
    return json.dumps(text, ensure_ascii=False)


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _and(words: Iterable[str], last: str = "and") -> str:
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{left} s"
