"""What a kernel launch must read, write and multiply, and the time that this takes.

The model, for one launch on an H200. A multiprocessor holds so many programs at a time, and each
program needs:

- memory: its share of all bytes, every input and output once, so that re-reads of keys, values and
  neighbours' rows are taken to hit the cache; at the measured copy rate.
- issue slots: its warps' instructions, as many as the machine code has times its iterations; four
  schedulers start one each a cycle.
- tensor cores and special functions: by the same count, at the rates of the chip.
- latency: what a warp alone spends waiting, by its own schedule (`sass`).

A program alone takes the sum of these. Several take turns at the same resources: how long each is
there then follows from mean value analysis (Reiser and Lavenberg, 1980) of a closed network of so
many customers, every resource a queue. A launch lasts as often as long as it has waves of programs,
the last one with the programs that are left, after `LAUNCH`.

Four constants: the two latencies of `sass`, `CLOCK` and `LAUNCH`. Left out: bytes that are read
again, programs of unequal length, and copies by the tensor memory accelerator, whose latency a
schedule does not show.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.compiled import Compiled, values
from benchmarks.sass import SPECIAL_CYCLES, Code
from ptattn.geometry import WindowGrid
from ptattn.kernels import host
from ptattn.kernels.host import Launch

KIB = 1024
# Shared memory of one program, in bytes.
SHARED_LIMITS = {"sm80": 163 * KIB, "sm90": 227 * KIB, "sm100": 227 * KIB, "gfx942": 64 * KIB}
# An H200: of one multiprocessor, then of all.
SM_REGISTERS, SM_WARPS, SM_SHARED, SM_PROGRAMS = 64 * KIB, 64, 228 * KIB, 32
SHARED_RESERVED = KIB  # per program, by CUDA
MULTIPROCESSORS, SCHEDULERS = 132, 4
COPY_RATE = 4.3e12  # measured
CLOCK = 1.755e9  # under load: kernels of attention ran at 1.72 to 1.80 GHz
LAUNCH = 3.3e-6  # measured: what the clock of `ptattn bench` shows for a kernel with nothing to do

# How the names of kernels begin that multiply matrices.
PRODUCTS = ("window_", "few_keys_", "flash_")


@dataclass(frozen=True)
class Start:
    """A launch as the model takes it."""

    programs: int
    warps: int  # of a program
    per_sm: int  # programs that a multiprocessor holds
    bytes: int
    iterations: float
    code: Code


def programs_per_sm(registers: int, shared: int, warps: int) -> int:
    """Programs that an H200's multiprocessor holds; registers are those of one thread."""
    per_warp = -(-registers * 32 // 256) * 256  # granted to a warp by 256
    return min(
        SM_REGISTERS // (per_warp * warps),
        SM_SHARED // (shared + SHARED_RESERVED),
        SM_WARPS // warps,
        SM_PROGRAMS,
    )


def start(launch: Launch, built: Compiled) -> Start:
    """Of a kernel compiled for sm90."""
    warps = launch.config.warps
    per_sm = programs_per_sm(built.resources.registers, built.shared, warps)
    return Start(launch.programs, warps, per_sm, bytes_of(launch), iterations(launch), built.code)


def bytes_of(launch: Launch) -> int:
    # One tensor stands for another where a kernel does not use an argument: count it once.
    tensors = {id(a): a for a in launch.args if isinstance(a, Tensor)}.values()
    return sum(t.numel() * t.element_size() for t in tensors)


def iterations(launch: Launch) -> float:
    """Of one program's main loop."""
    if not launch.kernel.__name__.startswith(PRODUCTS):
        return _rowwise_iterations(launch)
    rows = launch.constants["ROWS"]
    if launch.constants.get("SLOTS", rows) != rows:
        return 0.0  # small windows that share a tile loop only over what is not finite
    tile = rows * launch.constants.get("KEYS", rows)
    return _pairs(launch) / (max(1, launch.programs) * tile)


def _rowwise_iterations(launch: Launch) -> float:
    """Of a program over rows of channels, or over the parts of a sum."""
    given, rows = values(launch), launch.constants["ROWS"]
    if launch.kernel.__name__ == "sum_splits":
        return _blocks(given["splits"], rows)
    if "splits" not in given:
        return 0.0
    tokens = given["x"].shape[1]
    if launch.kernel.__name__ == "pool_forward":
        tokens /= _windows(given).num_windows
    return _blocks(_blocks(tokens, rows), given["splits"])


def predict(start: Start, copy_rate: float = COPY_RATE) -> float:
    """Seconds."""
    once, loop = start.code.once, start.code.loop
    passes = start.iterations / start.code.unrolled if loop else 0.0

    def of_a_program(name: str) -> float:
        return getattr(once, name) + passes * (getattr(loop, name) if loop else 0)

    instructions, special = of_a_program("instructions"), SPECIAL_CYCLES * of_a_program("special")
    tensor, alone = of_a_program("tensor"), of_a_program("cycles")
    # Cycles of a multiprocessor's resources that one program keeps busy.
    per_scheduler = start.warps / SCHEDULERS
    memory = start.bytes / max(1, start.programs) / (copy_rate / MULTIPROCESSORS / CLOCK)
    busy = (memory, *(per_scheduler * part for part in (instructions, tensor, special)))
    waiting = max(0.0, alone - instructions - tensor - special)
    waves, rest = divmod(start.programs / MULTIPROCESSORS, start.per_sm)
    cycles = waves * _cycle(start.per_sm, waiting, busy)
    cycles += _cycle(math.ceil(rest), waiting, busy) if rest else 0.0
    return LAUNCH + cycles / CLOCK


def _cycle(programs: int, waiting: float, busy: tuple[float, ...]) -> float:
    """Cycles that a program is there, on a multiprocessor that holds so many: exact mean value
    analysis of a closed network with one delay."""
    queued = [0.0] * len(busy)
    cycle = waiting + sum(busy)
    for number in range(1, programs + 1):
        times = [b * (1 + q) for b, q in zip(busy, queued, strict=True)]
        cycle = waiting + sum(times)
        queued = [number * t / cycle for t in times]
    return cycle


def _blocks(n: float, size: int) -> int:
    return -(-math.ceil(n) // size)


def _pairs(launch: Launch) -> int:
    """Pairs of query and key in the tiles of all samples and heads."""
    given, rows = values(launch), launch.constants["ROWS"]
    batch, queries, heads, _ = given["q"].shape
    if "SLOTS" in launch.constants:
        tiles = _blocks(_windows(given).num_windows, rows // launch.constants["SLOTS"])
        return batch * heads * tiles * rows**2
    keys = launch.constants["KEYS"]
    if launch.constants.get("WINDOWED"):
        return batch * heads * _padded_window_pairs(_windows(given), rows, keys)
    blocks = _blocks(queries, rows) * _blocks(given["k"].shape[1], keys)
    return batch * heads * blocks * rows * keys


def _padded_window_pairs(windows: WindowGrid, rows: int, keys: int) -> int:
    """Of windows that loop over their keys in blocks of `keys`."""
    total = 0
    for runs in itertools.product(*map(windows.segments, range(3))):
        extents = [run.size for run in runs]
        blocks = [host.blocks_of_box(extents, size) * size for size in (rows, keys)]
        total += math.prod(run.number for run in runs) * math.prod(blocks)
    return total


def _windows(given: dict[str, Any]) -> WindowGrid:
    grid, window, offset = (
        tuple(given[name] for name in names)
        for names in (("f", "h", "w"), ("pf", "ph", "pw"), ("of", "oh", "ow"))
    )
    return WindowGrid(grid, window, tuple(-o % p for o, p in zip(offset, window, strict=True)))
