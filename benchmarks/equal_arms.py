"""The trainings that equal_math.py compares, by the product's own parts; a process of its own, which it starts.

    python benchmarks/equal_arms.py NUMBER PLAN

PLAN is JSON (``Plan``); two processes, 0 and 1, share it. Of its own cases (``Case.process``) each trains the arms that
are compared in one process and writes what it found to SCRATCH/CASE/first.json. Then it takes the other's cases: trains
undisturbed what the other did, goes on from the checkpoint that the other left, and writes second.json.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from accelerate.state import AcceleratorState
from equal_math import DATASET, MODEL_INDEX, STEPS_TO_LOOK_AT, Case, Plan
from random_models import make_model
from safetensors.torch import load_file, save_file

from sdtune import events
from sdtune.methods.resuming import CHECKPOINTS, Asked, name_of
from sdtune.methods.text_to_image import TextToImage, TextToImageLora
from sdtune.training.components import loop, models, text
from sdtune.training.components.captured import CudaGraph
from sdtune.training.components.data import CachedImages
from sdtune.training.components.held_out import HeldOutLoss
from sdtune.training.components.text import Conditioning
from sdtune.training.destinations import Destinations
from sdtune.training.restarts import Beginning, find_beginning
from sdtune.training.run import Run
from sdtune.training.trainers import text_to_image, text_to_image_lora

STANDARD_DEVIATION = {"lora_A": 0.1, "lora_B": 0.05}
"""Of a LoRA's matrices at the beginning; as a run begins, with up matrices of zero, down ones have no gradient."""
AT_ONCE = 2**26
SECONDS_BETWEEN_LOOKS = 0.2
LARGE = 2**30
"""Bytes of gradients that do not wait on the GPU for those that they are compared with: the other process is there."""


@dataclass(frozen=True)
class Arm:
    """How a case is trained. half: in its own type, else float32. kernels: fused. graph: recorded.

    checkpoint: after half of the steps. goes_on: from that checkpoint.
    """

    name: str
    half: bool = True
    kernels: bool = True
    graph: bool = True
    checkpoint: bool = False
    goes_on: bool = False


REFERENCE = Arm("eager float32", half=False, kernels=False, graph=False)
PLAIN = Arm("captured", kernels=False)
OURS = Arm("captured and fused", checkpoint=True)
AGAIN = Arm("undisturbed, another process")
RESUMED = Arm("resumed, another process", goes_on=True)


@dataclass
class Seen:
    """What one training did. losses: by step. gradients: of each weight, by step, as the optimizer was given them.

    trained: the masters at the end, and ``change`` the most that an entry of them moved. graphs: recorded;
    fused: the kernels are in the UNet. below: share of the entries whose update in one step is lost where weights are
    kept in bfloat16, survived: share of those that got it. overflowed: steps whose gradients did.
    """

    losses: dict[int, float] = field(default_factory=dict)
    gradients: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    trained: list[torch.Tensor] = field(default_factory=list)
    change: float = 0.0
    graphs: int = 0
    fused: bool = False
    below: float | None = None
    survived: float | None = None
    overflowed: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def told(self) -> dict[str, Any]:
        """What goes into the JSON."""
        kept = ("losses", "change", "graphs", "fused", "below", "survived", "overflowed", "warnings", "seconds")
        return {name: getattr(self, name) for name in kept}


class EnoughError(Exception):
    """The last step is made; the checkpoint that follows on it is of no use here."""


def train(case: Case, arm: Arm, plan: Plan) -> Seen:
    """The case by its trainer, from loading the model to the last step."""
    seen, started = Seen(), time.perf_counter()
    AcceleratorState._reset_state(reset_partial_state=True)
    method = method_of(case, arm, plan)
    folder = plan.scratch / case.name
    output = folder / arm.name.split()[0].rstrip(",")
    beginning = Beginning(asked := Asked(str(DATASET)))
    if arm.goes_on:
        # All that a kill after that step leaves.
        (output / CHECKPOINTS).mkdir(parents=True)
        left = name_of(plan.steps // 2)
        (folder / OURS.name.split()[0] / CHECKPOINTS / left).rename(output / CHECKPOINTS / left)
        beginning = find_beginning(method, asked, output, Destinations())
    trainer = text_to_image if case.whole else text_to_image_lora
    with (
        _as(arm, seen),
        _same_inputs(plan.scratch / case.inputs, trainer),
        _watched(trainer, seen, plan, survey=arm is OURS),
        Run.open(method, DATASET, output, beginning=beginning) as run,
        contextlib.suppress(EnoughError),
    ):
        trainer.train(cast(Any, method), run)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    seen.seconds = round(time.perf_counter() - started, 1)
    return seen


def method_of(case: Case, arm: Arm, plan: Plan) -> TextToImage | TextToImageLora:
    """The case as a user would ask for it."""
    settings = {
        "base_model": str(plan.models[case.family]), "resolution": case.resolution, "train_batch_size": case.batch,
        "max_train_steps": plan.steps, "mixed_precision": case.precision if arm.half else "no", "num_samples": 0,
        "checkpointing_minutes": 0, "checkpointing_steps": plan.steps // 2 if arm.checkpoint else 0,
        "enable_bucket": False, "learning_rate": case.learning_rate,
        # Step 1 changes nothing, so that the gradient of step 2, which a graph gives, is of the same weights.
        "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1,
    }  # fmt: skip
    method = TextToImage if case.whole else TextToImageLora
    return method.from_settings(settings)


@contextmanager
def _as(arm: Arm, seen: Seen) -> Iterator[None]:
    """The product does inside as the arm says, tells every loss, and what it warns of is noted."""

    class Counted(CudaGraph):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            seen.graphs += 1

    def noted(event: events.Event) -> None:
        if isinstance(event, events.Note) and event.level == "warning":
            seen.warnings.append(event.text)

    was = torch.backends.cudnn.allow_tf32
    # Of matrix products it is off as torch is delivered.
    assert not torch.backends.cuda.matmul.allow_tf32
    with (
        patch.object(events, "emit", noted),
        patch.object(loop, "SECONDS_BETWEEN_REPORTS", 0),
        patch.object(loop, "CudaGraph", Counted if arm.graph else None),
        patch.object(models, "fuse", models.fuse if arm.kernels else lambda *_: False),
    ):
        torch.backends.cudnn.allow_tf32 = was and arm.half
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = was


@contextmanager
def _same_inputs(kept: Path, trainer: ModuleType) -> Iterator[None]:
    """Latents and text in every arm are those of the first, which is the reference: its encoders are float32.

    kept: where they are, without what their names end with.
    """
    cache, encode = trainer.cache_images, text.encode

    def same_images(*arguments: Any) -> CachedImages:
        images: CachedImages = cache(*arguments)
        count = range(len(images.mean))
        own = {f"{name}.{number}": getattr(images, name)[number] for name in ("mean", "std") for number in count}
        tensors = _kept(kept.with_name(f"{kept.name}-latents.safetensors"), own)
        mean, std = ([tensors[f"{name}.{number}"] for number in count] for name in ("mean", "std"))
        return replace(images, mean=mean, std=std)

    def same_text(*arguments: Any) -> Conditioning:
        own = encode(*arguments)
        numbered = {str(number): one for number, one in enumerate(own.tensors)}
        tensors = _kept(kept.with_name(f"{kept.name}-text.safetensors"), numbered)
        return Conditioning(*[tensors[str(number)].to(one.device) for number, one in enumerate(own.tensors)])

    with patch.object(trainer, "cache_images", same_images), patch.object(text, "encode", same_text):
        yield


def _kept(file: Path, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not file.is_file():
        save_file({name: tensor.contiguous() for name, tensor in own.items()}, file)
    return load_file(file)


@contextmanager
def _watched(trainer: ModuleType, seen: Seen, plan: Plan, *, survey: bool) -> Iterator[None]:
    """The trainer's loop begins inside with weights that are the same in every arm, is watched, and ends after it."""
    fit = trainer.fit

    def watched(loss_of: Any, parts: models.Parts, training: loop.Training, *others: Any, **more: Any) -> None:
        seen.fused = parts.fused
        begin_alike(parts, training)
        before = [master.detach().clone() for master in training.weights.masters]
        look(training, seen, survey=survey)

        def note(step: int) -> None:
            seen.losses[step] = training.losses[-1]
            if step == plan.steps:
                seen.trained = [master.detach().clone() for master in training.weights.masters]
                seen.change = apart(seen.trained, before)
                raise EnoughError

        fit(loss_of, parts, training, *others, after_step=[note])

    # That it is measured before training as well is another's business.
    with patch.object(trainer, "fit", watched), patch.object(HeldOutLoss, "measure"):
        yield


def begin_alike(parts: models.Parts, training: loop.Training) -> None:
    """Matrices of a LoRA are the same in every arm, and none of them zero."""
    drawn = torch.Generator().manual_seed(0)
    with training.weights.full_precision(), torch.no_grad():
        for name, weight in parts.unet.named_parameters():
            for kind, deviation in STANDARD_DEVIATION.items():
                if kind in name:
                    weight.copy_(deviation * torch.randn(weight.shape, generator=drawn))


def look(training: loop.Training, seen: Seen, *, survey: bool) -> None:
    """Note the first gradients as the optimizer gets them; survey: also what becomes of one step's update."""
    before: list[torch.Tensor] = []

    def look_before(*_: Any) -> None:
        step = training.step + 1
        if not all(bool(gradient.isfinite().all()) for gradient in training.weights.gradients):
            seen.overflowed.append(step)
        if step in STEPS_TO_LOOK_AT:
            groups = training.weights.groups(flat=False)
            large = sum(gradient.nbytes for gradient in training.weights.gradients) > LARGE
            device = "cpu" if large else training.weights.gradients[0].device
            gradients = (one.grad for group in groups for one in group["params"])
            seen.gradients[step] = [one.detach().to(device, copy=True) for one in gradients]
        if survey and seen.below is None and training.optimizer.param_groups[0]["lr"]:
            before.extend(master.detach().clone() for master in training.weights.masters)

    def look_after(*_: Any) -> None:
        if before:
            seen.below, seen.survived = survey_update(training, before)
            before.clear()

    training.optimizer.register_step_pre_hook(look_before)
    training.optimizer.register_step_post_hook(look_after)


@torch.no_grad()
def survey_update(training: loop.Training, before: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Of AdamW's last update: which share of it bfloat16 weights would lose, and which share of that was made.

    What it should be follows from its moments. Made is what is there within a tenth.
    """
    entries = lost = made = 0
    for group, master, was in zip(training.optimizer.param_groups, training.weights.masters, before, strict=True):
        state = training.optimizer.state[master]
        beta1, beta2 = group["betas"]
        first, second = 1 - beta1 ** float(state["step"]), 1 - beta2 ** float(state["step"])
        flat = (was, master.detach(), state["exp_avg"], state["exp_avg_sq"])
        for w0, w1, mean, square in zip(*(one.split(AT_ONCE) for one in flat), strict=True):
            adam = mean / first / ((square / second).sqrt() + group["eps"])
            asked = -group["lr"] * (adam + group["weight_decay"] * w0)
            rounded = w0.bfloat16()
            below = (asked != 0) & ((rounded.float() + asked).bfloat16() == rounded)
            entries += int((asked != 0).sum())
            lost += int(below.sum())
            made += int((below & ((w1 - w0 - asked).abs() <= asked.abs() / 10)).sum())
    return lost / max(entries, 1), made / max(lost, 1)


@torch.no_grad()
def cosine(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Of all weights' gradients as one vector; and the least that a single weight's have."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = ((a.to(device).double(), b.to(device).double()) for a, b in zip(one, other, strict=True))
    rows = torch.stack([torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]) for a, b in pairs])
    dots, squares, others = rows.unbind(1)
    each = dots / (squares * others).sqrt()
    return float(dots.sum() / (squares.sum() * others.sum()).sqrt()), float(each.min())


def apart(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The largest difference of an entry."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def compared(one: Seen, other: Seen) -> dict[str, Any]:
    """What the JSON has of an arm beside the reference."""
    cosines = {step: cosine(one.gradients[step], other.gradients[step]) for step in STEPS_TO_LOOK_AT}
    return {
        "cosines": {step: whole for step, (whole, _) in cosines.items()},
        "least_cosines": {step: least for step, (_, least) in cosines.items()},
        "apart": apart(one.trained, other.trained),
    }


def first(cases: Sequence[Case], plan: Plan) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Of each case the arms of one process, the two of half precision beside the float32 one."""
    # Cases that differ in their half precision alone have one reference.
    for _, alike in itertools.groupby(cases, lambda case: replace(case, name="", precision="")):
        reference = None
        for case in alike:
            if time.time() > plan.until:
                return
            (plan.scratch / case.name).mkdir()
            reference = reference or train(case, REFERENCE, plan)
            found = {REFERENCE.name: reference.told()}
            for arm in (PLAIN, OURS):
                seen = train(case, arm, plan)
                found[arm.name] = seen.told() | compared(seen, reference)
                del seen
            yield case, found


def second(cases: Sequence[Case], plan: Plan) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Of each case the arms of the other process."""
    for case in cases:
        if not waited_for(plan.scratch / case.name / "first.json", plan):
            return
        yield case, {arm.name: train(case, arm, plan).told() for arm in (AGAIN, RESUMED)}


def make_models(plan: Plan) -> None:
    """Those that the cases need and that are not there."""
    for family in dict.fromkeys(case.family for case in plan.cases):
        if not (plan.models[family] / MODEL_INDEX).is_file():
            make_model(family, plan.models[family], torch.float16, tiny=plan.tiny)


def waited_for(file: Path, plan: Plan) -> bool:
    """Whether the other process has written the file; it is ended with this one where it fails."""
    while not file.is_file():
        if time.time() > plan.until:
            return False
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return True


def main() -> None:
    """Train what PLAN says."""
    number, plan = int(sys.argv[1]), Plan.from_json(sys.argv[2])
    if number == 0:
        make_models(plan)
    if not all(waited_for(plan.models[case.family] / MODEL_INDEX, plan) for case in plan.cases):
        return
    own = [case for case in plan.cases if case.process == number]
    others = [case for case in plan.cases if case.process != number]
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for which, cases in ((first, own), (second, others)):
        for case, found in which(cases, plan):
            file = plan.scratch / case.name / f"{which.__name__}.json"
            file.with_suffix(".part").write_text(json.dumps({"on": on, "arms": found}), encoding="utf-8")
            file.with_suffix(".part").rename(file)
            took = (f"{arm} {said['seconds']} s" for arm, said in found.items())
            print(f"{case.name}: {'; '.join(took)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
