"""The kernels of an operation, compiled for a GPU that need not be there, and what their code says.

They are recorded from a call on tensors without data, and each is compiled once.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import sass
from benchmarks.sass import Code
from ptattn.bench.op_workloads import Operation
from ptattn.kernels import host
from ptattn.kernels.host import Launch

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8"}
ELEMENT_BYTES = {"bf16": 2, "f32": 4}


@dataclass(frozen=True)
class Resources:
    """Of one program; registers are those of one thread."""

    registers: int
    spilled: int  # bytes stored and loaded; on AMD, registers
    stack: int  # bytes
    serialized: bool = False  # each wgmma waits for the one before


@dataclass(frozen=True)
class Hopper:
    """Of a kernel for sm90: instructions, and what they must be for the source's tiles."""

    wgmma: int
    older: int  # products by the tensor cores of older GPUs
    wide_loads: int  # of 16 bytes, from global memory
    on_wgmma: int  # products that the compiler has put there
    elsewhere: tuple[str, ...]  # rows x inner x columns of the other products
    tile_loads: int  # that the tiles take, if each is loaded 16 bytes at a time


@dataclass(frozen=True)
class Compiled:
    resources: Resources
    shared: int  # bytes
    hopper: Hopper | None = None
    code: Code | None = None  # where `hopper` is


# In SASS: products on wgmma, those of older tensor cores, loads of 16 bytes from global memory.
COUNTED = (r"\bHGMMA\b", r"\b[BDHIQ]MMA\b", r"\b(?:LDG|LDGSTS)\.[\w.]*\b128\b")


def launches(
    operation: Operation,
    task: str,
    arch: str,
    dtype: torch.dtype = torch.bfloat16,
    key_mask: Tensor | None = None,
) -> list[Launch]:
    """What the forward without gradients, or the backward alone, would start."""
    inputs = operation.inputs("meta")
    tensors = tuple(t.detach().to(dtype).requires_grad_() for t in inputs.tensors)
    mask = inputs.key_mask if key_mask is None else key_mask
    # What has no data is sent to the fake kernels, unless nothing seems to look.
    with mock.patch("ptattn.backends.operator.observed", return_value=False):
        with host.record(arch) as found, torch.set_grad_enabled(task != "forward"):
            outputs = operation.call("triton", tensors, mask)
        if task == "forward":
            return found
        with host.record(arch) as found:
            torch.autograd.grad(outputs, tensors, [g.to(dtype) for g in inputs.upstream])
        return found


def values(launch: Launch) -> dict[str, Any]:
    """The runtime arguments by name."""
    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    return dict(zip(names, launch.args, strict=True))


def source(launch: Launch) -> ASTSource:
    """What the launch would compile: pointers are 16-byte aligned, as torch's allocator makes."""
    if host.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    signature, constants, attributes = {}, {}, {}
    given = values(launch)
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", launch.constants[name]
        elif isinstance(given[name], Tensor):
            signature[name] = POINTERS[given[name].dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            number = "fp32" if isinstance(given[name], float) else "i32"
            signature[name] = parameter.annotation_type or number
    return ASTSource(launch.kernel, signature, constants, attributes)


def key(launch: Launch) -> str:
    """Of launches that share a compilation."""
    code, config = source(launch), launch.config
    return f"{code.name} {code.signature} {code.constants} {config.warps} {config.stages}"


_forked: list[Launch] = []  # launches cannot be sent to a process, but a forked one has them


def build_all(found: Sequence[Launch], arch: str) -> Iterator[Compiled | str]:
    """What came of compiling each, or its error; as many at a time as there are cores."""
    _forked[:] = found
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_build, range(len(found)), [arch] * len(found))


def _build(index: int, arch: str) -> Compiled | str:
    try:
        return build(_forked[index], arch)
    except Exception as raised:  # whatever a compiler raises
        return f"{type(raised).__name__}: {raised}"


def build(launch: Launch, arch: str) -> Compiled:
    """Compile anew, whatever Triton's cache holds: only then does ptxas say what it did."""
    options = dict(num_warps=launch.config.warps, num_stages=launch.config.stages)
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source(launch), target=TARGETS[arch], options=options)
    shared = kernel.metadata.shared
    if TARGETS[arch].backend == "hip":
        return Compiled(parse_amdgcn(kernel.asm["amdgcn"]), shared)
    resources = parse_ptxas(log.getvalue())
    if arch != "sm90":
        return Compiled(resources, shared)
    text = disassemble(kernel.asm["cubin"])
    hopper = parse_hopper(text, kernel.asm["ttgir"], 32 * launch.config.warps)
    return Compiled(resources, shared, hopper, sass.read(text))


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse_ptxas(log: str) -> Resources:
    """The output of ptxas -v."""
    stack = _number(r"(\d+) bytes stack frame", log)
    spilled = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    serialized = "wgmma.mma_async instructions are serialized" in log
    return Resources(_number(r"Used (\d+) registers", log), spilled, stack, serialized)


def parse_amdgcn(assembly: str) -> Resources:
    """Of AMD's assembly. Scalar registers spill to vector registers, which costs little and is not
    counted; if they had to go to memory, there would be a stack."""
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    return Resources(*(_number(rf"\.{name}: +(\d+)", assembly) for name in names))


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in what the compiler says: {text[:2000]}")
    return int(match[1])


def parse_hopper(text: str, ttgir: str, threads: int) -> Hopper:
    """SASS, and Triton's last form with tiles."""
    dots = re.findall(r"= tt\.dot .*: tensor<(\d+x\d+)x.* \* tensor<\d+x(\d+)x", ttgir)
    return Hopper(
        *(len(re.findall(pattern, text)) for pattern in COUNTED),
        len(re.findall(r"= ttng\.warp_group_dot ", ttgir)),
        tuple("x".join(shape) for shape in dots),
        sum(_tile_loads(line, threads) for line in ttgir.splitlines()),
    )


def _tile_loads(line: str, threads: int) -> int:
    """16-byte loads that one thread needs for the tile of this line; none for small tiles."""
    tile = re.search(
        r"(?:= tt\.load|ttg\.async_copy_global_to_local) .*"
        r": tensor<(\d+)x(\d+)x!tt\.ptr<(bf16|f32)>",
        line,
    )
    if tile is None:
        return 0
    return int(tile[1]) * int(tile[2]) * ELEMENT_BYTES[tile[3]] // (16 * threads)
