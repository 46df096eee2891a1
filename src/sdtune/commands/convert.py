"""Convert: a LoRA from one form into another, without loss."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from sdtune.errors import ProjectError, RecipeError, TrainingError
from sdtune.training.components.lora_names import COMPONENTS, Family, Form

if TYPE_CHECKING:
    import torch

    from sdtune.training.components.import_lora import LoraFile
    from sdtune.training.components.lora_weights import LoraModule


class Dtype(StrEnum):
    """The type of the written tensors; auto: that of the source, wider where it would lose something."""

    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


@dataclass(frozen=True)
class Part:
    """What a LoRA has for one model."""

    name: str
    modules: int
    ranks: list[int]
    alphas: list[float]
    dora: bool


@dataclass(frozen=True)
class LoraSummary:
    """One side of a conversion. dtypes: of its tensors, the most frequent first."""

    path: str
    form: Form
    dtypes: list[str]


@dataclass(frozen=True)
class Conversion:
    """What was read and what was written. notes: what to know before using it."""

    source: LoraSummary
    target: LoraSummary
    family: Family | None
    parts: list[Part]
    notes: list[str]


def convert(
    source: str,
    output: str,
    form: Form,
    *,
    family: Family | None = None,
    dtype: Dtype = Dtype.AUTO,
    overwrite: bool = False,
) -> Conversion:
    """Write the LoRA at ``source`` to ``output`` in ``form``: kohya's is a file, the others are folders.

    family: of the base model, if the modules cannot tell.
    RecipeError: no LoRA that can be read, an output that would overwrite something, or a family that does not fit;
    ProjectError: no torch in this Python.
    """
    _require_torch()
    # PEFT imports it where it is installed, and it warns of kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    from sdtune.training.components.import_lora import read_lora_file

    read_from, write_to = Path(source).expanduser(), Path(output).expanduser()
    if not read_from.exists():
        raise RecipeError(f"input: {source} does not exist; give a .safetensors file or a folder with a LoRA.")
    _check_output(read_from, write_to, form, overwrite)
    try:
        read = read_lora_file(read_from)
        found = _family(read, family, needed=form is Form.KOHYA)
        before = _dtypes(read_from)
        written = _write(read, write_to, form, found, dtype)
    except TrainingError as error:
        raise RecipeError(str(error)) from error
    except OSError as error:
        raise RecipeError(f"output: {output} cannot be written: {error.strerror or error}.") from error
    parts = [_part(name, read.weights[name].values()) for name in COMPONENTS if name in read.weights]
    notes = []
    if form is Form.KOHYA and any(len(part.alphas) > 1 for part in parts):
        notes.append(
            "The alphas of its modules differ. UIs apply each; diffusers applies one to all of this form, "
            "so give it the LoRA in its own form."
        )
    return Conversion(
        LoraSummary(str(read_from), read.form, before),
        LoraSummary(str(written), form, _dtypes(written)),
        found,
        parts,
        notes,
    )


def _require_torch() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("torch", "safetensors", "peft", "transformers")):
        raise ProjectError(
            "converting a LoRA needs torch and peft, which this Python does not have; "
            "install them with: pip install -e '.[train]' in sdtune's folder"
        )


def _check_output(read_from: Path, write_to: Path, form: Form, overwrite: bool) -> None:
    """Nothing is overwritten unasked; what is no LoRA of this form never, and the source never."""
    from sdtune.training.components.export import DIFFUSERS_FILE
    from sdtune.training.components.import_lora import lora_files
    from sdtune.training.components.peft_folder import CONFIG_FILE, WEIGHTS_FILE

    if form is Form.KOHYA:
        if write_to.is_dir() or write_to.suffix != ".safetensors":
            raise RecipeError(f"output: {write_to}; --to kohya writes one file: give a name that ends in .safetensors.")
        ours = {write_to}
        there = ours if write_to.exists() else set()
    else:
        if write_to.suffix == ".safetensors":
            raise RecipeError(
                f"output: {write_to} is the name of a file, but --to {form} writes a folder; give a folder."
            )
        if write_to.exists() and not write_to.is_dir():
            raise RecipeError(f"output: {write_to} is a file; --to {form} writes a folder.")
        adapters = {write_to / component for component in COMPONENTS} if form is Form.PEFT else set()
        names = (CONFIG_FILE, WEIGHTS_FILE, "README.md")
        ours = {adapter / name for adapter in adapters for name in names} or {write_to / DIFFUSERS_FILE}
        there = set()
        for path in write_to.iterdir() if write_to.exists() else ():
            there |= set(path.iterdir()) if path in adapters and path.is_dir() else {path}
    if others := sorted(there - ours):
        raise RecipeError(
            f"output: {write_to} holds other files, such as {others[0].relative_to(write_to)}; choose a new folder."
        )
    if {file.resolve() for file in lora_files(read_from)} & {file.resolve() for file in ours}:
        raise RecipeError(f"output: {write_to} is what is to be converted; choose another name.")
    if there and not overwrite:
        raise RecipeError(f"output: {write_to} is there already; choose another name or add --overwrite.")


def _family(read: LoraFile, given: Family | None, *, needed: bool) -> Family | None:
    """The family of the LoRA: given, told by its modules, or by its header."""
    from sdtune.training.components.kohya_metadata import told_family
    from sdtune.training.components.lora_family import possible_families

    possible = possible_families(read.weights)
    if given:
        if possible and given not in possible:
            raise RecipeError(f"family: found {given}, but the modules of this LoRA are of {_either(possible)}.")
        return given
    if len(possible) == 1:
        return possible.pop()
    told = told_family(read.metadata)
    if told in possible:
        return told
    if needed:
        raise RecipeError(
            f"family: the modules of this LoRA fit {_either(possible) or 'none of the families'}, and kohya's form "
            f"names them by family; give --family {'|'.join(Family)}."
        )
    return None


def _either(families: set[Family]) -> str:
    return " or ".join(family for family in Family if family in families)


def _write(read: LoraFile, write_to: Path, form: Form, family: Family | None, dtype: Dtype) -> Path:
    """The folder or file that was written."""
    from sdtune.training.components.export import write_diffusers_lora, write_kohya_lora
    from sdtune.training.components.kohya_metadata import HASHES, known_metadata
    from sdtune.training.components.peft_folder import write_peft_lora

    kind = _torch_dtype(dtype)
    # Hashes are of the file they stand in.
    metadata = {key: value for key, value in read.metadata.items() if key not in HASHES}
    if form is Form.DIFFUSERS:
        return write_diffusers_lora(read.weights, write_to, dtype=kind, metadata=metadata).parent
    if form is Form.PEFT:
        base_model = metadata.get("ss_sd_model_name", "")
        return write_peft_lora(read.weights, write_to, dtype=kind, base_model=base_model, metadata=metadata)
    assert family is not None
    if "ss_network_module" not in metadata:
        metadata = {**known_metadata(read.weights, family, write_to.stem), **metadata}
    return write_kohya_lora(read.weights, write_to, family, metadata, dtype=kind, one_alpha=False)


def _torch_dtype(dtype: Dtype) -> torch.dtype | None:
    import torch

    named = {Dtype.FP32: torch.float32, Dtype.FP16: torch.float16, Dtype.BF16: torch.bfloat16}
    return named.get(dtype)


def _dtypes(path: Path) -> list[str]:
    """Of the weights in the files there, alphas aside."""
    from sdtune.training.components.import_lora import lora_files
    from sdtune.training.components.tensor_file import read_tensors

    counted = Counter(
        str(tensor.dtype).removeprefix("torch.")
        for file in lora_files(path)
        for key, tensor in read_tensors(file)[0].items()
        if not key.endswith(".alpha")
    )
    return [name for name, _ in counted.most_common()]


def _part(name: str, modules: Iterable[LoraModule]) -> Part:
    modules = list(modules)
    return Part(
        name,
        len(modules),
        sorted({module.rank for module in modules}),
        sorted({module.alpha for module in modules}),
        any(module.magnitude is not None for module in modules),
    )
