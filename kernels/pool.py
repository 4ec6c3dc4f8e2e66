"""Window means, alone or with the residual before them and the LayerNorm of the same tokens.

A program reads its share of one window's tokens, whole rows; where the shares are several,
`reduce.sum_splits` adds them up in a fixed order. The backward is `norm.norm_backward`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import WindowGrid
from . import host
from .host import Plan, planned
from .norm import add_residual, load_vector, normalize, stride_of, tile_of, total_dtype
from .reduce import sum_parts
from .tile import (
    box_size,
    load_rows,
    num_tokens,
    num_windows,
    store_rows,
    token_in_box,
    window_box,
    zeros,
)

RUNTIME = (
    *("x_b", "x_n", "y_b", "y_n", "gate_b", "splits", "eps"),
    *("f", "h", "w", "pf", "ph", "pw", "of", "oh", "ow"),
)


@triton.jit(do_not_specialize=RUNTIME)
def pool_forward(
    x, y, gate, total, normed, means,
    x_b: tl.int64, x_n: tl.int64, y_b: tl.int64, y_n: tl.int64, gate_b: tl.int64,
    splits, eps, f, h, w, pf, ph, pw, of, oh, ow,
    ADD: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """means (B, M, splits, C), to be summed over splits, of total = x + gate · y, or of x; with
    ADD, total and with NORM, its LayerNorm: (B, N, C). All contiguous."""
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    windows = num_windows(geometry)
    split = tl.program_id(0) % splits
    window = tl.program_id(0) // splits % windows
    batch = (tl.program_id(0) // splits // windows).to(tl.int64)
    OUT: tl.constexpr = C & -C
    box = window_box(window, geometry)
    size = box_size(box)
    own = batch * num_tokens(geometry) * C
    x += tl.multiple_of(batch * x_b, ALIGN)
    y += tl.multiple_of(batch * y_b, ALIGN)
    gate0, gate1 = load_vector(gate, batch, gate_b, GATED, C, C0, C1, ALIGN, ACC)
    sum0, sum1 = zeros(1, C0, C1, ACC)
    share = tl.cdiv(tl.cdiv(size, ROWS), splits) * ROWS
    last = tl.minimum((split + 1) * share, size)
    for start in tl.range(split * share, last, ROWS, num_stages=STAGES):
        slot = start + tl.arange(0, ROWS)
        valid = slot < last
        token = token_in_box(slot, box, geometry)
        x0, x1 = load_rows(x, token, x_n, valid, C, C0, C1, ALIGN)
        x0, x1 = add_residual(
            x0.to(ACC), x1.to(ACC), y, y_n, gate0, gate1, total + own, token, valid, ADD, GATED,
            C, C0, C1, ALIGN, ACC,
        )  # fmt: skip
        sum0 += tl.sum(x0, 0)[None, :]
        if C1 > 0:
            sum1 += tl.sum(x1, 0)[None, :]
        if NORM:
            x0, x1 = normalize(x0, x1, eps, C, C0, C1)
            store_rows(normed + own, token, C, valid, x0, x1, C, C0, C1, OUT)
    row = (batch * windows + window) * splits + split + tl.zeros([1], tl.int32)
    one = tl.full([1], True, tl.int1)
    store_rows(means, row, C, one, sum0 / size, sum1 / size, C, C0, C1, OUT)


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, windows: WindowGrid, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """total = x + gate · y, None without y, its LayerNorm in `dtype`, and its window means."""
    x, y, gate = host.rows(x, y, gate)
    total = None if y is None else host.empty(x, *x.shape, dtype=total_dtype(x, y, gate))
    normed = host.empty(x, *x.shape, dtype=dtype)
    return total, normed, _means(x, y, gate, total, normed, windows, eps)


def window_mean(x: Tensor, windows: WindowGrid) -> Tensor:
    """(B, M, C)."""
    (x,) = host.rows(x)
    return _means(x, None, None, None, None, windows, None)


def _means(
    x: Tensor, y: Tensor | None, gate: Tensor | None, total: Tensor | None, normed: Tensor | None,
    windows: WindowGrid, eps: float | None,
) -> Tensor:  # fmt: skip
    """The means of total, which is x without y; writes total and normed where they are given."""
    dtype = total_dtype(x, y, gate)
    plan, whole, shape = _plan(*host.facts(x, y, gate, normed), windows, eps, host.target(x))
    means = host.empty(x, *whole, dtype=dtype)
    parts = host.empty(x, *shape, dtype=host.accumulator(x.dtype)) if shape else means
    given = [x if t is None else t for t in (y, gate)]
    plan.start(x, *given, *[means if t is None else t for t in (total, normed)], parts)
    return sum_parts(parts, means) if shape else means


@planned
def _plan(
    x: Any, y: Any, gate: Any, normed: Any, windows: WindowGrid, eps: float | None,
    target: tuple[str, str],
) -> tuple[Plan, tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """And the shapes of the means, and of their parts where a window's are several."""
    (b, _, c), m = x[0], windows.num_windows
    largest = host.largest_window(windows)
    config, tile = tile_of("pool_forward", x, largest, target)
    splits = _splits(x[0][1], largest)
    strides = host.strides_of(x, y or x)
    numbers = (*strides, stride_of(gate), splits, eps or 0.0, *host.geometry(windows))
    flags = dict(ADD=y is not None, GATED=gate is not None, NORM=eps is not None)
    align = host.alignment(x, y, gate)
    constants = flags | dict(STAGES=config.stages) | tile | dict(ALIGN=align)
    plan = Plan(pool_forward, b * m * splits, *numbers, config=config, **constants)
    return plan, (b, m, c), (b * m, splits, c) if splits > 1 else ()


def _splits(tokens: int, window: int) -> int:
    """Programs that share a window: one for 32 tokens or, where a grid is small, for as few as 8,
    so that some hundred programs run. A window of up to 32 tokens is one program's."""
    return 1 if window <= 32 else host.cdiv(window, min(32, max(8, tokens // 1024)))
