"""Window means, alone or with the residual before them and the LayerNorm of the same tokens.

A program reads its share of one window's tokens, whole rows; where the shares are several,
`reduce.sum_splits` adds them up in a fixed order. The backward is `norm.norm_backward`.
"""

import triton
import triton.language as tl

from .norm import add_residual, load_vector, normalize
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
            x0, x1, _ = normalize(x0, x1, eps, C, C0, C1, ACC)
            store_rows(normed + own, token, C, valid, x0, x1, C, C0, C1, OUT)
    row = (batch * windows + window) * splits + split + tl.zeros([1], tl.int32)
    one = tl.full([1], True, tl.int1)
    store_rows(means, row, C, one, sum0 / size, sum1 / size, C, C0, C1, OUT)
