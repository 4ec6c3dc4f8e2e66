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
`useful` counts the pairs of query and key and the channels that there are, `padded` those that the
tiles hold, rows past a window and channels past the head dim included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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

# Matrix products of [rows, channels] by [channels, keys], or of that size, for each pair of tiles.
PRODUCTS = {
    "window_forward": 2,
    "window_backward": 5,
    "few_keys_forward": 2,
    "few_keys_backward": 5,
    "flash_forward": 2,
    "flash_backward_q": 3,
    "flash_backward_kv": 4,
}


@dataclass(frozen=True)
class Work:
    """Bytes, floating-point operations of products, and exponentials of one launch; iterations of
    the main loop of one program."""

    bytes: int
    useful: int
    padded: int
    exponentials: int
    iterations: float = 0.0

    @property
    def useful_share(self) -> float:
        """Of the operations done; 1 where there are none."""
        return self.useful / self.padded if self.padded else 1.0


@dataclass(frozen=True)
class Start:
    """A launch as the model takes it."""

    programs: int
    warps: int  # of a program
    per_sm: int  # programs that a multiprocessor holds
    bytes: int
    iterations: float
    code: Code


@dataclass(frozen=True)
class Prediction:
    """Seconds: what each resource would take if it were alone, and all together."""

    memory: float
    issue: float
    tensor: float
    special: float
    latency: float  # of the waves
    total: float


def programs_per_sm(registers: int, shared: int, warps: int) -> int:
    """Programs that an H200's multiprocessor holds; registers are those of one thread."""
    per_warp = -(-registers * 32 // 256) * 256  # granted to a warp by 256
    return min(
        SM_REGISTERS // (per_warp * warps),
        SM_SHARED // (shared + SHARED_RESERVED),
        SM_WARPS // warps,
        SM_PROGRAMS,
    )


def values(launch: Launch) -> dict[str, Any]:
    """The runtime arguments by name."""
    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    return dict(zip(names, launch.args, strict=True))


def work(launch: Launch) -> Work:
    # One tensor stands for another where a kernel does not use an argument: count it once.
    tensors = {id(a): a for a in launch.args if isinstance(a, Tensor)}.values()
    size = sum(t.numel() * t.element_size() for t in tensors)
    if launch.kernel.__name__ not in PRODUCTS:
        return Work(size, 0, 0, 0, _rowwise_iterations(launch))
    useful, padded = _pairs(launch)
    constants = launch.constants
    channels = constants["D0"] + constants["D1"]
    per_pair = 2 * PRODUCTS[launch.kernel.__name__]
    tile = constants["ROWS"] * constants.get("KEYS", constants["ROWS"])
    # Small windows that share a tile loop only over what is not finite.
    loops = constants.get("SLOTS", constants["ROWS"]) == constants["ROWS"]
    iterations = padded / (max(1, launch.programs) * tile) if loops else 0.0
    return Work(
        size, per_pair * useful * constants["D"], per_pair * padded * channels, padded, iterations
    )


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


def predict(start: Start, copy_rate: float = COPY_RATE) -> Prediction:
    once, loop = start.code.once, start.code.loop
    passes = start.iterations / start.code.unrolled if loop else 0.0

    def of_a_program(name: str) -> float:
        return getattr(once, name) + passes * (getattr(loop, name) if loop else 0)

    instructions, special = of_a_program("instructions"), SPECIAL_CYCLES * of_a_program("special")
    tensor, alone = of_a_program("tensor"), of_a_program("cycles")
    # Cycles of a multiprocessor's resources that one program keeps busy.
    per_scheduler = start.warps / SCHEDULERS
    rate = copy_rate / MULTIPROCESSORS / CLOCK
    busy = (
        start.bytes / max(1, start.programs) / rate,
        instructions * per_scheduler,
        tensor * per_scheduler,
        special * per_scheduler,
    )
    waiting = max(0.0, alone - instructions - tensor - special)
    waves, rest = divmod(start.programs / MULTIPROCESSORS, start.per_sm)
    cycles = waves * _cycle(start.per_sm, waiting, busy)
    cycles += _cycle(math.ceil(rest), waiting, busy) if rest else 0.0
    each = (start.programs / MULTIPROCESSORS * b / CLOCK for b in busy)
    latency = (waves + (rest > 0)) * alone / CLOCK
    return Prediction(*each, latency, LAUNCH + cycles / CLOCK)


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


def _pairs(launch: Launch) -> tuple[int, int]:
    """Pairs of query and key of all samples and heads: those that there are, those in the tiles."""
    given, rows = values(launch), launch.constants["ROWS"]
    batch, queries, heads, _ = given["q"].shape
    if "SLOTS" in launch.constants:
        windows = _windows(given)
        tiles = -(-windows.num_windows // (rows // launch.constants["SLOTS"]))
        return batch * heads * windows.num_pairs, batch * heads * tiles * rows**2
    if launch.constants.get("WINDOWED"):
        windows = _windows(given)
        padded = _padded_window_pairs(windows, rows, launch.constants["KEYS"])
        return batch * heads * windows.num_pairs, batch * heads * padded
    keys = given["k"].shape[1]
    padded = _pad(queries, rows) * _pad(keys, launch.constants["KEYS"])
    return batch * heads * queries * keys, batch * heads * padded


def _padded_window_pairs(windows: WindowGrid, rows: int, keys: int) -> int:
    """Of windows that loop over their keys in blocks of `keys`."""
    total = 0
    for frames in windows.segments(0):
        for lines in windows.segments(1):
            for columns in windows.segments(2):
                runs = (frames, lines, columns)
                count = math.prod(run.number for run in runs)
                extents = [run.size for run in runs]
                blocks = [host.blocks_of_box(extents, size) * size for size in (rows, keys)]
                total += count * math.prod(blocks)
    return total


def _windows(given: dict[str, Any]) -> WindowGrid:
    grid, window, offset = (
        tuple(given[name] for name in names)
        for names in (("f", "h", "w"), ("pf", "ph", "pw"), ("of", "oh", "ow"))
    )
    return WindowGrid(grid, window, tuple(-o % p for o, p in zip(offset, window, strict=True)))


def _pad(n: int, block: int) -> int:
    return -(-n // block) * block
