"""What all launches share: outputs, strides, configurations, sums of parts."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ...geometry import WindowGrid
from .. import configs, reduce
from ..configs import Config
from ..runtime import arch, start

# The window coordinates' fast division is exact below this many tokens.
MAX_WINDOW = 2**20


def config_of(kernel: Any, x: Tensor, **sizes: int) -> Config:
    return configs.find(kernel.__name__, arch(x.device), bytes=x.element_size(), **sizes)


def split_channels(channels: int) -> tuple[int, int]:
    """Two tile widths, each 0 or a power of two from 16 on, that hold `channels` with little waste.

    The second is 0 where one power of two is as small.
    """
    whole = max(16, triton.next_power_of_2(channels))
    first = whole // 2
    if channels == whole or first < 16:
        return whole, 0
    second = max(16, triton.next_power_of_2(channels - first))
    return (first, second) if first + second < whole else (whole, 0)


def alignment(*tensors: Tensor) -> int:
    """The power of two, 16 at most, that divides every stride but the last; those of one index
    do not matter."""
    strides = (
        stride
        for t in tensors
        for stride, length in zip(t.stride()[:-1], t.shape[:-1], strict=True)
        if length > 1
    )
    return math.gcd(16, *strides)


def strides_of(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:-1]]


def geometry(windows: WindowGrid | None) -> tuple[int, ...]:
    """Grid, window and offset -shift mod window on each axis, the kernels' geometry."""
    if windows is None:
        return (1,) * 6 + (0,) * 3
    grid, size, shift = windows.grid, windows.window, windows.shift
    return (*grid, *size, *(-s % p for s, p in zip(shift, size, strict=True)))


def largest_window(windows: WindowGrid) -> int:
    """Tokens of the largest window that the grid can hold."""
    return math.prod(min(n, p) for n, p in zip(windows.grid, windows.window, strict=True))


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def sum_splits(parts: Tensor, out: Tensor) -> None:
    """(outer, splits, inner) -> (outer, inner)."""
    outer, splits, inner = parts.shape
    block = 1024
    programs = outer * triton.cdiv(inner, block)
    start(
        reduce.sum_splits, programs, parts, out, splits, inner, BLOCK=block, config=Config(warps=4)
    )
