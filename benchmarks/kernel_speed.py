"""The fused kernels on a GPU: right, and how quick, at the shapes of Stable Diffusion 1.5 at 512 px and XL at 1024 px.

    python benchmarks/kernel_speed.py FILE [--only REGEX] [--seconds 60] [--tune]

Writes FILE as JSON, renewed after each case, and prints a line for each: the largest error of values and gradients as a
part of the largest number, ours and that of plain torch in bfloat16, both against float32; microseconds forward and
backward of plain torch, of torch.compile, of ours, and what the memory's bandwidth allows. All are timed as CUDA
graphs, as the trainer runs them: small tensors stay in the GPU's cache there, which they do not in a training step.
A case that fails says so and does not end the others. Attention is also timed by each of torch's backends. --tune times
its kernels in other tiles instead, one thing changed after the other, and prints the quickest for ``attention.tiles``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kernel_speed_adamw import measure_adamw
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtune.training.kernels import attention
from sdtune.training.kernels.geglu import geglu, geglu_reference
from sdtune.training.kernels.group_norm import fits_a_program, group_norm, group_norm_reference
from sdtune.training.kernels.layer_norm import add_layer_norm, add_layer_norm_reference
from sdtune.training.kernels.lora_linear import LoraCopies, LoraGroup, lora_linear_reference
from sdtune.training.kernels.residual import add_bias, add_bias_reference

BYTES_PER_SECOND, FLOPS = 3.35e12, 989e12
"""Of an H100 SXM: memory, and bfloat16 on tensor cores."""
REPLAYS = 20
TOLERANCE = 1.5
"""Times the error of plain torch, that ours may have."""
BATCHES = (1, 4, 16)
DEVICE = "cuda"
Function = Callable[..., Any]


@dataclass
class Case:
    """inputs: tensors, those with a gradient among them; ours: ways to compute it, by name, the product's first.

    others: what is timed for the record; moved: bytes that must go through memory, forward and
    backward; flops: of its matrix products.
    """

    name: str
    inputs: list[torch.Tensor | None]
    reference: Function
    ours: dict[str, Function]
    moved: float = 0
    flops: float = 0
    compiled: bool = False
    others: dict[str, Function] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> torch.Tensor:
    """By a generator of their own: a recording that fails leaves torch's in its middle, which ends all that follows."""
    generator = torch.Generator(DEVICE).manual_seed(math.prod(shape))
    return torch.randn(shape, device=DEVICE, generator=generator).to(dtype).requires_grad_(grad)


def image(batch: int, channels: int, side: int) -> torch.Tensor:
    """In channels_last, of a mean that is not zero."""
    return (numbers(batch, side, side, channels, grad=False) + 0.5).permute(0, 3, 1, 2).requires_grad_()


def group_norms() -> Iterator[Case]:
    shapes = [(320, 64), (640, 32), (1280, 16), (1280, 8), (960, 64), (2560, 16), (320, 128), (1280, 32)]
    for channels, side in shapes:
        for batch in BATCHES:
            weight, bias, offset = (numbers(channels, grad=False) for _ in range(3))
            shift = numbers(batch, channels, grad=False)
            x = image(batch, channels, side)
            whole = fits_a_program(batch, side * side, channels // 32)
            yield Case(
                f"group_norm {batch}x{channels}x{side}x{side}", [x, weight, bias, shift, offset],
                lambda *given: group_norm_reference(*given[:3], 32, 1e-5, True, *given[3:]),
                {
                    "chosen": lambda *given, way=whole: group_norm(*given[:3], 32, 1e-5, True, *given[3:], way),
                    "other": lambda *given, way=not whole: group_norm(*given[:3], 32, 1e-5, True, *given[3:], way),
                },
                # x in, norm out; x, both gradients in, one out.
                moved=6 * x.nbytes, compiled=(channels, batch) == (320, 4), facts={"whole": whole},
            )  # fmt: skip


def trained_group_norms() -> Iterator[Case]:
    for channels, side in ((320, 64), (1280, 8)):
        x = image(4, channels, side)
        weight, bias, offset = (numbers(channels, dtype=torch.float32) for _ in range(3))
        yield Case(
            f"group_norm trained 4x{channels}x{side}x{side}", [x, weight, bias, numbers(4, channels), offset],
            lambda *given: group_norm_reference(*given[:3], 32, 1e-5, True, *given[3:]),
            {"chosen": lambda *given: group_norm(*given[:3], 32, 1e-5, True, *given[3:])}, moved=6 * x.nbytes,
        )  # fmt: skip


def layer_norms() -> Iterator[Case]:
    for channels, tokens in ((320, 4096), (640, 1024), (1280, 256), (640, 4096), (1280, 1024)):
        for batch in BATCHES:
            x, residual = numbers(batch, tokens, channels), numbers(batch, tokens, channels)
            trained = batch == 4
            yield Case(
                f"layer_norm {'trained ' if trained else ''}{batch}x{tokens}x{channels}",
                [x, residual, numbers(channels, grad=trained), numbers(channels, grad=trained)],
                lambda *given: add_layer_norm_reference(*given, 1e-5),
                {"chosen": lambda *given: add_layer_norm(*given, 1e-5)},
                moved=8 * x.nbytes, compiled=(channels, tokens, batch) == (320, 4096, 4),
            )  # fmt: skip


def geglus() -> Iterator[Case]:
    for width, tokens in ((1280, 4096), (2560, 1024), (5120, 256), (5120, 1024)):
        for batch in BATCHES:
            x = numbers(batch, tokens, 2 * width)
            compiled = (width, batch) == (1280, 4)
            yield Case(
                f"geglu {batch}x{tokens}x{width}", [x], geglu_reference, {"chosen": geglu},
                moved=4 * x.nbytes, compiled=compiled,
            )  # fmt: skip


def residuals() -> Iterator[Case]:
    for channels, side in ((320, 64), (1280, 16)):
        for batch in BATCHES:
            x, other = image(batch, channels, side), image(batch, channels, side)
            yield Case(
                f"residual {batch}x{channels}x{side}x{side}", [x, other, numbers(channels, grad=False)],
                add_bias_reference, {"chosen": add_bias}, moved=3 * x.nbytes, compiled=(channels, batch) == (320, 4),
            )  # fmt: skip


def one_by_one(x: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """given: three weights, three downs, three ups."""
    layers = zip(given[:3], given[3:6], given[6:], strict=True)
    return tuple(lora_linear_reference(x, weight, None, down, up, 2.0) for weight, down, up in layers)


class Together:
    """The same as a group, whose adapters are copied but in a graph: there they are once for the whole model."""

    def __init__(self) -> None:
        self.groups: dict[int, LoraGroup] = {}

    def __call__(self, x: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self.groups[id(given[0])](x)
        if id(given[0]) not in self.groups:
            # It holds the weights, so that none of the next has their id.
            self.groups[id(given[0])] = LoraGroup(given[:3], [None] * 3, given[3:6], given[6:], [2.0] * 3)
        LoraCopies()([self.groups[id(given[0])]])
        return self.groups[id(given[0])](x)


def lora_linears() -> Iterator[Case]:
    """q, k and v of self-attention at rank 4, against one layer after the other."""
    for width, tokens in ((320, 4096), (640, 1024), (1280, 256), (1280, 1024)):
        for batch in BATCHES:
            weights = [numbers(width, width, grad=False) / width**0.5 for _ in range(3)]
            downs = [(numbers(4, width, grad=False) / width**0.5).requires_grad_() for _ in range(3)]
            ups = [numbers(width, 4) for _ in range(3)]

            x = numbers(batch, tokens, width)
            inputs = [x, *weights, *downs, *ups]
            yield Case(
                f"lora_linear {batch}x{tokens}x{width}", inputs, one_by_one, {"chosen": Together()},
                # In and out; both again, and x's gradient.
                moved=9 * x.nbytes, flops=12 * batch * tokens * width**2,
            )  # fmt: skip


def outcome(case: Case, function: Function, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Results and gradients; dtype: what the inputs are cast to, None as they are."""
    given = [copied(one, dtype) for one in case.inputs]
    results = function(*given)
    results = results if isinstance(results, tuple) else (results,)
    grads = [numbers(*one.shape, dtype=one.dtype, grad=False) for one in results]
    trained = [one for one in given if one is not None and one.requires_grad]
    return [*results, *torch.autograd.grad(results, trained, grads)]


def copied(one: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    """With its strides: parts of a product stay as far apart as they are there."""
    if one is None:
        return None
    empty = torch.empty_strided(one.shape, one.stride(), dtype=dtype or one.dtype, device=one.device)
    return empty.copy_(one.detach()).requires_grad_(one.requires_grad)


def largest_errors(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> list[float]:
    pairs = zip(found, wanted, strict=True)
    return [round(((a.float() - b).abs().max() / b.abs().max().clamp(min=1e-9)).item(), 6) for a, b in pairs]


def microseconds(case: Case, function: Function) -> float:
    """Forward and backward, as one CUDA graph."""
    given = [copied(one, None) for one in case.inputs]
    trained = [one for one in given if one is not None and one.requires_grad]
    results = function(*given)
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.empty_like(one).copy_(numbers(*one.shape, grad=False)) for one in results]
    del results

    def once() -> None:
        made = function(*given)
        torch.autograd.grad(made if isinstance(made, tuple) else (made,), trained, grads)

    return timed(once)


def timed(once: Callable[[], None]) -> float:
    """Microseconds of one of REPLAYS replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return round(begin.elapsed_time(end) * 1e3 / REPLAYS, 1)


def measure(case: Case, compiling: bool) -> dict[str, Any]:
    """Errors and times of one case; what fails is said in their place."""
    bound = max(case.moved / BYTES_PER_SECOND, case.flops / FLOPS) * 1e6
    found: dict[str, Any] = {"case": case.name, **case.facts, "bound": round(bound, 1)}
    wanted = outcome(case, case.reference, torch.float32)
    found["plain_errors"] = largest_errors(outcome(case, case.reference), wanted)
    for name, function in case.ours.items():
        try:
            found[f"{name}_errors"] = largest_errors(outcome(case, function), wanted)
            pairs = zip(found[f"{name}_errors"], found["plain_errors"], strict=True)
            found[f"{name}_right"] = all(ours <= TOLERANCE * max(plain, 2**-8) for ours, plain in pairs)
            found[name] = microseconds(case, function)
        except Exception as error:  # noqa: BLE001
            found[name] = failure(error)
    found["plain"] = microseconds(case, case.reference)
    times: dict[str, Any] = {}
    for name, function in case.others.items():
        try:
            times[name] = microseconds(case, function)
        except Exception as error:  # noqa: BLE001
            times[name] = failure(error)
    found |= {"others": times} if times else {}
    if case.compiled and compiling:
        torch._dynamo.reset()
        found["compiled"] = microseconds(case, torch.compile(case.reference, dynamic=False))
    return found


BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
SHAPES = (
    # Cross-attention of Stable Diffusion 1.5 at 512 px, of XL at 1024 px, and with longer prompts.
    (8, 40, 4096, 77), (8, 80, 1024, 77), (8, 160, 256, 77), (8, 160, 64, 77), (10, 64, 4096, 77), (20, 64, 1024, 77),
    (8, 40, 4096, 154), (8, 80, 1024, 154), (10, 64, 4096, 154), (20, 64, 1024, 154), (20, 64, 1024, 231),
    # Self-attention.
    (8, 160, 64, 64), (8, 160, 256, 256), (8, 80, 1024, 1024), (8, 40, 4096, 4096), (20, 64, 1024, 1024),
    (10, 64, 4096, 4096),
)  # fmt: skip
"""Heads, their size, tokens and keys."""


def attentions() -> Iterator[Case]:
    for heads, head_dim, tokens, keys in SHAPES:
        for batch in BATCHES:
            query, key, value = projections(batch, heads * head_dim, tokens, keys)
            yield Case(
                f"attention {batch}x{heads}x{tokens}x{keys} of {head_dim}", [query, key, value],
                of_projections(attention.attention_reference, heads),
                {"chosen": of_projections(attention.attention, heads)},
                # Query and result; query, its gradient and the result's; keys and values are as often.
                moved=5 * query.nbytes + 6 * key.nbytes,
                # Forward two products, backward five.
                flops=14 * batch * heads * tokens * keys * head_dim,
                others={backend.name: of_projections(by(backend), heads) for backend in BACKENDS},
                facts={"shape": (batch, heads, head_dim, tokens, keys)},
            )  # fmt: skip


def projections(batch: int, width: int, tokens: int, keys: int) -> list[torch.Tensor]:
    """query, [batch, tokens, width], key and value, [batch, keys, width], as parts of the products they come from."""
    if tokens == keys:
        parts = numbers(batch, tokens, 3 * width, grad=False).split(width, dim=2)
    else:
        parts = numbers(batch, tokens, width, grad=False), *numbers(batch, keys, 2 * width, grad=False).split(width, 2)
    return [part.detach().requires_grad_() for part in parts]


def parted(given: Sequence[Any], heads: int) -> list[torch.Tensor]:
    return [one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in given]


def of_projections(function: Function, heads: int) -> Function:
    return lambda *given: function(*parted(given, heads)).transpose(1, 2).flatten(2)


def by(backend: SDPBackend) -> Function:
    def attend(*given: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return attention.attention_reference(*given)

    return attend


CHANGES: dict[str, tuple[Any, ...]] = {
    "forward": ((64, 4), (128, 4), (128, 8), (64, 8), (32, 4)),
    "backward": ((64, 8, False), (64, 4, True), (64, 8, True), (128, 8, False), (32, 8, True), (32, 8, False)),
    "stages": (1, 2, 3),
    "programs": (66, 132, 264, 396),
}
"""Of ``attention.Tiles``, one after the other with the best so far: rows and warps; rows, warps and apart; the rest."""


def tune(case: Case) -> dict[str, Any]:
    """Microseconds of each change, and the best."""
    _, _, head_dim, _, keys = case.facts["shape"]
    now, original = attention.tiles(head_dim, max(16, 1 << (keys - 1).bit_length())), attention.tiles
    found: dict[str, Any] = {"times": {}}
    least = math.inf
    try:
        for kind, values in CHANGES.items():
            best = now
            for value in values:
                tried = changed(now, kind, value)
                attention.tiles = lambda *_, tried=tried: tried
                name = " ".join(str(one) for one in tried)
                if name in found["times"]:
                    continue
                try:
                    found["times"][name] = took = microseconds(case, case.ours["chosen"])
                except Exception as error:  # noqa: BLE001
                    found["times"][name], took = failure(error), math.inf
                if took < least:
                    best, least = tried, took
            now = best
    finally:
        attention.tiles = original
    return {**found, "best": repr(now), "chosen": least}


def takes(case: Case) -> bool:
    return attention.few_keys(*parted(case.inputs, case.facts["shape"][1]))


def changed(tiles: attention.Tiles, kind: str, value: Any) -> attention.Tiles:
    if kind == "forward":
        return tiles._replace(rows=value[0], warps=value[1])
    if kind == "backward":
        return tiles._replace(back_rows=value[0], back_warps=value[1], apart=value[2])
    return tiles._replace(**{kind: value})


def adamws() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """All weights of SD 1.5's UNet, and a LoRA of rank 4."""
    for count in (859_520_964, 797_184):
        yield f"adamw {count}", lambda count=count: measure_adamw(count, BYTES_PER_SECOND)


def failure(error: BaseException) -> str:
    return f"failed: {type(error).__name__}: {str(error).strip()[:300]}"


def line(found: dict[str, Any]) -> str:
    if "times" in found:
        return f"{found['case']:34}  {found['chosen']:8}  {found['best']}  {ordered(found['times'])}"
    told = [f"{found['case']:34}"]
    for name in ("bound", "chosen", "other", "plain", "compiled"):
        told += [f"{name} {str(found[name])[:60]:>8}"] if name in found else []
    wrong = [name for name in ("chosen", "other") if found.get(f"{name}_right") is False]
    if "others" in found:
        times = {name: found[name] for name in ("chosen", "plain") if name in found} | found["others"]
        told += [f"best: {ordered(times).split()[0]}; {ordered(found['others'])}"]
    return "  ".join(told) + (f"  WRONG: {', '.join(wrong)} {found}" if wrong else "")


def ordered(times: dict[str, Any]) -> str:
    """Quickest first, failures last."""
    pairs = sorted(times.items(), key=lambda one: (isinstance(one[1], str), one[1]))
    return ", ".join(f"{name} {str(took)[:40]}" for name, took in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="cases whose name this regular expression is found in")
    parser.add_argument("--seconds", type=float, default=60, help="no case is begun after so many")
    parser.add_argument("--no-compile", action="store_true", help="torch.compile takes seconds for each kernel")
    parser.add_argument("--tune", action="store_true", help="attention alone, where the kernels take it: other tiles")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernel_speed.py: found no CUDA device; the kernels are tested without one by make test.")
    # Each capture looks for garbage first.
    gc.collect()
    gc.freeze()
    started, done = time.perf_counter(), list[dict[str, Any]]()
    kinds = (group_norms, trained_group_norms, layer_norms, geglus, residuals, lora_linears)
    # One case of each kind after the other, so that a run that is cut short has told something of all.
    queues: list[Iterator[Any]] = [*(kind() for kind in kinds), attentions(), adamws()]
    if options.tune:
        queues = [((case.name, lambda case=case: tune(case)) for case in attentions() if takes(case))]
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    left_out = 0
    while queues:
        for queue in list(queues):
            case = next(queue, None)
            if case is None:
                queues.remove(queue)
                continue
            name, work = case if isinstance(case, tuple) else (case.name, None)
            if not re.search(options.only, name):
                continue
            if time.perf_counter() - started > options.seconds:
                left_out += 1
                continue
            began = time.perf_counter()
            try:
                found = {"case": name, **(work() if work else measure(case, not options.no_compile))}
            except Exception as error:  # noqa: BLE001
                traceback.print_exc()
                found = {"case": name, "bound": 0, "chosen": failure(error)}
            found["seconds"] = round(time.perf_counter() - began, 2)
            done.append(found)
            print(line(found), flush=True)
            options.file.write_text(json.dumps({**facts, "cases": done, "left_out": left_out}, indent=1))
    print(f"{left_out} cases left out")


if __name__ == "__main__":
    main()
