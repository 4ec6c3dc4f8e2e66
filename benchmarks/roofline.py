"""What a kernel launch must read, write and multiply, and the time that this takes at least.

The model, for one launch on an H200:

- bytes: every input and output once, so re-reads of keys, values and neighbours' rows are taken to
  hit the cache; at the measured copy rate.
- products: multiply-adds of the matrix products, two operations each. `useful` counts the pairs of
  query and key and the channels that there are, `padded` those that the tiles hold, rows past a
  window and channels past the head dim included; the time is that of the padded ones, at the
  measured rate of bf16 or the specified rate of fp32, which has no tensor cores here.
- exponentials: one for each padded pair, at the rate of the special function units (3.9e12 per
  second, arXiv 2407.08608); all other arithmetic on the scores is not counted.
- balance: products and exponentials last as long as on the multiprocessor with most programs.
- overlap: memory traffic overlaps with all else. Products overlap with exponentials only where two
  programs share a multiprocessor, as each waits for its own.

Latency, launches and the kernels' index arithmetic are left out: measured times lie above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptattn.geometry import WindowGrid
from ptattn.kernels import host
from ptattn.kernels.host import Launch

KIB = 1024
# Shared memory of one program, in bytes.
SHARED_LIMITS = {"sm80": 163 * KIB, "sm90": 227 * KIB, "sm100": 227 * KIB, "gfx942": 64 * KIB}
# An H200: of one multiprocessor, then of all.
SM_REGISTERS, SM_WARPS, SM_SHARED, SM_PROGRAMS = 64 * KIB, 64, 228 * KIB, 32
SHARED_RESERVED = KIB  # per program, by CUDA
MULTIPROCESSORS = 132
COPY_RATE, EXP_RATE = 4.3e12, 3.9e12
PRODUCT_RATES = {torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 67e12}

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
    """Bytes, floating-point operations of products, and exponentials of one launch."""

    bytes: int
    useful: int
    padded: int
    exponentials: int

    @property
    def useful_share(self) -> float:
        """Of the operations done; 1 where there are none."""
        return self.useful / self.padded if self.padded else 1.0


@dataclass(frozen=True)
class Prediction:
    """Seconds that each resource alone takes, and all together."""

    memory: float
    products: float
    exponentials: float
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
    name = launch.kernel.__name__
    if name not in PRODUCTS:
        return Work(size, 0, 0, 0)
    useful, padded = _pairs(launch)
    channels = launch.constants["D0"] + launch.constants["D1"]
    per_pair = 2 * PRODUCTS[name]
    return Work(
        size, per_pair * useful * launch.constants["D"], per_pair * padded * channels, padded
    )


def predict(work: Work, programs: int, per_sm: int, dtype: torch.dtype) -> Prediction:
    busiest = -(-programs // MULTIPROCESSORS) * MULTIPROCESSORS / programs
    memory = work.bytes / COPY_RATE
    products = busiest * work.padded / PRODUCT_RATES[dtype]
    exponentials = busiest * work.exponentials / EXP_RATE
    on_chip = max(products, exponentials) if per_sm >= 2 else products + exponentials
    return Prediction(memory, products, exponentials, max(memory, on_chip))


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
