"""The host side of the kernels: shapes, outputs, configurations, launches. No math.

Tensors are as in `ptattn.ops`, with the last stride 1; geometry is a WindowGrid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..geometry import WindowGrid
from . import configs, few_keys, flash, reduce, window
from . import pool as pool_kernels
from .configs import Config
from .runtime import INTERPRETED, TRITON, KernelError, Launch, arch, record, start

__all__ = [
    "FEW_KEYS",
    "INTERPRETED",
    "MAX_WINDOW",
    "TRITON",
    "KernelError",
    "Launch",
    "attention",
    "attention_backward",
    "loops_over_windows",
    "pool",
    "pool_backward",
    "record",
    "split_channels",
    "window_attention",
    "window_attention_backward",
]

# A window of more tokens, or an attention to more keys, loops over its keys.
SHARED_TILE, FEW_KEYS = 64, 128
# The window coordinates' fast division is exact below this many tokens.
MAX_WINDOW = 2**20


def _config(kernel: Any, x: Tensor, **sizes: int) -> Config:
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


def _tiles(*tensors: Tensor) -> dict[str, Any]:
    """The constants that every attention kernel has."""
    head_dim = tensors[0].shape[-1]
    first, second = split_channels(head_dim)
    tf32 = tensors[0].dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    precision = "tf32" if tf32 else "ieee"
    return dict(D=head_dim, D0=first, D1=second, ALIGN=_align(*tensors), PRECISION=precision)


def _align(*tensors: Tensor) -> int:
    """The power of two, 16 at most, that divides every stride but the last; those of one index
    do not matter."""
    strides = (
        stride
        for t in tensors
        for stride, length in zip(t.stride()[:-1], t.shape[:-1], strict=True)
        if length > 1
    )
    return math.gcd(16, *strides)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:-1]]


def _geometry(windows: WindowGrid | None) -> tuple[int, ...]:
    """Grid, window and offset -shift mod window on each axis, the kernels' geometry."""
    if windows is None:
        return (1,) * 6 + (0,) * 3
    grid, size, shift = windows.grid, windows.window, windows.shift
    return (*grid, *size, *(-s % p for s, p in zip(shift, size, strict=True)))


def loops_over_windows(windows: WindowGrid) -> bool:
    """By the window as given, whatever the grid, so that torch.compile need not know the grid."""
    return math.prod(windows.window) > SHARED_TILE


def _largest(windows: WindowGrid) -> int:
    """Tokens of the largest window that the grid can hold."""
    return math.prod(min(n, p) for n, p in zip(windows.grid, windows.window, strict=True))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def _sum_splits(parts: Tensor, out: Tensor) -> None:
    """(outer, splits, inner) -> (outer, inner)."""
    outer, splits, inner = parts.shape
    block = 1024
    programs = outer * triton.cdiv(inner, block)
    start(
        reduce.sum_splits, programs, parts, out, splits, inner, BLOCK=block, config=Config(warps=4)
    )


# Attention.


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(B, N, H, D) and the log-sum-exp (B, H, N) in base 2, empty where the backward needs none."""
    if k.shape[1] > FEW_KEYS:
        return _flash(q, k, v, key_mask, scale, None)
    (b, n, h, d), m = q.shape, k.shape[1]
    out = _empty(q, b, n, h, d)
    kernel = few_keys.few_keys_forward
    sizes, config = _few_keys(kernel, q, m)
    splits = triton.cdiv(n, config.rows * 4)
    start(
        kernel, b * splits * h,
        q, k, v, _bytes(key_mask, out), out, *_strides(q, k, v), n, m, h, splits, scale,
        MASKED=key_mask is not None, **sizes, **_tiles(q, k, v), config=config,
    )  # fmt: skip
    return out, _empty(q, 0, dtype=_accumulator(q))


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float,
    out: Tensor, lse: Tensor, g: Tensor, need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; empty where `need` says that they are not."""
    if k.shape[1] > FEW_KEYS:
        return _flash_backward(q, k, v, key_mask, scale, None, out, lse, g, need)
    (b, n, h, _d), m = q.shape, k.shape[1]
    kernel = few_keys.few_keys_backward
    sizes, config = _few_keys(kernel, q, m)
    splits = _splits(n, 1)
    dq = _empty(q, *(q.shape if need[0] else (0,)))
    parts = _Parts(k, splits, need)
    start(
        kernel, b * splits * h,
        q, k, v, _bytes(key_mask, dq), g, dq, *parts.tensors, *_strides(q, k, v, g),
        n, m, h, splits, scale,
        **_needs(need), MASKED=key_mask is not None, **sizes, **_tiles(q, k, v, g), config=config,
    )  # fmt: skip
    return (dq, *parts.sums())


def _few_keys(kernel: Any, q: Tensor, m: int) -> tuple[dict[str, int], Config]:
    keys = max(16, triton.next_power_of_2(m))
    config = _config(kernel, q, channels=sum(split_channels(q.shape[-1])), keys=keys)
    return dict(ROWS=config.rows, KEYS=keys), config


def _bytes(key_mask: Tensor | None, unused: Tensor) -> Tensor:
    return unused if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _needs(need: tuple[bool, bool, bool]) -> dict[str, bool]:
    return dict(zip(("NEED_Q", "NEED_K", "NEED_V"), need, strict=True))


def _splits(queries: int, blocks: int) -> int:
    """How many programs share a head's queries for the gradients of its keys, in `blocks` blocks.

    Enough to fill a GPU, few enough that their parts cost little. Depends on neither batch nor
    device: so that a sample's gradients have the same bits in every batch.
    """
    return max(1, min(triton.cdiv(queries, 256), max(8, queries // 1024) // blocks))


class _Parts:
    """dk and dv, in parts of fixed order where several programs share the queries."""

    def __init__(self, k: Tensor, splits: int, need: tuple[bool, bool, bool]) -> None:
        self.k, self.splits = k, splits
        dtype = k.dtype if splits == 1 else _accumulator(k)
        b, m, h, d = k.shape
        self.tensors = [
            _empty(k, *((b, splits, m * h * d) if needed else (0,)), dtype=dtype)
            for needed in need[1:]
        ]

    def sums(self) -> list[Tensor]:
        return [self._sum(parts) for parts in self.tensors]

    def _sum(self, parts: Tensor) -> Tensor:
        if parts.ndim == 1:
            return parts
        if self.splits == 1:
            return parts.view(self.k.shape)
        out = _empty(self.k, *self.k.shape)
        _sum_splits(parts, out)
        return out


def _flash_config(
    kernel: Any, q: Tensor, windows: WindowGrid | None, key_mask: Tensor | None
) -> Config:
    sizes = dict(
        channels=sum(split_channels(q.shape[-1])),
        queries=_largest(windows) if windows else q.shape[1],
        windowed=windows is not None,
        masked=key_mask is not None,
    )
    return _config(kernel, q, **sizes)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float,
    windows: WindowGrid | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, n, h, d = q.shape
    out, lse = _empty(q, b, n, h, d), _empty(q, b, h, n, dtype=_accumulator(q))
    kernel = flash.flash_forward
    config = _flash_config(kernel, q, windows, key_mask)
    blocks = triton.cdiv(_largest(windows) if windows else n, config.rows)
    count = windows.num_windows if windows else 1
    start(
        kernel, b * count * blocks * h,
        q, k, v, _bytes(key_mask, out), out, lse, *_strides(q, k, v),
        n, k.shape[1], h, blocks, abs(scale), *_geometry(windows),
        NEGATIVE=scale < 0, WINDOWED=windows is not None, MASKED=key_mask is not None,
        ROWS=config.rows, KEYS=config.keys, **_tiles(q, k, v), config=config,
    )  # fmt: skip
    return out, lse


def _flash_backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float,
    windows: WindowGrid | None,
    out: Tensor, lse: Tensor, g: Tensor, need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (b, n, h, _), m = q.shape, k.shape[1]
    count = windows.num_windows if windows else 1
    common = dict(WINDOWED=windows is not None, MASKED=key_mask is not None, **_tiles(q, k, v, g))
    delta = _empty(q, b, h, n, dtype=lse.dtype)
    dq = _empty(q, *(q.shape if need[0] else (0,)))
    mask = _bytes(key_mask, out)

    kernel = flash.flash_backward_q
    config = _flash_config(kernel, q, windows, key_mask)
    blocks = triton.cdiv(_largest(windows) if windows else n, config.rows)
    start(
        kernel, b * count * blocks * h,
        q, k, v, mask, out, g, lse, delta, dq, *_strides(q, k, v, g),
        n, m, h, blocks, scale, *_geometry(windows),
        NEED_Q=need[0], ROWS=config.rows, KEYS=config.keys, **common, config=config,
    )  # fmt: skip

    kernel = flash.flash_backward_kv
    config = _flash_config(kernel, q, windows, key_mask)
    blocks = triton.cdiv(_largest(windows) if windows else m, config.keys)
    splits = 1 if windows else _splits(n, blocks)
    parts = _Parts(k, splits, need)
    if need[1] or need[2]:
        start(
            kernel, b * count * blocks * splits * h,
            q, k, v, mask, g, lse, delta, *parts.tensors, *_strides(q, k, v, g),
            n, m, h, blocks, splits, scale, *_geometry(windows),
            NEED_K=need[1], NEED_V=need[2], ROWS=config.rows, KEYS=config.keys, **common,
            config=config,
        )  # fmt: skip
    return (dq, *parts.sums())


# Attention within windows.


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float
) -> tuple[Tensor, Tensor]:
    """As `attention`."""
    if loops_over_windows(windows):
        return _flash(q, k, v, None, scale, windows)
    b, n, h, d = q.shape
    out = _empty(q, b, n, h, d)
    kernel = window.window_forward
    sizes, config, tiles = _shared_tile(kernel, q, windows)
    start(
        kernel, b * tiles * h,
        q, k, v, out, *_strides(q, k, v), h, scale, *_geometry(windows),
        **sizes, **_tiles(q, k, v), config=config,
    )  # fmt: skip
    return out, _empty(q, 0, dtype=_accumulator(q))


def window_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float,
    out: Tensor, lse: Tensor, g: Tensor, need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `attention_backward`."""
    if loops_over_windows(windows):
        return _flash_backward(q, k, v, None, scale, windows, out, lse, g, need)
    dq, dk, dv = (_empty(q, *(q.shape if needed else (0,))) for needed in need)
    kernel = window.window_backward
    sizes, config, tiles = _shared_tile(kernel, q, windows)
    start(
        kernel, q.shape[0] * tiles * q.shape[2],
        q, k, v, g, dq, dk, dv, *_strides(q, k, v, g), q.shape[2], scale, *_geometry(windows),
        **_needs(need), **sizes, **_tiles(q, k, v, g), config=config,
    )  # fmt: skip
    return dq, dk, dv


def _shared_tile(kernel: Any, q: Tensor, windows: WindowGrid) -> tuple[dict[str, int], Config, int]:
    slots = triton.next_power_of_2(math.prod(windows.window))
    config = _config(kernel, q, channels=sum(split_channels(q.shape[-1])))
    rows = max(config.rows, slots)
    tiles = triton.cdiv(windows.num_windows, rows // slots)
    return dict(SLOTS=slots, ROWS=rows), config, tiles


# Window means.


def pool(x: Tensor, windows: WindowGrid, eps: float | None) -> tuple[Tensor, Tensor]:
    """The means (B, M, C) and, unless eps is None, the LayerNorm (B, N, C) of the tokens."""
    b, _n, c = x.shape
    m = windows.num_windows
    tile, config = _pool_tile(pool_kernels.pool_forward, x, _largest(windows))
    splits = triton.cdiv(_largest(windows), 32)
    means = _empty(x, b, m, c)
    parts = means if splits == 1 else _empty(x, b * m, splits, c, dtype=_accumulator(x))
    normed = _empty(x, *((0,) if eps is None else x.shape))
    start(
        pool_kernels.pool_forward, b * m * splits,
        x, parts, normed, *_strides(x), splits, eps or 0.0, *_geometry(windows),
        NORM=eps is not None, STAGES=config.stages, **tile, ALIGN=_align(x), config=config,
    )  # fmt: skip
    if splits > 1:
        _sum_splits(parts, means)
    return means, normed


def pool_backward(
    dmeans: Tensor, windows: WindowGrid, norm: tuple[Tensor, Tensor, float] | None
) -> Tensor:
    """dx (B, N, C); `norm` is x, the gradient of its LayerNorm, and eps."""
    b, _, c = dmeans.shape
    n = windows.num_tokens
    tile, config = _pool_tile(pool_kernels.pool_backward, dmeans, 16)
    dx = _empty(dmeans, b, n, c)
    x, dnormed, eps = norm or (dx, dx, 0.0)
    start(
        pool_kernels.pool_backward, b * triton.cdiv(n, tile["ROWS"]),
        x, dnormed, dmeans, dx, *_strides(x, dnormed, dmeans), eps, *_geometry(windows),
        NORM=norm is not None, **tile, ALIGN=_align(x, dnormed, dmeans), config=config,
    )  # fmt: skip
    return dx


def _pool_tile(kernel: Any, x: Tensor, tokens: int) -> tuple[dict[str, Any], Config]:
    """Rows of at most 4096 channels together and, as a power of two, no more than `tokens`."""
    first, second = split_channels(x.shape[-1])
    config = _config(kernel, x)
    fitting = max(1, 4096 // (first + second))
    rows = min(16, triton.next_power_of_2(tokens), 1 << fitting.bit_length() - 1)
    acc = triton.language.float64 if x.dtype == torch.float64 else triton.language.float32
    return dict(ROWS=rows, C=x.shape[-1], C0=first, C1=second, ACC=acc), config
