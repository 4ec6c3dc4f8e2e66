"""Jit helpers that all kernels share: tiles split in two, window coordinates, softmax, products.

A row of D channels is held as two tiles of D0 and D1 channels, both powers of two, as a Triton tile
must be: 72 = 64 + 8 of 16, where one tile of 128 would move and multiply 1.6 times as much and
spill. Where one power of two is as good, D1 is 0, and the second tile is the first again, unused.
Products of split tiles go to two accumulators that are added afterwards: one accumulator fed twice
in a loop is miscompiled for sm_100 by Triton 3.6.

Prefixes: `x0, x1` the two tiles of x, `n_` a count, `UPPER` a compile-time constant. Every offset
is int64: packed projections of long videos hold more than 2**31 elements.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_offset(batch, head, stride_b, stride_h, ALIGN: tl.constexpr):
    """Offset of one sample's head. ALIGN divides every stride; untold of it, loads are narrow."""
    offset = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return tl.multiple_of(offset, ALIGN)


@triton.jit
def row_offset(row, stride, ALIGN: tl.constexpr):
    """Offset of one row; as `head_offset`."""
    return tl.multiple_of(row * stride.to(tl.int64), ALIGN)


@triton.jit
def _pointers(x, row, stride, START: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    offset = tl.multiple_of(row.to(tl.int64) * stride, ALIGN)
    return x + offset[:, None] + (START + tl.arange(0, WIDTH))[None, :]


@triton.jit
def _mask(valid, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """[R] -> [R, 1], or [R, WIDTH] where a tile that starts at channel START passes channel D."""
    mask = valid[:, None]
    if START + WIDTH > D:
        mask = mask & (START + tl.arange(0, WIDTH) < D)[None, :]
    return mask


@triton.jit
def load_rows(
    x, row, stride, valid,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows number `row` [R] -> [R, D0], [R, D1]; zero where not `valid` [R] and past channel D."""
    x0 = tl.load(_pointers(x, row, stride, 0, D0, ALIGN), mask=_mask(valid, 0, D0, D), other=0.0)
    x1 = x0
    if D1 > 0:
        mask = _mask(valid, D0, D1, D)
        x1 = tl.load(_pointers(x, row, stride, D0, D1, ALIGN), mask=mask, other=0.0)
    return x0, x1


@triton.jit
def store_rows(
    x, row, stride, valid, x0, x1,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The counterpart of `load_rows`, rounding to the type of x."""
    x0 = x0.to(x.dtype.element_ty)
    tl.store(_pointers(x, row, stride, 0, D0, ALIGN), x0, mask=_mask(valid, 0, D0, D))
    if D1 > 0:
        x1 = x1.to(x.dtype.element_ty)
        mask = _mask(valid, D0, D1, D)
        tl.store(_pointers(x, row, stride, D0, D1, ALIGN), x1, mask=mask)


@triton.jit
def outer(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ: [R, D] x [S, D] -> [R, S]."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        s += tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    return s


@triton.jit
def product(p, x0, x1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """p x: [R, S] x [S, D] -> [R, D0], [R, D1]; p is rounded to the type of x, as eager does."""
    p = p.to(x0.dtype)
    y0 = tl.dot(p, x0, input_precision=PRECISION)
    y1 = y0
    if D1 > 0:
        y1 = tl.dot(p, x1, input_precision=PRECISION)
    return y0, y1


@triton.jit
def accumulate(p, x0, x1, y0, y1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """y + p x."""
    x0, x1 = product(p, x0, x1, D1, PRECISION)
    y0 += x0
    if D1 > 0:
        y1 += x1
    return y0, y1


@triton.jit
def zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ACC: tl.constexpr):
    """[R, D0], [R, D1] to accumulate in."""
    x0 = tl.zeros([ROWS, D0], ACC)
    x1 = x0
    if D1 > 0:
        x1 = tl.zeros([ROWS, D1], ACC)
    return x0, x1


@triton.jit
def row_dots(a0, a1, b0, b1, D1: tl.constexpr, ACC: tl.constexpr):
    """Sum over channels of a · b: [R, D] x [R, D] -> [R]."""
    s = tl.sum(a0.to(ACC) * b0.to(ACC), 1)
    if D1 > 0:
        s += tl.sum(a1.to(ACC) * b1.to(ACC), 1)
    return s


@triton.jit
def softmax(s, present):
    """Softmax of [queries, keys] in base 2 over the keys that are `present`, all of them at once.

    Returns the weights, not yet divided, and their sum: zeros and 1 where there is no key.
    """
    s = tl.where(present, s, float("-inf"))
    p = tl.where(present, tl.exp2(s - tl.max(s, 1)[:, None]), 0.0)
    total = tl.sum(p, 1)
    return p, tl.where(total == 0, 1.0, total)


@triton.jit
def softmax_gradient(p, dp):
    """Gradient of the scores from that of the weights, all keys at once."""
    return p * (dp - tl.sum(p * dp, 1)[:, None])


@triton.jit
def windows_on(length, size, offset):
    """Windows on one axis of `length`, as WindowGrid.counts; offset is -shift mod size."""
    return (length - 1 + offset) // size + 1


@triton.jit
def num_windows(geometry):
    """Windows of a grid; `geometry` is f, h, w, the window's three sizes, and three offsets."""
    f, h, w, pf, ph, pw, of, oh, ow = geometry
    return windows_on(f, pf, of) * windows_on(h, ph, oh) * windows_on(w, pw, ow)


@triton.jit
def num_tokens(geometry):
    return geometry[0] * geometry[1] * geometry[2]


@triton.jit
def window_box(window, geometry):
    """Where windows, a scalar or [R], lie: the first token's f, h, w, and the extent on each axis.

    The twin of WindowGrid: on an axis, window i holds [i·p - o, (i + 1)·p - o) within [0, length).
    """
    f, h, w, pf, ph, pw, of, oh, ow = geometry
    nh, nw = windows_on(h, ph, oh), windows_on(w, pw, ow)
    start_f = window // (nh * nw) * pf - of
    start_h = window // nw % nh * ph - oh
    start_w = window % nw * pw - ow
    f0, h0, w0 = tl.maximum(start_f, 0), tl.maximum(start_h, 0), tl.maximum(start_w, 0)
    frames = tl.minimum(start_f + pf, f) - f0
    rows = tl.minimum(start_h + ph, h) - h0
    columns = tl.minimum(start_w + pw, w) - w0
    return f0, h0, w0, frames, rows, columns


@triton.jit
def box_size(box):
    """Tokens in a box; none or fewer past the last window."""
    return box[3] * box[4] * box[5]


@triton.jit
def quotient(x, y):
    """x // y for 0 <= x < 2**20 and y >= 1, in 4 instructions instead of about 20.

    Exact: (x + 1/2) / y is at least 1 / 2y from an integer, and float32 errs by less.
    """
    return ((x + 0.5) * (1.0 / y)).to(tl.int32)


@triton.jit
def token_in_box(slot, box, geometry):
    """Token, in raster order of the grid, of the slot'th token of a box, in raster order of it."""
    f0, h0, w0, _frames, rows, columns = box
    line = quotient(slot, columns)
    frame = quotient(line, rows)
    row, column = line - frame * rows, slot - line * columns
    return ((f0 + frame) * geometry[1] + h0 + row) * geometry[2] + w0 + column


@triton.jit
def window_of(token, geometry):
    """The window that holds each token, as WindowGrid.window_ids."""
    _f, h, w, pf, ph, pw, of, oh, ow = geometry
    line = token // w
    frame = line // h
    row, column = line - frame * h, token - line * w
    nh, nw = windows_on(h, ph, oh), windows_on(w, pw, ow)
    return ((frame + of) // pf * nh + (row + oh) // ph) * nw + (column + ow) // pw
