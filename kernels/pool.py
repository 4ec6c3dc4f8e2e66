"""Window means, alone or with the LayerNorm of the same tokens: one read for both.

A program reads its share of one window's tokens, whole rows; where the shares are several,
`reduce.sum_splits` adds them up in a fixed order. The backward broadcasts: a program owns some
tokens and reads the gradients of their windows' means. LayerNorm has no affine parameters.
"""

import triton
import triton.language as tl

from .tile import (
    box_size,
    load_rows,
    num_tokens,
    num_windows,
    row_dots,
    store_rows,
    token_in_box,
    window_box,
    window_of,
)

RUNTIME = ("x_b", "x_n", "splits", "eps", "f", "h", "w", "pf", "ph", "pw", "of", "oh", "ow")
RUNTIME_BACKWARD = (*RUNTIME, "g_b", "g_n", "m_b", "m_n")


@triton.jit
def _center(x, mean, START: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """x - mean, but 0 past channel C."""
    return tl.where((START + tl.arange(0, WIDTH) < C)[None, :], x - mean[:, None], 0.0)


@triton.jit
def _normalize(x0, x1, eps, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, ACC: tl.constexpr):
    """LayerNorm of [R, C0], [R, C1], and the factor 1 / deviation [R]; 0 past channel C."""
    mean = tl.sum(x0, 1)
    if C1 > 0:
        mean += tl.sum(x1, 1)
    mean = mean / C
    x0 = _center(x0, mean, 0, C0, C)
    if C1 > 0:
        x1 = _center(x1, mean, C0, C1, C)
    factor = 1.0 / tl.sqrt(row_dots(x0, x1, x0, x1, C1, ACC) / C + eps)
    x0 = x0 * factor[:, None]
    if C1 > 0:
        x1 = x1 * factor[:, None]
    return x0, x1, factor


@triton.jit(do_not_specialize=RUNTIME)
def pool_forward(
    x, means, normed,
    x_b: tl.int64, x_n: tl.int64, splits, eps, f, h, w, pf, ph, pw, of, oh, ow,
    NORM: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """means (B, M, splits, C), to be summed over splits; normed (B, N, C); both contiguous."""
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    windows = num_windows(geometry)
    split = tl.program_id(0) % splits
    window = tl.program_id(0) // splits % windows
    batch = (tl.program_id(0) // splits // windows).to(tl.int64)
    OUT: tl.constexpr = C & -C
    box = window_box(window, geometry)
    size = box_size(box)
    x += tl.multiple_of(batch * x_b, ALIGN)
    normed += batch * num_tokens(geometry) * C
    share = tl.cdiv(tl.cdiv(size, ROWS), splits) * ROWS
    last = tl.minimum((split + 1) * share, size)
    sum0, sum1 = tl.zeros([C0], ACC), tl.zeros([C1 if C1 > 0 else C0], ACC)
    for start in tl.range(split * share, last, ROWS, num_stages=STAGES):
        slot = start + tl.arange(0, ROWS)
        valid = slot < last
        token = token_in_box(slot, box, geometry)
        x0, x1 = load_rows(x, token, x_n, valid, C, C0, C1, ALIGN)
        x0, x1 = x0.to(ACC), x1.to(ACC)
        sum0 += tl.sum(x0, 0)
        if C1 > 0:
            sum1 += tl.sum(x1, 0)
        if NORM:
            y0, y1, _ = _normalize(x0, x1, eps, C, C0, C1, ACC)
            store_rows(normed, token, C, valid, y0, y1, C, C0, C1, OUT)
    row = (batch * windows + window) * splits + split + tl.zeros([1], tl.int32)
    one = tl.full([1], True, tl.int1)
    mean0, mean1 = sum0[None, :] / size, sum1[None, :] / size
    store_rows(means, row, C, one, mean0, mean1, C, C0, C1, OUT)


@triton.jit(do_not_specialize=RUNTIME_BACKWARD)
def pool_backward(
    x, g, m, dx,
    x_b: tl.int64, x_n: tl.int64, g_b: tl.int64, g_n: tl.int64, m_b: tl.int64, m_n: tl.int64,
    eps, f, h, w, pf, ph, pw, of, oh, ow,
    NORM: tl.constexpr, ROWS: tl.constexpr,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx (B, N, C), contiguous, of the gradients m of the means and, with NORM, g of the LayerNorm.

    With y the normed tokens: dx = (g - mean(g) - y · mean(g ∘ y)) / deviation + m / window's size.
    """
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    tokens = num_tokens(geometry)
    blocks = tl.cdiv(tokens, ROWS)
    token = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    valid = token < tokens
    OUT: tl.constexpr = C & -C
    window = window_of(token, geometry)
    m0, m1 = load_rows(m + tl.multiple_of(batch * m_b, ALIGN), window, m_n, valid, C, C0, C1, ALIGN)
    size = box_size(window_box(window, geometry)).to(ACC)[:, None]
    dx0, dx1 = m0.to(ACC) / size, m1.to(ACC) / size
    if NORM:
        x += tl.multiple_of(batch * x_b, ALIGN)
        g += tl.multiple_of(batch * g_b, ALIGN)
        x0, x1 = load_rows(x, token, x_n, valid, C, C0, C1, ALIGN)
        y0, y1, factor = _normalize(x0.to(ACC), x1.to(ACC), eps, C, C0, C1, ACC)
        g0, g1 = load_rows(g, token, g_n, valid, C, C0, C1, ALIGN)
        g0, g1 = g0.to(ACC), g1.to(ACC)
        mean = tl.sum(g0, 1)
        if C1 > 0:
            mean += tl.sum(g1, 1)
        mean = (mean / C)[:, None]
        along = (row_dots(g0, g1, y0, y1, C1, ACC) / C)[:, None]
        dx0 += (g0 - mean - y0 * along) * factor[:, None]
        dx1 += (g1 - mean - y1 * along) * factor[:, None]
    store_rows(dx + batch * tokens * C, token, C, valid, dx0, dx1, C, C0, C1, OUT)
