"""Hopper's machine code as one warp runs it: how long it takes alone, and what it keeps busy.

ptxas writes its schedule into every instruction: how many cycles the next one waits, which
scoreboards an instruction of unknown latency sets, and which ones it waits for. So a warp without
neighbours is followed cycle by cycle with no more known than those latencies. Code outside of
innermost loops is taken to run once, branches as not taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Cycles. Of global memory, cold, and of all that is answered on chip: shared memory, shuffles,
# barriers, special functions, the start of a wgmma. About what arXiv 2402.13499 measures on Hopper.
GLOBAL_LATENCY, ON_CHIP_LATENCY = 480, 30
# A scheduler's special function unit has 4 lanes for a warp's 32.
SPECIAL_CYCLES = 8
STEADY = 4  # passes of a loop after which its loads are as far ahead as they get

_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) *;\s+/\* 0x[0-9a-f]{16} \*/\s*\n"
    r"\s+/\* 0x([0-9a-f]{16}) \*/",
    re.MULTILINE,
)
_NAME = re.compile(r"(?:@\S+ )?(\w*)")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)* .*?0x([0-9a-f]+)")
_WGMMA = re.compile(r"\bHGMMA\.64x(\d+)x16\.\S+ R\d+, (gdesc|R)")
_COPIES_LEFT = re.compile(r"\bDEPBAR\.LE SB0, 0x([0-9a-f]+)")
NO_SCOREBOARD = 7
WORK = {"HGMMA", "HMMA", "LDG", "LDGSTS", "UTMALDG"}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # "LDG" of "@P0 LDG.E.128 R4, ..."
    text: str
    stall: int  # cycles until the next may follow
    written: int  # the scoreboard that is set when the result is there
    read: int  # the one that is set when the operands are read
    waits: tuple[int, ...]  # for scoreboards
    tensor: float  # cycles of a product on the tensor cores
    copies_left: int | None  # waits until so many groups of copies are under way


@dataclass(frozen=True)
class Part:
    """A stretch of code: one warp's instructions and special functions, cycles from first to last
    if it is alone, and cycles in which it, with its group of four, keeps the tensor cores busy."""

    instructions: int
    cycles: float
    tensor: float
    special: int


@dataclass(frozen=True)
class Code:
    """What runs once, and one pass of the main loop, which makes `unrolled` iterations."""

    once: Part
    loop: Part | None = None
    unrolled: int = 1


def read(text: str) -> Code:
    """Of what cuobjdump -sass prints."""
    decoded = [_decode(*match) for match in _INSTRUCTION.findall(text)]
    instructions = [i for i in decoded if i.name != "NOP"]  # they fill up the last line
    if not instructions:
        raise ValueError(f"no instructions in what cuobjdump says: {text[:2000]}")
    loops = _innermost_loops(instructions)
    inside = {i.address for loop in loops for i in loop}
    once = _follow([i for i in instructions if i.address not in inside], 1)
    if not loops:
        return Code(once)
    # The shortest of those that multiply, which is the one without a mask; or the longest.
    multiplying = [loop for loop in loops if _count(loop, "HGMMA")]
    main = min(multiplying, key=len) if multiplying else max(loops, key=len)
    fewest = min(_count(loop, "LDG") for loop in loops)
    unrolled = max(1, _count(main, "LDG") // max(1, fewest))
    return Code(once, _follow(main, STEADY), unrolled)


def _decode(address: str, text: str, control: str) -> Instruction:
    bits = int(control, 16)
    stall, written, read, waits = bits >> 41 & 15, bits >> 46 & 7, bits >> 49 & 7, bits >> 52 & 63
    product, copies = _WGMMA.search(text), _COPIES_LEFT.search(text)
    return Instruction(
        int(address, 16),
        _NAME.match(text)[1],
        text,
        max(1, stall),
        written,
        read,
        tuple(board for board in range(6) if waits >> board & 1),
        _tensor_cycles(int(product[1]), product[2] == "gdesc") if product else 0.0,
        int(copies[1], 16) if copies else None,
    )


def _innermost_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Of loops that load or multiply; others wait for a barrier in memory, mostly once."""
    loops = []
    for i in instructions:
        branch = _BRANCH.search(i.text)
        if branch and int(branch[1], 16) < i.address:
            body = [j for j in instructions if int(branch[1], 16) <= j.address <= i.address]
            if any(j.name in WORK for j in body):
                loops.append(body)
    return [
        loop
        for loop in loops
        if not any(o is not loop and o[0] in loop and o[-1] in loop for o in loops)
    ]


def _count(instructions: list[Instruction], name: str) -> int:
    return sum(i.name == name for i in instructions)


def _follow(instructions: list[Instruction], passes: int) -> Part:
    """The last of so many passes."""
    warp = _Warp()
    for _ in range(passes):
        begin = warp.now
        for instruction in instructions:
            warp.issue(instruction)
    tensor = sum(i.tensor for i in instructions)
    return Part(len(instructions), warp.now - begin, tensor, _count(instructions, "MUFU"))


class _Warp:
    def __init__(self) -> None:
        self.now = self.product_ready = 0.0
        self.ready = [0.0] * (NO_SCOREBOARD + 1)
        self.copies: list[float] = []  # when each group of copies to shared memory was asked for

    def issue(self, i: Instruction) -> None:
        """Wait for what the instruction waits for, and start it."""
        self.now = max([self.now, *(self.ready[board] for board in i.waits)])
        if i.copies_left is not None and len(self.copies) > i.copies_left:
            self.now = max(self.now, self.copies[-1 - i.copies_left] + GLOBAL_LATENCY)
        if i.text.startswith("WARPGROUP.DEPBAR"):
            self.now = max(self.now, self.product_ready)
        if i.name == "BAR":
            self.now += ON_CHIP_LATENCY
        if i.name == "LDGDEPBAR":
            self.copies.append(self.now)
        if i.tensor:
            self.product_ready = max(self.product_ready, self.now + ON_CHIP_LATENCY) + i.tensor
        latency = GLOBAL_LATENCY if i.name == "LDG" else ON_CHIP_LATENCY
        self.ready[i.written] = max(self.ready[i.written], self.now + latency)
        self.ready[i.read] = max(self.ready[i.read], self.now + ON_CHIP_LATENCY)
        self.now += i.stall


def _tensor_cycles(columns: int, from_shared: bool) -> float:
    """Of a wgmma of 64 x columns x 16: at 2,048 multiply-adds a cycle, or as long as shared memory
    takes, at 128 bytes a cycle, for the second matrix and, where it lies there, the first."""
    return max(columns / 2, columns / 4 + (16 if from_shared else 0))
