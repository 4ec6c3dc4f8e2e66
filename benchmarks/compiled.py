"""A kernel launch compiled for a GPU that need not be there, and what its code says of itself."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks import roofline, sass
from benchmarks.sass import Code
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
class Instructions:
    wgmma: int
    other_products: int  # of tensor cores, but older than Hopper's
    wide_loads: int  # of 16 bytes, from global memory


@dataclass(frozen=True)
class Tiles:
    """What the compiler made of the products and loads in the source."""

    on_wgmma: int
    elsewhere: tuple[str, ...]  # shapes of the other products, with the reason
    wide_loads: int  # that the tiles take, if each is loaded 16 bytes at a time


@dataclass(frozen=True)
class Compiled:
    """`instructions` and `tiles` are known for sm90 only, `code` where SASS was read."""

    resources: Resources
    shared: int  # bytes
    seconds: float
    instructions: Instructions | None = None
    tiles: Tiles | None = None
    code: Code | None = None


# ptxas makes each of these PTX instructions the SASS one; but to disassemble takes half a second.
DIALECTS = {
    "sass": (r"\bHGMMA\b", r"\b[BDHIQ]MMA\b", r"\b(?:LDG|LDGSTS)\.[\w.]*\b128\b"),
    "ptx": (
        r"\bwgmma\.mma_async",
        r"\bmma\.sync",
        r"\bld\.global[\w.:]*\.v4\.b32|\bcp\.async\.cg\.shared\.global .*, 0x10,",
    ),
}


def source(launch: Launch) -> ASTSource:
    """What the launch would compile: pointers are 16-byte aligned, as torch's allocator makes."""
    signature, constants, attributes = {}, {}, {}
    given = roofline.values(launch)
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


def build(launch: Launch, arch: str, dialect: str = "sass") -> Compiled:
    """Compile anew, whatever Triton's cache holds: only then does ptxas say what it did."""
    options = dict(num_warps=launch.config.warps, num_stages=launch.config.stages)
    start, log = time.perf_counter(), io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source(launch), target=TARGETS[arch], options=options)
    seconds = time.perf_counter() - start
    shared = kernel.metadata.shared
    if TARGETS[arch].backend == "hip":
        return Compiled(parse_amdgcn(kernel.asm["amdgcn"]), shared, seconds)
    resources = parse_ptxas(log.getvalue())
    if arch != "sm90":
        return Compiled(resources, shared, seconds)
    text = _text(kernel, dialect)
    instructions = count_instructions(text, dialect)
    tiles = parse_ttgir(kernel.asm["ttgir"], 32 * launch.config.warps)
    code = sass.read(text) if dialect == "sass" else None
    return Compiled(resources, shared, seconds, instructions, tiles, code)


def _text(kernel: CompiledKernel, dialect: str) -> str:
    if dialect == "ptx":
        return kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
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


def count_instructions(text: str, dialect: str) -> Instructions:
    return Instructions(*(len(re.findall(pattern, text)) for pattern in DIALECTS[dialect]))


def parse_ttgir(text: str, threads: int) -> Tiles:
    dots = re.findall(r"= tt\.dot .*: tensor<(\d+)x(\d+)x.* \* tensor<\d+x(\d+)x", text)
    return Tiles(
        len(re.findall(r"= ttng\.warp_group_dot ", text)),
        tuple(_without_wgmma(*map(int, shape)) for shape in dots),
        sum(_wide_loads(line, threads) for line in text.splitlines()),
    )


def _without_wgmma(rows: int, inner: int, columns: int) -> str:
    too_small = [
        f"{size} {name}, wgmma takes {least}"
        for name, size, least in (("rows", rows, 64), ("inner", inner, 16), ("columns", columns, 8))
        if size < least
    ]
    return f"{rows}x{inner}x{columns} ({'; '.join(too_small) or 'its shape would allow wgmma'})"


def _wide_loads(line: str, threads: int) -> int:
    """16-byte loads that one thread needs for the tile of this line; none for small tiles."""
    tile = re.search(
        r"(?:= tt\.load|ttg\.async_copy_global_to_local) .*"
        r": tensor<(\d+)x(\d+)x!tt\.ptr<(bf16|f32)>",
        line,
    )
    if tile is None:
        return 0
    return int(tile[1]) * int(tile[2]) * ELEMENT_BYTES[tile[3]] // (16 * threads)
