"""How the table of machines looks: a line for each number of GPUs, and beside a GPU what can be trained on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sdtune.jobs.machine_table import Gpu, MachineType
from sdtune.jobs.machines import counts_of, default_type, types_with
from sdtune.jobs.memory import MODELS, Family, largest_batch
from sdtune.methods.catalog import find_method
from sdtune.methods.fields import CommonFields

WIDE = 120
"""Columns where the table goes into a file or a pipe."""
MOST = 64
"""Nobody asks for larger batches of one GPU."""


@dataclass(frozen=True)
class Work:
    """A method on a family of models, as a column."""

    family: Family
    model: str
    method: str
    title: str

    @property
    def resolution(self) -> int:
        return MODELS[self.family].resolution


WORKS = (
    Work("sd1", "SD 1.5", "dreambooth-lora", "LoRA"),
    Work("sd1", "SD 1.5", "dreambooth", "full"),
    Work("sdxl", "SDXL", "dreambooth-lora", "LoRA"),
    Work("sdxl", "SDXL", "dreambooth", "full"),
)
WAYS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("", "as it is", {}),
    ("*", "with --gradient-checkpointing", {"gradient_checkpointing": True}),
    ("†", "with that and --optimizer adafactor", {"gradient_checkpointing": True, "optimizer": "adafactor"}),
)
"""Marks, in words, and the settings."""


@cache
def _method(name: str) -> CommonFields:
    return find_method(name).from_settings({"instance_prompt": "a photo of sks cat"})


@cache
def batches(gpu: Gpu, work: Work) -> tuple[int, ...]:
    """The largest batch in each of WAYS; 0: none fits."""
    return tuple(
        largest_batch(_method(work.method).model_copy(update=settings), work.family, work.resolution, gpu, most=MOST)
        for _, _, settings in WAYS
    )


def show_all(out: Console, gpus: Sequence[Gpu]) -> None:
    """A line for each number of GPUs; on a narrow terminal without what matters least."""
    if not out.is_terminal:
        out.width = max(out.width, WIDE)
    for left_out in ((), ("note",), ("note", "vCPU", "RAM"), ("note", "vCPU", "RAM", "bf16")):
        table = _table(gpus, left_out)
        if Measurement.get(out, out.options.update(max_width=1000), table).maximum <= out.width:
            break
    out.print(table)
    _legend(out)


def _table(gpus: Iterable[Gpu], left_out: Sequence[str]) -> Table:
    columns: dict[str, dict[str, Any]] = {
        "GPU": {}, "GiB": {"justify": "right"}, "bf16": {"justify": "center"}, "GPUs": {"justify": "right"},
        "machine type": {}, "vCPU": {"justify": "right"}, "RAM": {"justify": "right"},
        **{f"{work.model}\n{work.title}": {} for work in WORKS},
        "note": {"style": "dim"},
    }  # fmt: skip
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for title, options in columns.items():
        if title not in left_out:
            table.add_column("" if title == "note" else title, no_wrap=True, vertical="bottom", **options)
    for gpu in gpus:
        for count in counts_of(gpu):
            first = count == counts_of(gpu)[0]
            kind = default_type(gpu, count)
            cells = [
                *_what_it_is(gpu, first), str(count), _name(kind), str(kind.vcpus), f"{kind.memory_gb:g}",
                *(_fitting(gpu, work) if first and not gpu.refused else "" for work in WORKS),
                gpu.note if first else "",
            ]  # fmt: skip
            shown = (cell for title, cell in zip(columns, cells, strict=True) if title not in left_out)
            table.add_row(*shown, style="dim" if gpu.refused else "")
    return table


def show_gpu(out: Console, gpu: Gpu) -> None:
    """One GPU in full."""
    out.print(
        f"[bold]{gpu.name}[/]  {gpu.accelerator_type}, {gpu.memory_gib} GiB" + (f", {gpu.note}" if gpu.note else "")
    )
    facts = (
        ("bf16", "yes" if gpu.bf16 else "no; --mixed-precision auto takes fp16"),
        ("strategies", "on-demand, spot, flex-start" if gpu.flex_start else "on-demand, spot"),
        ("quota", gpu.quota_metric()),
        ("of spot" + (", flex-start" if gpu.flex_start else ""), gpu.quota_metric("spot")),
    )
    for name, value in facts:
        out.print(f"  {name:<22}{value}")
    out.print()

    machines = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    machines.add_column("machine type", no_wrap=True)
    for title in ("vCPU", "RAM GB", "GPUs"):
        machines.add_column(title, justify="left" if title == "GPUs" else "right", no_wrap=True)
    for kind in types_with(gpu):
        counts = ", ".join(map(str, kind.gpus[gpu.name]))
        machines.add_row(_name(kind), str(kind.vcpus), f"{kind.memory_gb:g}", counts)
    out.print(machines)

    out.print()
    fitting = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    fitting.add_column("largest batch of one GPU", no_wrap=True)
    for _, words, _ in WAYS:
        fitting.add_column(words, justify="right")
    for work in WORKS:
        sizes = (_size(batch) for batch in batches(gpu, work))
        fitting.add_row(f"{work.model} at {work.resolution} px, {work.method}", *sizes)
    out.print(fitting)
    if not all(kind.sure for kind in types_with(gpu)):
        out.print(f"\n{UNSURE}", soft_wrap=True)


def as_json(gpu: Gpu) -> dict[str, Any]:
    """All that is known of the GPU."""
    return {
        "name": gpu.name, "accelerator_type": gpu.accelerator_type, "memory_gib": gpu.memory_gib, "bf16": gpu.bf16,
        "flex_start": gpu.flex_start, "note": gpu.note, "refused": gpu.refused or None,
        "quotas": {strategy: gpu.quota_metric(strategy) for strategy in ("on-demand", "spot")},
        "machine_types": [
            {"name": kind.name, "vcpus": kind.vcpus, "memory_gb": kind.memory_gb, "gpus": list(kind.gpus[gpu.name]),
             "documented_for_training": kind.sure}
            for kind in types_with(gpu)
        ],
        "largest_batches": [
            {"method": work.method, "family": work.family, "resolution": work.resolution, "settings": settings,
             "train_batch_size": size}
            for work in WORKS
            for (_, _, settings), size in zip(WAYS, batches(gpu, work), strict=True)
        ] if not gpu.refused else [],
    }  # fmt: skip


UNSURE = "[yellow]?[/] a machine that Google has for serving, and as Spot and flex-start; training may refuse it"


def _what_it_is(gpu: Gpu, first: bool) -> tuple[Text, str, Text]:
    """Name, memory and bf16, beside the first machine only."""
    if not first:
        return Text(""), "", Text("")
    name = Text(gpu.name, style="bold" if not gpu.refused else "")
    return name, str(gpu.memory_gib), Text("yes", style="green") if gpu.bf16 else Text("no", style="yellow")


def _name(kind: MachineType) -> Text:
    return Text(kind.name) if kind.sure else Text.assemble(kind.name, (" ?", "yellow"))


def _size(batch: int) -> str:
    return "–" if batch == 0 else f"{batch}+" if batch == MOST else str(batch)


def _fitting(gpu: Gpu, work: Work) -> Text:
    """The largest batches: plain, and in the first way that more fits in; one below the other in a column."""
    plain, checkpointed, least = batches(gpu, work)
    shown = Text(f"{_size(plain):>3}" if plain else "   ", style="green")
    if checkpointed > plain:
        shown.append(f" {_size(checkpointed):>3}*", style="cyan")
    elif least > plain:
        shown.append(f" {_size(least):>3}†", style="yellow")
    elif not plain:
        shown = Text("  –", style="dim")
    return shown


def _legend(out: Console) -> None:
    _, checkpointed, least = WAYS
    for line in (
        "\nUnder SD 1.5 (at 512 px) and SDXL (at 1024 px): the largest batch of one GPU, LoRA or all weights:",
        f"  [green]8[/] as it is   [cyan]8*[/] {checkpointed[1]}   [yellow]8†[/] {least[1]}   [dim]–[/] none",
        UNSURE,
        "Every machine type and the quotas of one GPU: [bold]sdtune machines --gpu NAME[/]",
    ):
        out.print(line, soft_wrap=True)
