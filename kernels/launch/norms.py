"""The launches of window means and of LayerNorm with what stands around it."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...geometry import WindowGrid
from .. import norm as norm_kernels
from .. import pool as pool_kernels
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

# Programs that share a sample's tokens for the gradients of its vectors, at most: enough to fill a
# GPU, few enough that their parts cost little. Depends on neither batch nor device.
MOST_PARTS = 256


def norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    windows: WindowGrid | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """total = x + gate · y, its modulated LayerNorm in `dtype`, and its means over `windows`.

    total is empty without y, the means are without windows; means exclude modulation.
    """
    b, n, _ = x.shape
    total = shared.empty(x, *((0,) if y is None else x.shape), dtype=total_dtype(x, y, gate))
    normed = shared.empty(x, *x.shape, dtype=dtype)
    if windows is not None:
        return total, normed, _pool(x, y, gate, total, normed, windows, eps)
    kernel = norm_kernels.norm_forward
    tile, config = _tile(kernel, x, 16)
    y_or, gate_or, shift_or, scale_or = (x if t is None else t for t in (y, gate, shift, scale))
    vectors = [_stride(t) for t in (gate, shift, scale)]
    start(
        kernel, b * triton.cdiv(n, tile["ROWS"]),
        x, y_or, gate_or, shift_or, scale_or, total, normed, *strides_of(x, y_or), *vectors, n, eps,
        ADD=y is not None, GATED=gate is not None, MODULATED=scale is not None, **tile,
        ALIGN=_alignment(x, y, gate, shift, scale), config=config,
    )  # fmt: skip
    return total, normed, shared.empty(x, 0)


def window_mean(x: Tensor, windows: WindowGrid) -> Tensor:
    """(B, M, C)."""
    nothing = shared.empty(x, 0)
    return _pool(x, None, None, nothing, nothing, windows, None)


def _pool(
    x: Tensor, y: Tensor | None, gate: Tensor | None, total: Tensor, normed: Tensor,
    windows: WindowGrid, eps: float | None,
) -> Tensor:  # fmt: skip
    """The means of total, which is x without y; writes total and, unless eps is None, normed."""
    (b, _n, c), m = x.shape, windows.num_windows
    kernel = pool_kernels.pool_forward
    tile, config = _tile(kernel, x, largest_window(windows))
    splits = triton.cdiv(largest_window(windows), 32)
    dtype = total_dtype(x, y, gate)
    means = shared.empty(x, b, m, c, dtype=dtype)
    parts = means if splits == 1 else shared.empty(x, b * m, splits, c, dtype=accumulator(x))
    y_or, gate_or = (x if t is None else t for t in (y, gate))
    start(
        kernel, b * m * splits,
        x, y_or, gate_or, total, normed, parts, *strides_of(x, y_or), _stride(gate), splits,
        eps or 0.0, *geometry(windows),
        ADD=y is not None, GATED=gate is not None, NORM=eps is not None, STAGES=config.stages,
        **tile, ALIGN=_alignment(x, y, gate), config=config,
    )  # fmt: skip
    if splits > 1:
        sum_splits(parts, means)
    return means


def norm_backward(
    x: Tensor | None, y: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    dtotal: Tensor | None, dnormed: Tensor | None, dmeans: Tensor | None,
    windows: WindowGrid | None, eps: float, need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dy and the gradients of gate, shift and scale, one after the other (B, ·C).

    x is what was normed, None for means alone. `need` says whether y, gate, and shift and scale
    need gradients: those that do not are left out. dy is empty where it would be dx.
    """
    if x is None:
        x = dx = shared.empty(dmeans, dmeans.shape[0], windows.num_tokens, dmeans.shape[2])
    else:
        dx = shared.empty(x, *x.shape)
    b, n, c = x.shape
    need_y, need_gate, need_modulation = need
    kernel = norm_kernels.norm_backward
    tile, config = _tile(kernel, x, 16, values=2048)
    splits = triton.cdiv(n, tile["ROWS"])
    columns = need_gate + 2 * need_modulation
    if columns:
        splits = min(splits, MOST_PARTS)
    dy = shared.empty(y, *y.shape) if need_y and gate is not None else shared.empty(x, 0)
    parts = shared.empty(x, *((b, splits, columns * c) if columns else (0,)), dtype=accumulator(x))
    given = (y, gate, scale, dtotal, dnormed, dmeans)
    y_or, gate_or, scale_or, *upstream = (x if t is None else t for t in given)
    start(
        kernel, b * splits,
        x, y_or, gate_or, scale_or, *upstream, dx, dy, parts,
        *strides_of(x, y_or, *upstream), _stride(gate), _stride(scale),
        splits, eps, *geometry(windows or WindowGrid((1, n), (1, 1))),
        NORM=dnormed is not None, MEANS=dmeans is not None, TOTAL=dtotal is not None,
        GATED=gate is not None, MODULATED=scale is not None,
        NEED_Y=need_y, NEED_GATE=need_gate, NEED_MODULATION=need_modulation,
        STAGES=config.stages, **tile, ALIGN=_alignment(x, *given), config=config,
    )  # fmt: skip
    if not columns:
        return dx, dy, parts
    sums = shared.empty(x, b, columns * c)
    sum_splits(parts, sums)
    return dx, dy, sums


def window_mean_backward(dmeans: Tensor, windows: WindowGrid) -> Tensor:
    """dx (B, N, C)."""
    return norm_backward(*(None,) * 6, dmeans, windows, 0.0, (False,) * 3)[0]


def total_dtype(x: Tensor, y: Tensor | None, gate: Tensor | None) -> torch.dtype:
    """That of x + gate · y, as torch promotes."""
    dtype = x.dtype
    for t in (y, gate):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


def _stride(vectors: Tensor | None) -> int:
    """Between the vectors (B, C) of two samples."""
    return 0 if vectors is None else vectors.stride(0)


def _alignment(*tensors: Tensor | None) -> int:
    return alignment(*(t for t in tensors if t is not None))


def _tile(kernel: Any, x: Tensor, tokens: int, values: int = 4096) -> tuple[dict[str, Any], Config]:
    """Rows of at most `values` channels together and, as a power of two, no more than `tokens`."""
    first, second = split_channels(x.shape[-1])
    config = config_of(kernel, x, channels=first + second)
    fitting = max(1, values // (first + second))
    rows = min(16, triton.next_power_of_2(tokens), 1 << fitting.bit_length() - 1)
    acc = triton.language.float64 if x.dtype == torch.float64 else triton.language.float32
    return dict(ROWS=rows, C=x.shape[-1], C0=first, C1=second, ACC=acc), config
