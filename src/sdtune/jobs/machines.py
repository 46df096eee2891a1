"""The machine of a job: which machine type with which GPUs, checked before anything is sent."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from sdtune.errors import RecipeError
from sdtune.jobs.machine_table import (
    DEFAULT_TYPES,
    END_OF_LIFE,
    GPUS,
    MACHINE_TYPES,
    UNSUPPORTED_FAMILIES,
    Gpu,
    MachineType,
)

DEFAULT_GPU = "l4"
DEFAULT_CPU_TYPE = "e2-standard-4"
ALIASES = {
    "a100-40gb": "a100",
    "h100-80gb": "h100",
    "h100-mega-80gb": "h100-mega",
    "h200-141gb": "h200",
    "rtx-6000": "rtx-pro-6000",
}
FORCE = "add --force-machine to send it as it is"

_GPUS = {gpu.name: gpu for gpu in GPUS}
_TYPES = {machine_type.name: machine_type for machine_type in MACHINE_TYPES}
_BY_OWN_NAME = {gpu.accelerator_type: gpu for gpu in GPUS}


@dataclass(frozen=True)
class Machine:
    """What a job asks for.

    accelerator_type: Vertex AI's own name; None without a GPU. gpu: None without one, or of one that sdtune does not
    know. vcpus, memory_gb: 0 of a machine type that it does not know.
    """

    machine_type: str
    accelerator_type: str | None
    accelerator_count: int
    gpu: Gpu | None
    vcpus: int
    memory_gb: float


def choose_machine(
    gpu: str | None,
    gpus: int | None,
    machine_type: str | None,
    *,
    strategy: str = "on-demand",
    force: bool = False,
) -> Machine:
    """The machine for what was asked; what was not is chosen: the default is one L4.

    force: names that are not known, and combinations that are not, are sent as they are.
    RecipeError: there is no such machine, and which there are.
    """
    kind = _TYPES.get(_plain(machine_type)) if machine_type else None
    if machine_type and kind is None and not force:
        raise RecipeError(_unknown_type(machine_type))
    wanted = find_gpu(gpu, force=force) if gpu else None
    if machine_type is None:
        if gpu and wanted is None:
            raise RecipeError(f"gpu: {gpu} is not known here, so neither is its machine; add --machine-type.")
        chosen = wanted or _GPUS[DEFAULT_GPU]
        count = _count_of(chosen, gpus)
        machine = _machine(default_type(chosen, count), chosen, count)
    elif kind is None or (gpu and wanted is None):
        name = wanted.accelerator_type if wanted else gpu and re.sub(r"[\s-]", "_", gpu.strip()).upper()
        count = (gpus or 1) if name else 0
        size = (kind.vcpus, kind.memory_gb) if kind else (0, 0)
        return Machine(_plain(machine_type), name, count, wanted, *size)
    else:
        machine = _checked(kind, wanted, gpus, force)
    if not force:
        _check_strategy(machine, strategy)
    return machine


def cpu_machine(machine_type: str | None = None) -> Machine:
    """A machine without GPUs, for copying. RecipeError: Vertex AI has none of that type, or it comes with GPUs."""
    name = _plain(machine_type or DEFAULT_CPU_TYPE)
    kind = _TYPES.get(name)
    if kind is None:
        raise RecipeError(_unknown_type(name, without_gpus=True))
    if comes_with(kind):
        raise RecipeError(
            f"machine_type: {name} comes with GPUs, which this job has no use for; "
            f"use {DEFAULT_CPU_TYPE} or another of the families e2, n2, c2 and n1."
        )
    return Machine(name, None, 0, None, kind.vcpus, kind.memory_gb)


def find_gpu(name: str, *, force: bool = False) -> Gpu | None:
    """The GPU of that name, in any spelling: ``l4``, ``NVIDIA_L4``, ``a100_80gb``, ``NVIDIA_TESLA_V100``.

    RecipeError: not known, or no job of sdtune runs on it; with ``force`` None and the GPU instead.
    """
    plain = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("nvidia-").removeprefix("tesla-")
    plain = ALIASES.get(plain, plain)
    gpu = _GPUS.get(plain)
    if force or (gpu and not gpu.refused):
        return gpu
    if gpu:
        raise RecipeError(f"gpu: {gpu.name} cannot be used: {gpu.refused}. {_others(gpu)}")
    gone = END_OF_LIFE.get(f"NVIDIA_TESLA_{plain.upper()}")
    if gone:
        raise RecipeError(f"gpu: {name}: {gone}; wanted one of {_names(usable_gpus())}.")
    near = difflib.get_close_matches(plain, _GPUS, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"wanted one of {_names(usable_gpus())}."
    raise RecipeError(f"gpu: found {name!r}; {hint} If Vertex AI has it since, {FORCE}.")


def usable_gpus() -> list[Gpu]:
    """Those that jobs can run on."""
    return [gpu for gpu in GPUS if not gpu.refused]


def types_with(gpu: Gpu, count: int | None = None) -> list[MachineType]:
    """The machine types that can have the GPU; ``count``: so many of it."""
    return [kind for kind in MACHINE_TYPES if gpu.name in kind.gpus and (count is None or count in kind.gpus[gpu.name])]


def counts_of(gpu: Gpu) -> list[int]:
    """How many of the GPU a machine can have."""
    return sorted({count for kind in types_with(gpu) for count in kind.gpus[gpu.name]})


def default_type(gpu: Gpu, count: int) -> MachineType:
    """The machine type for so many of the GPU, where none was asked for."""
    name = DEFAULT_TYPES.get((gpu.name, count))
    return _TYPES[name] if name else types_with(gpu, count)[0]


def comes_with(kind: MachineType) -> Gpu | None:
    """The GPU that is part of the machine type: n1 has none, but can be given one."""
    return None if kind.name.startswith("n1-") or not kind.gpus else _GPUS[next(iter(kind.gpus))]


def _checked(kind: MachineType, wanted: Gpu | None, gpus: int | None, force: bool) -> Machine:
    """The machine type with the GPU and number asked for, or the one that it comes with."""
    part = comes_with(kind)
    if force and wanted:
        own = kind.gpus.get(wanted.name, (1,))
        return _machine(kind, wanted, gpus or own[0])
    if not kind.gpus:
        raise RecipeError(
            f"machine_type: {kind.name} can have no GPU, and training needs one; "
            f"{_where(wanted or _GPUS[DEFAULT_GPU], gpus)}."
        )
    gpu = wanted or part
    if gpu is None:
        possible = ", ".join(f"--gpu {name}" for name in kind.gpus)
        raise RecipeError(
            f"machine_type: {kind.name} has no GPU unless one is asked for; add {possible}, or leave the machine type "
            f"out for {_TYPES[DEFAULT_TYPES[DEFAULT_GPU, 1]].name} with one {DEFAULT_GPU}."
        )
    if gpu.refused:
        find_gpu(gpu.name)
    allowed = kind.gpus.get(gpu.name, ())
    count = gpus or (1 if 1 in allowed or not allowed else allowed[0])
    if count not in allowed:
        raise RecipeError(
            f"machine_type: found {kind.name} with {count} x {gpu.name}. {_what_it_has(kind)}; {_where(gpu, count)}."
        )
    return _machine(kind, gpu, count)


def _machine(kind: MachineType, gpu: Gpu, count: int) -> Machine:
    return Machine(kind.name, gpu.accelerator_type, count, gpu, kind.vcpus, kind.memory_gb)


def _count_of(gpu: Gpu, gpus: int | None) -> int:
    counts = counts_of(gpu)
    if gpus is None:
        return counts[0]
    if gpus not in counts:
        raise RecipeError(f"gpus: found {gpus} x {gpu.name}; {_where(gpu, gpus)}.")
    return gpus


def _check_strategy(machine: Machine, strategy: str) -> None:
    if strategy == "flex-start" and machine.gpu and not machine.gpu.flex_start:
        able = [gpu for gpu in usable_gpus() if gpu.flex_start]
        raise RecipeError(
            f"strategy: flex-start has no {machine.gpu.name}, only {_names(able)}; use one of these, or "
            "--strategy spot or on-demand."
        )


def _what_it_has(kind: MachineType) -> str:
    """``n1-standard-32 can have 2 or 4 x t4, ...``."""
    part = comes_with(kind)
    if part:
        return f"{kind.name} comes with {kind.gpus[part.name][0]} x {part.name}"
    by_counts: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, counts in kind.gpus.items():
        by_counts[counts].append(name)
    able = "; ".join(f"{_either(counts)} x {_either(names)}" for counts, names in by_counts.items())
    return f"{kind.name} can have {able}"


def _where(gpu: Gpu, count: int | None) -> str:
    """The machine types with so many of the GPU; if none has, which numbers there are."""
    if count is None:
        count = counts_of(gpu)[0]
    able = types_with(gpu, count)
    if able:
        best = default_type(gpu, count).name
        others = [kind.name for kind in able if kind.name != best]
        also = f" (also: {', '.join(others)})" if others else ""
        return f"for {count} x {gpu.name} use {best}{also}"
    with_types = [f"{number} ({default_type(gpu, number).name})" for number in counts_of(gpu)]
    return f"a machine can have {_either(with_types)} of {gpu.name}"


def _others(gpu: Gpu) -> str:
    near = [other for other in usable_gpus() if other.memory_gib >= 80]
    return f"Others with much memory: {_names(near)}."


def _unknown_type(name: str, *, without_gpus: bool = False) -> str:
    plain = _plain(name)
    family = plain.split("-")[0]
    if family in UNSUPPORTED_FAMILIES:
        instead = "e2 or n2" if without_gpus else "g2, a2, a3 or n1"
        return f"machine_type: Vertex AI trains on no machine of the family {family}; use one of {instead}."
    able = [kind.name for kind in MACHINE_TYPES if not (without_gpus and comes_with(kind))]
    same = [other for other in able if other.startswith(f"{family}-")]
    near = difflib.get_close_matches(plain, same or able, n=3, cutoff=0.5) or same[:3]
    hint = f"did you mean {_either(near)}?" if near else "sdtune machines lists those that are known."
    more = "" if without_gpus else f" If Vertex AI has it since, {FORCE}."
    return f"machine_type: found {name!r}; {hint}{more}"


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _names(gpus: Iterable[Gpu]) -> str:
    return ", ".join(gpu.name for gpu in gpus)


def _either(values: Iterable[object]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
