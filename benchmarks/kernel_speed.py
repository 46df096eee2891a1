"""The fused kernels on a GPU: right, and how quick, at the shapes of Stable Diffusion 1.5 at 512 px and XL at 1024 px.

    python benchmarks/kernels.py FILE [--only REGEX] [--seconds 60]

Writes FILE as JSON, renewed after each case, and prints a line for each: the largest error of values and gradients as a
part of the largest number, ours and that of plain torch in bfloat16, both against float32; microseconds forward and
backward of plain torch, of torch.compile, of ours, and what the memory's bandwidth allows. All are timed as CUDA
graphs, as the trainer runs them: small tensors stay in the GPU's cache there, which they do not in a training step.
A case that fails says so and does not end the others. Last, the table that ``kernels/attention.py`` wants.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

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

    moved: bytes that must go through memory, forward and backward; flops: of its matrix products.
    """

    name: str
    inputs: list[torch.Tensor | None]
    reference: Function
    ours: dict[str, Function]
    moved: float = 0
    flops: float = 0
    compiled: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


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
    torch.manual_seed(1)
    grads = [torch.randn(one.shape, device=DEVICE).to(one.dtype) for one in results]
    trained = [one for one in given if one is not None and one.requires_grad]
    return [*results, *torch.autograd.grad(results, trained, grads)]


def copied(one: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    if one is None:
        return None
    return (
        one.detach().clone(memory_format=torch.preserve_format).to(dtype or one.dtype).requires_grad_(one.requires_grad)
    )


def largest_errors(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> list[float]:
    pairs = zip(found, wanted, strict=True)
    return [round(((a.float() - b).abs().max() / b.abs().max().clamp(min=1e-9)).item(), 6) for a, b in pairs]


def microseconds(case: Case, function: Function) -> float:
    """Forward and backward, as one CUDA graph."""
    given = [copied(one, None) for one in case.inputs]
    trained = [one for one in given if one is not None and one.requires_grad]
    results = function(*given)
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.randn_like(one) for one in results]
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
    if case.compiled and compiling:
        torch._dynamo.reset()
        found["compiled"] = microseconds(case, torch.compile(case.reference, dynamic=False))
    return found


def attentions() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every backend and padded size, in the layout that projections of q, k and v as one have."""
    own = [(8, 40, 4096, 4096), (10, 64, 4096, 4096), (8, 80, 1024, 1024), (8, 160, 256, 256), (20, 64, 1024, 1024)]
    across = [(8, 40, 4096, 77), (10, 64, 4096, 77), (8, 80, 1024, 77), (8, 160, 256, 77)]
    for heads, head_dim, tokens, keys in own + across:
        for batch in (4, 1, 16):
            shape = (batch, heads, head_dim, tokens, keys)
            yield (
                f"attention {batch}x{heads}x{tokens}x{keys} of {head_dim}",
                lambda shape=shape: measure_attention(*shape),
            )


def measure_attention(batch: int, heads: int, head_dim: int, tokens: int, keys: int) -> dict[str, Any]:
    width = heads * head_dim
    if tokens == keys:
        whole = numbers(batch, tokens, 3 * width, grad=False)
        parts = [part.detach().requires_grad_() for part in whole.split(width, dim=2)]
    else:
        both = numbers(batch, keys, 2 * width, grad=False)
        parts = [numbers(batch, tokens, width), *(part.detach().requires_grad_() for part in both.split(width, dim=2))]
    dy = numbers(batch, tokens, width, grad=False)

    def attend(choice: attention.Choice | None, *given: torch.Tensor) -> torch.Tensor:
        split = [one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in given]
        return attention.attention(*split, choice=choice).transpose(1, 2).flatten(2)

    choices: list[attention.Choice | None] = [None]
    for backend in attention.CANDIDATES:
        choices += [attention.Choice(backend, padded) for padded in attention.padded_sizes(head_dim)]
    found: dict[str, Any] = {"head_dim": head_dim, "keys": keys, "batch": batch, "times": {}}
    # Forward two products, backward five.
    found["bound"] = round(14 * batch * heads * tokens * keys * head_dim / FLOPS * 1e6, 1)
    first: torch.Tensor | None = None
    for choice in choices:
        name = "torch's own" if choice is None else f"{choice.backend.name} {choice.padded}"
        try:
            result = attend(choice, *parts)
            first = result if first is None else first
            assert (result - first).abs().max() <= 0.02 * first.abs().max(), "another result"
            found["times"][name] = timed(lambda choice=choice: torch.autograd.grad(attend(choice, *parts), parts, dy))
        except Exception as error:  # noqa: BLE001
            found["times"][name] = failure(error)
    return found


def failure(error: BaseException) -> str:
    return f"failed: {type(error).__name__}: {str(error).strip()[:300]}"


def table(found: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For each head size, with many keys or few, the choice with the least sum over the batches and widths."""
    sums: dict[str, dict[str, list[float]]] = {}
    for one in found:
        if "times" in one:
            row = f"({one['head_dim']}, {one['keys'] > attention.MANY_TOKENS})"
            for name, took in one["times"].items():
                sums.setdefault(row, {}).setdefault(name, []).append(float("inf") if isinstance(took, str) else took)
    return {row: min(choices, key=lambda name, choices=choices: sum(choices[name])) for row, choices in sums.items()}


def line(found: dict[str, Any]) -> str:
    if "times" in found:
        times = sorted(found["times"].items(), key=lambda one: (isinstance(one[1], str), one[1]))
        return f"{found['case']:34} bound {found['bound']:8}  " + ", ".join(f"{n} {str(t)[:40]}" for n, t in times)
    told = [f"{found['case']:34}"]
    for name in ("bound", "chosen", "other", "plain", "compiled"):
        told += [f"{name} {str(found[name])[:60]:>8}"] if name in found else []
    wrong = [name for name in ("chosen", "other") if found.get(f"{name}_right") is False]
    return "  ".join(told) + (f"  WRONG: {', '.join(wrong)} {found}" if wrong else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="cases whose name this regular expression is found in")
    parser.add_argument("--seconds", type=float, default=60, help="no case is begun after so many")
    parser.add_argument("--no-compile", action="store_true", help="torch.compile takes seconds for each kernel")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py: found no CUDA device; the kernels are tested without one by make test.")
    # Each capture looks for garbage first.
    gc.collect()
    gc.freeze()
    started, done = time.perf_counter(), list[dict[str, Any]]()
    kinds = (group_norms, trained_group_norms, layer_norms, geglus, residuals, lora_linears)
    # One case of each kind after the other, so that a run that is cut short has told something of all.
    queues: list[Iterator[Any]] = [*(kind() for kind in kinds), attentions()]
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
            torch.manual_seed(0)
            began = time.perf_counter()
            try:
                found = {"case": name, **(work() if work else measure(case, not options.no_compile))}
            except Exception as error:  # noqa: BLE001
                traceback.print_exc()
                found = {"case": name, "bound": 0, "chosen": failure(error)}
            found["seconds"] = round(time.perf_counter() - began, 2)
            done.append(found)
            print(line(found), flush=True)
            options.file.write_text(
                json.dumps({**facts, "cases": done, "attention": table(done), "left_out": left_out}, indent=1)
            )
    print("attention:", json.dumps(table(done)), f"; {left_out} cases left out; {SDPBackend.__name__} names and sizes")


if __name__ == "__main__":
    main()
