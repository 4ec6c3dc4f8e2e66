"""The launches of attention: dense, and within windows.

Tensors are as in `ptattn.ops`, with the last stride 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ...geometry import WindowGrid
from .. import few_keys, flash, window
from ..configs import Config
from ..runtime import start
from . import shared
from .shared import (
    accumulator,
    alignment,
    config_of,
    geometry,
    largest_window,
    split_channels,
    strides_of,
    sum_splits,
)

# A window of more tokens, or an attention to more keys, loops over its keys.
SHARED_TILE, FEW_KEYS = 64, 128


def loops_over_windows(windows: WindowGrid) -> bool:
    """By the window as given, whatever the grid, so that torch.compile need not know the grid."""
    return math.prod(windows.window) > SHARED_TILE


def _tiles(*tensors: Tensor) -> dict[str, Any]:
    """The constants that every attention kernel has."""
    head_dim = tensors[0].shape[-1]
    first, second = split_channels(head_dim)
    tf32 = tensors[0].dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    precision = "tf32" if tf32 else "ieee"
    return dict(D=head_dim, D0=first, D1=second, ALIGN=alignment(*tensors), PRECISION=precision)


# Dense attention.


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(B, N, H, D) and the log-sum-exp (B, H, N) in base 2, empty where the backward needs none."""
    if k.shape[1] > FEW_KEYS:
        return _flash(q, k, v, key_mask, scale, None)
    (b, n, h, d), m = q.shape, k.shape[1]
    out = shared.empty(q, b, n, h, d)
    kernel = few_keys.few_keys_forward
    sizes, config = _few_keys(kernel, q, m)
    splits = triton.cdiv(n, config.rows * 4)
    start(
        kernel, b * splits * h,
        q, k, v, _bytes(key_mask, out), out, *strides_of(q, k, v), n, m, h, splits, scale,
        MASKED=key_mask is not None, **sizes, **_tiles(q, k, v), config=config,
    )  # fmt: skip
    return out, shared.empty(q, 0, dtype=accumulator(q))


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
    dq = shared.empty(q, *(q.shape if need[0] else (0,)))
    parts = _Parts(k, splits, need)
    start(
        kernel, b * splits * h,
        q, k, v, _bytes(key_mask, dq), g, dq, *parts.tensors, *strides_of(q, k, v, g),
        n, m, h, splits, scale,
        **_needs(need), MASKED=key_mask is not None, **sizes, **_tiles(q, k, v, g), config=config,
    )  # fmt: skip
    return (dq, *parts.sums())


def _few_keys(kernel: Any, q: Tensor, m: int) -> tuple[dict[str, int], Config]:
    keys = max(16, triton.next_power_of_2(m))
    config = config_of(kernel, q, channels=sum(split_channels(q.shape[-1])), keys=keys)
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
        dtype = k.dtype if splits == 1 else accumulator(k)
        b, m, h, d = k.shape
        self.tensors = [
            shared.empty(k, *((b, splits, m * h * d) if needed else (0,)), dtype=dtype)
            for needed in need[1:]
        ]

    def sums(self) -> list[Tensor]:
        return [self._sum(parts) for parts in self.tensors]

    def _sum(self, parts: Tensor) -> Tensor:
        if parts.ndim == 1:
            return parts
        if self.splits == 1:
            return parts.view(self.k.shape)
        out = shared.empty(self.k, *self.k.shape)
        sum_splits(parts, out)
        return out


def _flash_config(
    kernel: Any, q: Tensor, windows: WindowGrid | None, key_mask: Tensor | None
) -> Config:
    sizes = dict(
        channels=sum(split_channels(q.shape[-1])),
        queries=largest_window(windows) if windows else q.shape[1],
        windowed=windows is not None,
        masked=key_mask is not None,
    )
    return config_of(kernel, q, **sizes)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float,
    windows: WindowGrid | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, n, h, d = q.shape
    out, lse = shared.empty(q, b, n, h, d), shared.empty(q, b, h, n, dtype=accumulator(q))
    kernel = flash.flash_forward
    config = _flash_config(kernel, q, windows, key_mask)
    blocks = triton.cdiv(largest_window(windows) if windows else n, config.rows)
    count = windows.num_windows if windows else 1
    start(
        kernel, b * count * blocks * h,
        q, k, v, _bytes(key_mask, out), out, lse, *strides_of(q, k, v),
        n, k.shape[1], h, blocks, abs(scale), *geometry(windows),
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
    delta = shared.empty(q, b, h, n, dtype=lse.dtype)
    dq = shared.empty(q, *(q.shape if need[0] else (0,)))
    mask = _bytes(key_mask, out)

    kernel = flash.flash_backward_q
    config = _flash_config(kernel, q, windows, key_mask)
    blocks = triton.cdiv(largest_window(windows) if windows else n, config.rows)
    start(
        kernel, b * count * blocks * h,
        q, k, v, mask, out, g, lse, delta, dq, *strides_of(q, k, v, g),
        n, m, h, blocks, scale, *geometry(windows),
        NEED_Q=need[0], ROWS=config.rows, KEYS=config.keys, **common, config=config,
    )  # fmt: skip

    kernel = flash.flash_backward_kv
    config = _flash_config(kernel, q, windows, key_mask)
    blocks = triton.cdiv(largest_window(windows) if windows else m, config.keys)
    splits = 1 if windows else _splits(n, blocks)
    parts = _Parts(k, splits, need)
    if need[1] or need[2]:
        start(
            kernel, b * count * blocks * splits * h,
            q, k, v, mask, g, lse, delta, *parts.tensors, *strides_of(q, k, v, g),
            n, m, h, blocks, splits, scale, *geometry(windows),
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
    out = shared.empty(q, b, n, h, d)
    kernel = window.window_forward
    sizes, config, tiles = _shared_tile(kernel, q, windows)
    start(
        kernel, b * tiles * h,
        q, k, v, out, *strides_of(q, k, v), h, scale, *geometry(windows),
        **sizes, **_tiles(q, k, v), config=config,
    )  # fmt: skip
    return out, shared.empty(q, 0, dtype=accumulator(q))


def window_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float,
    out: Tensor, lse: Tensor, g: Tensor, need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `attention_backward`."""
    if loops_over_windows(windows):
        return _flash_backward(q, k, v, None, scale, windows, out, lse, g, need)
    dq, dk, dv = (shared.empty(q, *(q.shape if needed else (0,))) for needed in need)
    kernel = window.window_backward
    sizes, config, tiles = _shared_tile(kernel, q, windows)
    start(
        kernel, q.shape[0] * tiles * q.shape[2],
        q, k, v, g, dq, dk, dv, *strides_of(q, k, v, g), q.shape[2], scale, *geometry(windows),
        **_needs(need), **sizes, **_tiles(q, k, v, g), config=config,
    )  # fmt: skip
    return dq, dk, dv


def _shared_tile(kernel: Any, q: Tensor, windows: WindowGrid) -> tuple[dict[str, int], Config, int]:
    slots = triton.next_power_of_2(math.prod(windows.window))
    config = config_of(kernel, q, channels=sum(split_channels(q.shape[-1])))
    rows = max(config.rows, slots)
    tiles = triton.cdiv(windows.num_windows, rows // slots)
    return dict(SLOTS=slots, ROWS=rows), config, tiles
