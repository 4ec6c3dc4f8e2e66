"""LayerNorm of tokens, with the residual before it and the modulation after it, in one pass.

    total = x + gate · y;  normed = LayerNorm(total) · (1 + scale) + shift

gate, shift and scale are vectors of a sample; the norm has no affine parameters of its own. Where
the window means of `total` are wanted too, `pool_forward` takes the place of `norm_forward`; the
backward of both is `norm_backward`. A program owns whole rows of channels. The gradients of the
vectors are sums over tokens: every program writes its part, `reduce.sum_splits` adds them up.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import WindowGrid
from . import host
from .configs import Config
from .host import Plan, planned
from .reduce import sum_parts
from .tile import (
    box_size,
    load_rows,
    num_tokens,
    store_rows,
    window_box,
    window_of,
    zeros,
)

VECTORS = ("gate_b", "shift_b", "scale_b")
RUNTIME = ("x_b", "x_n", "y_b", "y_n", *VECTORS, "tokens", "eps")
RUNTIME_BACKWARD = (
    *(f"{x}_{axis}" for x in ("x", "y", "dtotal", "dnormed", "dmeans") for axis in "bn"),
    *("gate_b", "scale_b", "splits", "eps", "f", "h", "w", "pf", "ph", "pw", "of", "oh", "ow"),
)


@triton.jit
def load_vector(
    x, batch, stride, WANTED: tl.constexpr,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A sample's vector as [1, C0], [1, C1]; zeros unless WANTED."""
    x0, x1 = zeros(1, C0, C1, ACC)
    if WANTED:
        row, one = batch + tl.zeros([1], tl.int64), tl.full([1], True, tl.int1)
        x0, x1 = load_rows(x, row, stride, one, C, C0, C1, ALIGN)
        x0, x1 = x0.to(ACC), x1.to(ACC)
    return x0, x1


@triton.jit
def add_residual(
    x0, x1, y, y_n, gate0, gate1, total, token, valid, ADD: tl.constexpr, GATED: tl.constexpr,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """With ADD, stores x + y or x + gate · y in `total` and returns it as it was rounded there."""
    if ADD:
        y0, y1 = load_rows(y, token, y_n, valid, C, C0, C1, ALIGN)
        y0, y1 = y0.to(ACC), y1.to(ACC)
        if GATED:
            y0, y1 = y0 * gate0, y1 * gate1
        x0, x1 = (x0 + y0).to(total.dtype.element_ty), (x1 + y1).to(total.dtype.element_ty)
        store_rows(total, token, C, valid, x0, x1, C, C0, C1, C & -C)
        x0, x1 = x0.to(ACC), x1.to(ACC)
    return x0, x1


@triton.jit
def _row_sums(x):
    """[R, 1], or a number where there is one row."""
    sums = tl.sum(x, 1)
    return tl.sum(sums, 0) if x.shape[0] == 1 else sums[:, None]


@triton.jit
def _three_sums(a, b, c):
    """`_row_sums` of three tiles, in one exchange between the threads of a row."""
    ac, bc = tl.split(tl.sum(tl.join(tl.join(a, c), tl.join(b, c)), 1))
    a, c = tl.split(ac)
    b, _c = tl.split(bc)
    if a.shape[0] == 1:
        return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0)
    else:
        return a[:, None], b[:, None], c[:, None]


@triton.jit
def _row_means(x0, x1, C: tl.constexpr, C1: tl.constexpr):
    """Means over channels, as `_row_sums`; there must be zeros past channel C.

    A number has no layout: of a tensor's, one of the two tiles would have to take the other's.
    """
    total = _row_sums(x0)
    if C1 > 0:
        total += _row_sums(x1)
    return total / C


@triton.jit
def _center(x, mean, START: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """x - mean, but 0 past channel C."""
    return tl.where((START + tl.arange(0, WIDTH) < C)[None, :], x - mean, 0.0)


@triton.jit
def _centered(x0, x1, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """[R, C0], [R, C1] less their mean over channels."""
    mean = _row_means(x0, x1, C, C1)
    x0 = _center(x0, mean, 0, C0, C)
    if C1 > 0:
        x1 = _center(x1, mean, C0, C1, C)
    return x0, x1


@triton.jit
def normalize(x0, x1, eps, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """LayerNorm of [R, C0], [R, C1]; 0 past channel C."""
    x0, x1 = _centered(x0, x1, C, C0, C1)
    factor = 1.0 / tl.sqrt(_row_means(x0 * x0, x1 * x1, C, C1) + eps)
    return x0 * factor, x1 * factor


@triton.jit(do_not_specialize=RUNTIME)
def norm_forward(
    x, y, gate, shift, scale, total, normed,
    x_b: tl.int64, x_n: tl.int64, y_b: tl.int64, y_n: tl.int64,
    gate_b: tl.int64, shift_b: tl.int64, scale_b: tl.int64, tokens, eps,
    ADD: tl.constexpr, GATED: tl.constexpr, MODULATED: tl.constexpr, ROWS: tl.constexpr,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """total, with ADD, and normed: (B, N, C), contiguous."""
    blocks = tl.cdiv(tokens, ROWS)
    token = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    valid = token < tokens
    own = batch * tokens * C
    x += tl.multiple_of(batch * x_b, ALIGN)
    y += tl.multiple_of(batch * y_b, ALIGN)
    gate0, gate1 = load_vector(gate, batch, gate_b, GATED, C, C0, C1, ALIGN, ACC)
    x0, x1 = load_rows(x, token, x_n, valid, C, C0, C1, ALIGN)
    x0, x1 = add_residual(
        x0.to(ACC), x1.to(ACC), y, y_n, gate0, gate1, total + own, token, valid, ADD, GATED,
        C, C0, C1, ALIGN, ACC,
    )  # fmt: skip
    x0, x1 = normalize(x0, x1, eps, C, C0, C1)
    if MODULATED:
        shift0, shift1 = load_vector(shift, batch, shift_b, True, C, C0, C1, ALIGN, ACC)
        scale0, scale1 = load_vector(scale, batch, scale_b, True, C, C0, C1, ALIGN, ACC)
        x0, x1 = x0 * (1.0 + scale0) + shift0, x1 * (1.0 + scale1) + shift1
    store_rows(normed + own, token, C, valid, x0, x1, C, C0, C1, C & -C)


@triton.jit
def _store_sums(
    sums, row, column, x0, x1, COLUMNS: tl.constexpr,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
):  # fmt: skip
    """Write the column'th of COLUMNS vectors [1, C0], [1, C1] of a program."""
    row, one = row + tl.zeros([1], tl.int64), tl.full([1], True, tl.int1)
    store_rows(sums + column * C, row, COLUMNS * C, one, x0, x1, C, C0, C1, C & -C)


@triton.jit(do_not_specialize=RUNTIME_BACKWARD)
def norm_backward(
    x, y, gate, scale, dtotal, dnormed, dmeans, dx, dy, sums,
    x_b: tl.int64, x_n: tl.int64, y_b: tl.int64, y_n: tl.int64,
    dtotal_b: tl.int64, dtotal_n: tl.int64, dnormed_b: tl.int64, dnormed_n: tl.int64,
    dmeans_b: tl.int64, dmeans_n: tl.int64, gate_b: tl.int64, scale_b: tl.int64,
    splits, eps, f, h, w, pf, ph, pw, of, oh, ow,
    NORM: tl.constexpr, MEANS: tl.constexpr, TOTAL: tl.constexpr, GATED: tl.constexpr,
    MODULATED: tl.constexpr, NEED_Y: tl.constexpr, NEED_GATE: tl.constexpr,
    NEED_MODULATION: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx and, for a gated y, dy (B, N, C); sums (B, splits, (1 +) 2, C), the parts of the gradients
    of gate, shift and scale that are needed.

    x is what was normed, with the residual. With n = LayerNorm(x) and g = dnormed · (1 + scale):

        dx = (g - mean(g) - n · mean(g ∘ n)) / deviation + dtotal + dmeans / window's size
        dy = gate · dx;  dgate = Σ dx ∘ y;  dshift = Σ dnormed;  dscale = Σ dnormed ∘ n
    """
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    tokens = num_tokens(geometry)
    split = tl.program_id(0) % splits
    batch = (tl.program_id(0) // splits).to(tl.int64)
    OUT: tl.constexpr = C & -C
    COLUMNS: tl.constexpr = (1 if NEED_GATE else 0) + (2 if NEED_MODULATION else 0)
    own = batch * tokens * C
    x += tl.multiple_of(batch * x_b, ALIGN)
    y += tl.multiple_of(batch * y_b, ALIGN)
    dtotal += tl.multiple_of(batch * dtotal_b, ALIGN)
    dnormed += tl.multiple_of(batch * dnormed_b, ALIGN)
    dmeans += tl.multiple_of(batch * dmeans_b, ALIGN)
    gate0, gate1 = load_vector(gate, batch, gate_b, GATED, C, C0, C1, ALIGN, ACC)
    scale0, scale1 = load_vector(scale, batch, scale_b, MODULATED, C, C0, C1, ALIGN, ACC)
    dgate0, dgate1 = zeros(1, C0, C1, ACC)
    dshift0, dshift1 = zeros(1, C0, C1, ACC)
    dscale0, dscale1 = zeros(1, C0, C1, ACC)
    share = tl.cdiv(tl.cdiv(tokens, ROWS), splits) * ROWS
    last = tl.minimum((split + 1) * share, tokens)
    for start in tl.range(split * share, last, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        valid = token < last
        dx0, dx1 = zeros(ROWS, C0, C1, ACC)
        if NORM:
            x0, x1 = load_rows(x, token, x_n, valid, C, C0, C1, ALIGN)
            d0, d1 = load_rows(dnormed, token, dnormed_n, valid, C, C0, C1, ALIGN)
            d0, d1 = d0.to(ACC), d1.to(ACC)
            g0, g1 = d0 * (1.0 + scale0), d1 * (1.0 + scale1)
            # Threads wait for each other twice for a row: for its mean, and for these three sums.
            x0, x1 = _centered(x0.to(ACC), x1.to(ACC), C, C0, C1)
            squares, mean, along = _three_sums(x0 * x0, g0, g0 * x0)
            if C1 > 0:
                squares1, mean1, along1 = _three_sums(x1 * x1, g1, g1 * x1)
                squares, mean, along = squares + squares1, mean + mean1, along + along1
            factor = 1.0 / tl.sqrt(squares / C + eps)
            x0, x1 = x0 * factor, x1 * factor
            mean, along = mean / C, along * factor / C
            if NEED_MODULATION:
                dshift0 += tl.sum(d0, 0)[None, :]
                dscale0 += tl.sum(d0 * x0, 0)[None, :]
                if C1 > 0:
                    dshift1 += tl.sum(d1, 0)[None, :]
                    dscale1 += tl.sum(d1 * x1, 0)[None, :]
            dx0 = (g0 - mean - x0 * along) * factor
            dx1 = (g1 - mean - x1 * along) * factor
        if TOTAL:
            t0, t1 = load_rows(dtotal, token, dtotal_n, valid, C, C0, C1, ALIGN)
            dx0, dx1 = dx0 + t0.to(ACC), dx1 + t1.to(ACC)
        if MEANS:
            window = window_of(token, geometry)
            # Past the last token a window may have no size, and 0 / 0 would reach the sums.
            size = tl.maximum(box_size(window_box(window, geometry)), 1).to(ACC)[:, None]
            m0, m1 = load_rows(dmeans, window, dmeans_n, valid, C, C0, C1, ALIGN)
            dx0, dx1 = dx0 + m0.to(ACC) / size, dx1 + m1.to(ACC) / size
        store_rows(dx + own, token, C, valid, dx0, dx1, C, C0, C1, OUT)
        if NEED_GATE:
            y0, y1 = load_rows(y, token, y_n, valid, C, C0, C1, ALIGN)
            dgate0 += tl.sum(dx0 * y0.to(ACC), 0)[None, :]
            if C1 > 0:
                dgate1 += tl.sum(dx1 * y1.to(ACC), 0)[None, :]
        if GATED and NEED_Y:
            store_rows(dy + own, token, C, valid, dx0 * gate0, dx1 * gate1, C, C0, C1, OUT)
    row = batch * splits + split
    if NEED_GATE:
        _store_sums(sums, row, 0, dgate0, dgate1, COLUMNS, C, C0, C1)
    if NEED_MODULATION:
        _store_sums(sums, row, COLUMNS - 2, dshift0, dshift1, COLUMNS, C, C0, C1)
        _store_sums(sums, row, COLUMNS - 1, dscale0, dscale1, COLUMNS, C, C0, C1)


# Programs that share a sample's tokens for the gradients of its vectors, at most: enough to fill a
# GPU, few enough that their parts cost little. Depends on neither batch nor device.
MOST_PARTS = 1024


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """total = x + gate · y, None without y, and its modulated LayerNorm in `dtype`."""
    x, y, gate, shift, scale = host.rows(x, y, gate, shift, scale)
    total = None if y is None else host.empty(x, *x.shape, dtype=total_dtype(x, y, gate))
    normed = host.empty(x, *x.shape, dtype=dtype)
    plan = _forward_plan(*host.facts(x, y, gate, shift, scale), dtype, eps, host.target(x))
    given = [x if t is None else t for t in (y, gate, shift, scale)]
    plan.start(x, *given, normed if total is None else total, normed)
    return total, normed


def backward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    dtotal: Tensor | None, dnormed: Tensor | None, dmeans: Tensor | None,
    windows: WindowGrid | None, eps: float, need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dy and the gradients of gate, shift and scale, one after the other (B, ·C).

    x is what was normed. `need` says whether y, gate, and shift and scale need gradients: those
    that do not are left out. dy is None where it would be dx.
    """
    x, *given = host.rows(x, y, gate, scale, dtotal, dnormed, dmeans)
    dx = host.empty(x, *x.shape)
    plan, shape = _backward_plan(*host.facts(x, *given), windows, eps, need, host.target(x))
    dy = host.empty(y, *y.shape) if need[0] and y is not None and gate is not None else None
    parts = host.empty(x, *shape, dtype=host.accumulator(x.dtype)) if shape else None
    written = [dx if t is None else t for t in (dy, parts)]
    plan.start(x, *[x if t is None else t for t in given], dx, *written)
    if parts is None:
        return dx, dy, None
    return dx, dy, sum_parts(parts, host.empty(x, shape[0], shape[2]))


def means_backward(dmeans: Tensor, windows: WindowGrid) -> Tensor:
    """dx (B, N, C) of window means alone."""
    (dmeans,) = host.rows(dmeans)
    dx = host.empty(dmeans, dmeans.shape[0], windows.num_tokens, dmeans.shape[2])
    upstream, need = (None, None, dmeans), (False,) * 3
    plan, _ = _backward_plan(
        *host.facts(dx, None, None, None, *upstream), windows, 0.0, need, host.target(dx)
    )
    plan.start(*(dx,) * 6, dmeans, *(dx,) * 3)
    return dx


def total_dtype(x: Tensor, y: Tensor | None, gate: Tensor | None) -> torch.dtype:
    """That of x + gate · y, as torch promotes."""
    dtype = x.dtype
    for t in (y, gate):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


@planned
def _forward_plan(
    x: Any, y: Any, gate: Any, shift: Any, scale: Any, dtype: torch.dtype, eps: float,
    target: tuple[str, str],
) -> Plan:  # fmt: skip
    b, n, _ = x[0]
    config, tile = tile_of("norm_forward", x, 16, target)
    numbers = (*host.strides_of(x, y or x), *map(stride_of, (gate, shift, scale)), n, eps)
    flags = dict(ADD=y is not None, GATED=gate is not None, MODULATED=scale is not None)
    constants = flags | tile | dict(ALIGN=host.alignment(x, y, gate, shift, scale))
    programs = b * host.cdiv(n, tile["ROWS"])
    return Plan(norm_forward, programs, *numbers, config=config, **constants)


@planned
def _backward_plan(
    x: Any, y: Any, gate: Any, scale: Any, dtotal: Any, dnormed: Any, dmeans: Any,
    windows: WindowGrid | None, eps: float, need: tuple[bool, bool, bool], target: tuple[str, str],
) -> tuple[Plan, tuple[int, ...]]:  # fmt: skip
    """And the shape of the parts of the vectors' gradients, if any is needed."""
    b, n, c = x[0]
    need_y, need_gate, need_modulation = need
    means = dmeans is not None
    config, tile = tile_of("norm_backward", x, 16, target, values=1024, means=means)
    splits, columns = host.cdiv(n, tile["ROWS"]), need_gate + 2 * need_modulation
    if columns:
        splits = min(splits, MOST_PARTS)
    strides = host.strides_of(x, y or x, dtotal or x, dnormed or x, dmeans or x)
    geometry = host.geometry(windows or WindowGrid((1, n), (1, 1)))
    numbers = (*strides, stride_of(gate), stride_of(scale), splits, eps, *geometry)
    constants = dict(
        NORM=dnormed is not None, MEANS=means, TOTAL=dtotal is not None,
        GATED=gate is not None, MODULATED=scale is not None,
        NEED_Y=need_y, NEED_GATE=need_gate, NEED_MODULATION=need_modulation,
        STAGES=config.stages, **tile,
        ALIGN=host.alignment(x, y, gate, scale, dtotal, dnormed, dmeans),
    )  # fmt: skip
    plan = Plan(norm_backward, b * splits, *numbers, config=config, **constants)
    return plan, (b, splits, columns * c) if columns else ()


def stride_of(vectors: Any) -> int:
    """Between the vectors (B, C) of two samples."""
    return 0 if vectors is None else vectors[1][0]


def tile_of(
    kernel: str, x: Any, tokens: int, target: tuple[str, str], values: int = 4096, **sizes: int
) -> tuple[Config, dict[str, Any]]:
    """The configuration, and the constants of a tile: rows of at most `values` channels together
    and, as a power of two, no more than `tokens`. `sizes` as `configs` has them."""
    channels, dtype = x[0][-1], x[2]
    first, second = host.split_channels(channels)
    config = host.config_of(kernel, target[0], dtype, channels=first + second, **sizes)
    fitting = max(1, values // (first + second))
    rows = min(16, host.next_power_of_2(tokens), 1 << fitting.bit_length() - 1)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    return config, dict(ROWS=rows, C=channels, C0=first, C1=second, ACC=acc)
