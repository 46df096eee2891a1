"""PEFT's adapters on the UNet and the text encoders: attach them, and save them as PEFT does.

The LoRA of dreambooth-lora and text-to-image-lora is in lora.py; here each model has its own size, of more kinds.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import BOFTConfig, HRAConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods.peft import PeftDreamBoothLora
from sdtune.training.components.data import CachedImages
from sdtune.training.components.files import publish
from sdtune.training.components.kohya_metadata import public_name
from sdtune.training.components.lora import TEXT_ENCODER_MODULES, lora_metadata, save_lora, trainable, unet_targets
from sdtune.training.components.lycoris import write_lycoris
from sdtune.training.components.models import Parts
from sdtune.training.components.peft_folder import WEIGHTS_FILE
from sdtune.training.components.weights import Weights
from sdtune.training.run import Run

KOHYA_KINDS = ("lora", "loha", "lokr", "hra")
"""What web UIs read under some name; lycoris.py says how, and why not the others."""


@dataclass(frozen=True)
class Size:
    """How large the adapters of one model are; alpha: None for its rank."""

    rank: int
    alpha: float | None
    dropout: float
    bias: str


class Adapters:
    """The adapters of one run, and the ``weights`` that are trained.

    The models are changed in place and draw as before until the first step.
    """

    def __init__(self, parts: Parts, method: PeftDreamBoothLora, run: Run) -> None:
        self._parts, self._method, self._run = parts, method, run
        unet = Size(method.rank, method.lora_alpha, method.lora_dropout, method.bias)
        targets, patterns = unet_targets(method)
        self._wrapped = {"unet": self._attach(parts.unet, unet, targets, **patterns)}
        groups = [trainable(self._wrapped["unet"], method.learning_rate)]
        if method.train_text_encoder:
            size = Size(
                rank=method.text_encoder_rank or method.rank,
                alpha=method.text_encoder_alpha
                or (method.alpha / method.rank * (method.text_encoder_rank or method.rank)),
                dropout=unet.dropout if method.text_encoder_dropout is None else method.text_encoder_dropout,
                bias=method.text_encoder_bias or method.bias,
            )
            for name, encoder in zip(("text_encoder", "text_encoder_2"), parts.text_encoders, strict=False):
                encoder.to(parts.unet.device)
                self._wrapped[name] = self._attach(encoder, size, TEXT_ENCODER_MODULES)
                groups.append(trainable(self._wrapped[name], method.text_encoder_lr or method.learning_rate))
        if not self._has_kohya_keys:
            what = "trained biases" if method.adapter in KOHYA_KINDS else method.adapter
            text = (
                f"The result will be PEFT's folders alone: web UIs and diffusers' LoRA files know nothing like {what}."
            )
            run.tell(events.Note(text, "warning"))
        self._trained = [parameter for group in groups for parameter in group["params"]]
        self._before = [parameter.detach().cpu().clone() for parameter in self._trained]
        # Only LoRA's products are taken as well in half precision; autocast knows of the others' what to keep whole.
        plain = method.adapter == "lora" and not method.use_dora and self._has_kohya_keys
        self.weights = Weights(groups, run.weight_dtype if plain else torch.float32)

    def _attach(self, model: Any, size: Size, targets: Sequence[str], **patterns: Any) -> Any:
        method = self._method
        config = adapter_config(method.adapter, size, use_dora=method.use_dora, **patterns)
        config.target_modules = set(targets)
        try:
            # It says so where it changes a size, which is an error below, and where boft has no kernel of its own.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrapped = get_peft_model(model, config)
        except ValueError as error:
            if "not found in the base model" in str(error):
                raise TrainingError(f"target_modules: {', '.join(targets)} match no layer of the model.") from None
            raise TrainingError(
                f"adapter: {method.adapter} with rank {size.rank} cannot be put on {', '.join(targets)}: {error}"
            ) from None
        for name, layer in wrapped.named_modules():
            if (sizes := getattr(layer, "oft_block_size", None)) and sizes["default"] != size.rank:
                raise TrainingError(
                    f"adapter: oft with blocks of {size.rank} (rank) does not divide the {layer.in_features} inputs of "
                    f"{name.removeprefix('base_model.model.')}; use a rank that does, such as {sizes['default']}."
                )
        # It took the folder on this machine.
        wrapped.peft_config["default"].base_model_name_or_path = public_name(method.base_model)
        return wrapped

    @property
    def _has_kohya_keys(self) -> bool:
        biases = [self._method.bias, self._method.text_encoder_bias or "none"]
        return self._method.adapter in KOHYA_KINDS and set(biases) == {"none"}

    def change(self) -> float:
        """The largest change of a trained number. TrainingError if there is none, or one is not finite."""
        pairs = zip(self._before, self._trained, strict=True)
        changes = torch.stack([(after.detach().cpu() - before).abs().max() for before, after in pairs])
        if not bool(changes.isfinite().all()):
            raise TrainingError(
                "the adapter is not finite (NaN or infinity), so it was not saved. "
                "Train with a lower learning rate, or in bf16 or fp32 instead of fp16."
            )
        if changes.max() == 0:
            raise TrainingError(
                "the adapter is what it was: nothing was learned, so nothing was saved. Train longer than "
                f"{self._method.max_train_steps} steps or raise --learning-rate {self._method.learning_rate}."
            )
        return float(changes.max())

    def save(self, images: CachedImages) -> float:
        """Write the adapters as PEFT does, and for web UIs and diffusers where these know the kind; the change."""
        with self.weights.full_precision():
            return self._save(images)

    def _save(self, images: CachedImages) -> float:
        run = self._run
        change = self.change()
        run.begin_saving("the adapter")
        for part, wrapped in self._wrapped.items():
            _save_as_peft(wrapped, run.output / part)
            run.tell(events.Artifact("peft", str(run.output / part)))
        if self._method.adapter == "lora" and self._has_kohya_keys:
            save_lora(self._parts, self._method, run, images)
        elif self._has_kohya_keys:
            models = {part: wrapped.get_base_model() for part, wrapped in self._wrapped.items()}
            file = run.output / f"{run.output.name}.safetensors"
            write_lycoris(models, file, self._parts.family, lora_metadata(self._parts, self._method, run, images))
            run.tell(events.Artifact("kohya_lora", str(file)))
        return change


def _save_as_peft(wrapped: Any, folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` for ``PeftModel.from_pretrained``, read back."""
    with tempfile.TemporaryDirectory() as name:
        wrapped.save_pretrained(name, save_embedding_layers=False)
        # The configuration last: without it the folder is no adapter. PEFT's own README.md is an empty form.
        for file in sorted(Path(name).glob("adapter_*"), reverse=True):
            with publish(folder / file.name) as whole:
                shutil.copyfile(file, whole)
    kept = load_file(folder / WEIGHTS_FILE)
    if not kept or not all(bool(tensor.isfinite().all()) for tensor in kept.values()):
        raise TrainingError(f"{folder / WEIGHTS_FILE} does not hold what was written to it.")


def adapter_config(kind: str, size: Size, *, use_dora: bool = False, **patterns: Any) -> Any:
    """PEFT's configuration of one model's adapters; patterns: rank_pattern and alpha_pattern."""
    alpha = size.rank if size.alpha is None else size.alpha
    # PEFT calls it lora_only, oft_only and so on.
    bias = f"{kind}_only" if size.bias == "adapter_only" else size.bias
    match kind:
        case "lora":
            return LoraConfig(
                r=size.rank, lora_alpha=alpha, lora_dropout=size.dropout, bias=bias, use_dora=use_dora, **patterns
            )
        case "loha":
            return LoHaConfig(r=size.rank, alpha=alpha, rank_dropout=size.dropout, **patterns)
        case "lokr":
            return LoKrConfig(r=size.rank, alpha=alpha, rank_dropout=size.dropout, **patterns)
        case "oft":
            return OFTConfig(r=0, oft_block_size=size.rank, module_dropout=size.dropout, bias=bias)
        case "boft":
            return BOFTConfig(boft_block_size=size.rank, boft_dropout=size.dropout, bias=bias)
        case "hra":
            return HRAConfig(r=size.rank, bias=bias)
        case _:
            raise ValueError(kind)
