"""Compile every kernel for an H100, at shapes of Stable Diffusion: ``python compiling.py``, without a GPU.

Launches are caught and compiled instead; what they would have written is left as it is. Prints a line for each kernel
and shape: registers of a thread, bytes of what did not fit in them, of a program's shared memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sdtune.training.kernels import group_norm, launch, lora_linear
from sdtune.training.kernels.adamw import adamw
from sdtune.training.kernels.attention import attention
from sdtune.training.kernels.geglu import geglu
from sdtune.training.kernels.layer_norm import add_layer_norm
from sdtune.training.kernels.residual import add_bias

H100 = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
compiled: set[Any] = set()


def compile_instead(
    kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int, num_stages: int = 3, **more: Any
) -> None:
    """In place of a launch; numbers are specialized as a launch does: 1, and multiples of 16."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | more
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for number, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and value == 1):
            signature[parameter.name], constants[(number,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            whole = "i32" if isinstance(value, int) and value < 2**31 else "i64"
            signature[parameter.name] = whole if isinstance(value, int) else "fp32"
            if special and value % 16 == 0:
                attributes[(number,)] = [["tt.divisibility", 16]]
    file = kernel.__module__.rpartition(".")[2]
    key = (file, kernel.__name__, str(signature), str(constants), str(attributes), num_warps, num_stages)
    if key in compiled:
        return
    compiled.add(key)
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=H100, options=options)
    registers, stack = used(made.asm["cubin"])
    spilled = "spilled" if ".local" in made.asm["ptx"] else "in registers"
    sys.stdout.write(
        f"{file}.{kernel.__name__} {num_warps} warps, {spilled}: {registers} registers, {stack} bytes beside them, "
        f"{made.metadata.shared} shared\n"
    )


def used(binary: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its numbers that the assembler found no register for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", told)[0]
    return int(registers), int(stack)


def backward(*results: torch.Tensor) -> None:
    torch.stack([result.sum() for result in results]).sum().backward()


def main() -> None:
    launch.INTERPRETED = True
    JITFunction.run = compile_instead
    bfloat16 = torch.bfloat16
    for trained, kind in ((False, bfloat16), (True, torch.float32)):
        weights = {width: torch.ones(width, dtype=kind, requires_grad=trained) for width in (320, 640, 1280)}
        for batch, channels, side in ((1, 320, 64), (1, 1280, 8), (4, 640, 32)):
            x = torch.ones(batch, side, side, channels, dtype=bfloat16).permute(0, 3, 1, 2).requires_grad_()
            weight, shift = weights[channels], torch.ones(batch, channels, dtype=bfloat16, requires_grad=trained)
            backward(*group_norm.group_norm(x, weight, weight, 32, 1e-5, True, shift, weight))
        for channels in (320, 1280):
            x = torch.ones(2, 64, channels, dtype=bfloat16).requires_grad_()
            backward(*add_layer_norm(x, x, weights[channels], weights[channels], 1e-5))
    backward(geglu(torch.ones(2, 64, 2560, dtype=bfloat16).requires_grad_()))
    x = torch.ones(2, 8, 8, 320, dtype=bfloat16).permute(0, 3, 1, 2).requires_grad_()
    backward(add_bias(x, x, weights[320]))
    lora_linear.launch_copies(torch.zeros(3, 5, dtype=torch.int64), torch.ones(3), 2000, bfloat16, bfloat16)
    for heads, head_dim, tokens in ((8, 40, 4096), (10, 64, 4096), (8, 160, 256)):
        query = torch.ones(1, tokens, heads * head_dim, dtype=bfloat16)
        key, value = torch.ones(1, 77, 2 * heads * head_dim, dtype=bfloat16).chunk(2, dim=-1)
        split = (one.unflatten(-1, (heads, -1)).transpose(1, 2).requires_grad_() for one in (query, key, value))
        backward(attention(*split))
    for count in (859_521_024, 2_567_463_744):
        kinds = (torch.float32, torch.float32, torch.float32, bfloat16, bfloat16)
        flat = [torch.empty(count, dtype=kind, device="meta") for kind in kinds]
        adamw(*flat, torch.ones(()), 1.0, 1, 1e-5, 0.9, 0.999, 1e-8, 1e-2)


if __name__ == "__main__":
    sys.exit(main())
