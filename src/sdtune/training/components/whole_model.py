"""All weights of a model: what is trained of them, their moving average, and how they are saved."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch
from diffusers.training_utils import EMAModel

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods.dreambooth import DreamBooth
from sdtune.methods.method_fields import TextEncoderFields
from sdtune.methods.text_to_image import TextToImage
from sdtune.training.components.files import publish
from sdtune.training.components.lora_names import classic_clip_path
from sdtune.training.components.models import Parts, pipeline_of
from sdtune.training.components.single_file_write import write_single_file
from sdtune.training.components.text import encode_with_gradient
from sdtune.training.components.weights import Group, Weights
from sdtune.training.run import Run

FINGERPRINT = 256
"""Entries of each weight that are remembered, to see afterwards that something was learned."""


DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

WholeMethod: TypeAlias = DreamBooth | TextToImage


class WholeModel:
    """What a run trains, thawed: ``weights``, and their moving average if there is one."""

    def __init__(self, parts: Parts, method: WholeMethod, trained: Collection[str], run: Run) -> None:
        self._parts, self._method = parts, method
        models = {"unet": [parts.unet], "text_encoder": parts.text_encoders}
        self._trained = [model for name in trained for model in models[name]]
        for model in self._trained:
            model.to(parts.unet.device)
            model.requires_grad_(True)
        if "text_encoder" in trained:
            _freeze_what_is_not_read(parts, method)
        text_encoder_lr = method.text_encoder_lr if isinstance(method, TextEncoderFields) else None
        rates = {"unet": method.learning_rate, "text_encoder": text_encoder_lr or method.learning_rate}
        groups: list[Group] = [
            {"params": [weight for weight in model.parameters() if weight.requires_grad], "lr": rates[name]}
            for name in trained
            for model in models[name]
        ]
        self._before = self._fingerprint()
        self.weights = Weights(groups, run.weight_dtype)
        self.average = EMAModel(self.weights.masters, decay=method.ema_decay, foreach=True) if method.use_ema else None

    def save(self, run: Run) -> float:
        """Write the model as a diffusers folder and as one file; the largest change of a weight.

        The moving average, if there is one, takes the weights' place and is what is saved and drawn with.
        """
        if self.average:
            self.average.copy_to(self.weights.masters)
        with self.weights.full_precision():
            return self._save(run)

    def _save(self, run: Run) -> float:
        change = (self._fingerprint() - self._before).abs().max().item()
        if change == 0:
            raise TrainingError(
                "the model is what it was: nothing was learned, so nothing was saved. Train longer than "
                f"{self._method.max_train_steps} steps or raise --learning-rate {self._method.learning_rate}."
            )
        run.begin_saving("the model")
        dtype = DTYPES[self._method.save_precision]
        save_pipeline(self._parts, run.output, dtype)
        single_file = write_single_file(
            self._parts.by_name, run.output / f"{run.output.name}.safetensors", self._parts.family,
            dtype=dtype, metadata={"modelspec.title": run.output.name},
        )  # fmt: skip
        run.tell(events.Artifact("model", str(run.output)))
        run.tell(events.Artifact("single_file", str(single_file)))
        return change

    def _fingerprint(self) -> torch.Tensor:
        weights = [weight.detach().flatten()[:FINGERPRINT] for model in self._trained for weight in model.parameters()]
        return torch.cat(weights).float().cpu()


def _freeze_what_is_not_read(parts: Parts, method: WholeMethod) -> None:
    """Text encoders' layers behind the one that is read learn nothing, and weight decay must not wear them off."""
    weights = [weight for encoder in parts.text_encoders for weight in encoder.parameters()]
    read = encode_with_gradient(parts, method, [""])
    total = read.encoder_hidden_states.sum() + (0 if read.pooled is None else read.pooled.sum())
    for weight, gradient in zip(weights, torch.autograd.grad(total, weights, allow_unused=True), strict=True):
        weight.requires_grad_(gradient is not None)


def save_pipeline(parts: Parts, folder: Path, dtype: torch.dtype) -> None:
    """Write the parts as a folder that diffusers' ``from_pretrained`` opens, of any version; each file whole."""
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        pipeline_of(parts).save_pretrained(temporary)
        for weights in temporary.rglob("*.safetensors"):
            _rewrite(weights, dtype)
        for config in temporary.rglob("config.json"):
            _forget_origin(config)
        # model_index.json last: without it the folder is no model.
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == "model_index.json"):
            with publish(folder / path.relative_to(temporary)) as whole:
                shutil.copyfile(path, whole)


def _forget_origin(config: Path) -> None:
    """diffusers notes where it has loaded a part from: a folder of this machine, which is no part of the model."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rewrite(path: Path, dtype: torch.dtype) -> None:
    """In ``dtype``, and CLIP's modules under the names that every version of transformers reads.

    Transformers from 5.6 on leaves out ``text_model.``; older versions then load no weight at all, and only warn.
    """
    tensors = safetensors.torch.load_file(path)
    if path.parent.name.startswith("text_encoder"):
        tensors = {classic_clip_path(name): tensor for name, tensor in tensors.items()}
    halves = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    safetensors.torch.save_file(halves, path, metadata={"format": "pt"})
