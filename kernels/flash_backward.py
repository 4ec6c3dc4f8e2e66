"""The backward of `flash`: a kernel for the gradient of the queries, one for keys and values."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..geometry import WindowGrid
from . import host
from .blocks import cut, place, rows_of
from .flash import RUNTIME, num_sequences, sizes_of
from .host import Gradients, Places, Plan, planned
from .reduce import Parts, part_strides, splits_of
from .tile import (
    LOG2E,
    accumulate,
    head_offset,
    load_rows,
    outer,
    row_dots,
    row_offset,
    store_rows,
    zeros,
)

RUNTIME_BACKWARD = (*RUNTIME, "g_b", "g_n", "g_h", "d_b", "d_n", "splits")


@triton.jit
def _add_dq(
    block, shape, keys, box, geometry, q0, q1, g0, g1, k, v, k_n, v_n, mask, lse, delta, dq0, dq1,
    scale,
    REST: tl.constexpr, WINDOWED: tl.constexpr, STACKED: tl.constexpr, MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key, first, present = rows_of(
        block, shape, keys, box, geometry, mask, REST, WINDOWED, STACKED, MASKED, KEYS
    )
    k0, k1 = load_rows(k + row_offset(first, k_n, ALIGN), key, k_n, present, D, D0, D1, ALIGN)
    v0, v1 = load_rows(v + row_offset(first, v_n, ALIGN), key, v_n, present, D, D0, D1, ALIGN)
    p = tl.exp2(outer(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E) - lse[:, None])
    if REST:
        p = tl.where(present[None, :], p, 0.0)
    ds = p * (outer(g0, g1, v0, v1, D1, PRECISION) - delta[:, None])
    return accumulate(ds, k0, k1, dq0, dq1, D1, PRECISION)


@triton.jit(do_not_specialize=RUNTIME_BACKWARD)
def flash_backward_q(
    q, k, v, mask, out, g, lse, delta, dq,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64,
    k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_n: tl.int64, v_h: tl.int64,
    g_b: tl.int64, g_n: tl.int64, g_h: tl.int64,
    d_b: tl.int64, d_n,
    queries, keys, heads, blocks, scale, f, h, w, pf, ph, pw, of, oh, ow,
    NEED_Q: tl.constexpr,
    ALIKE: tl.constexpr, WINDOWED: tl.constexpr, STACKED: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out ∘ g) (B, H, N), which `flash_backward_kv` reads, and the gradient of q
    (B, N, H, D), of the strides d_b and d_n, with the heads of a token one after the other.

    With P the weights: dP = g Vᵀ;  dS = P ∘ (dP - delta);  dQ = scale · dS K.
    """
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    if ALIKE:
        v_b, v_n, v_h = k_b, k_n, k_h
    batch, head, block, box = place(blocks, heads, geometry, WINDOWED)
    shape, count, _whole = cut(queries, box, ROWS, WINDOWED)
    if block >= count:
        return
    OUT: tl.constexpr = D & -D
    ACC: tl.constexpr = lse.dtype.element_ty
    row, first, valid = rows_of(
        block, shape, queries, box, geometry, mask, True, WINDOWED, STACKED, False, ROWS
    )
    row += first
    q += head_offset(batch, head, q_b, q_h, ALIGN)
    k += head_offset(batch, head, k_b, k_h, ALIGN)
    v += head_offset(batch, head, v_b, v_h, ALIGN)
    g += head_offset(batch, head, g_b, g_h, ALIGN)
    mask += batch.to(tl.int64) * keys
    own = head_offset(batch, head, queries * heads.to(tl.int64) * D, D, OUT)
    sums = (batch.to(tl.int64) * heads + head) * queries
    g0, g1 = load_rows(g, row, g_n, valid, D, D0, D1, ALIGN)
    o0, o1 = load_rows(out + own, row, heads * D, valid, D, D0, D1, OUT)
    delta_row = row_dots(g0, g1, o0, o1, D1, ACC)
    tl.store(delta + sums + row, delta_row, mask=valid)
    if NEED_Q:
        q0, q1 = load_rows(q, row, q_n, valid, D, D0, D1, ALIGN)
        lse_row = tl.load(lse + sums + row, mask=valid, other=float("inf"))
        dq0, dq1 = zeros(ROWS, D0, D1, ACC)
        shape, count, whole = cut(keys, box, KEYS, WINDOWED)
        whole = 0 if MASKED else whole
        for block in range(0, whole):
            dq0, dq1 = _add_dq(
                block, shape, keys, box, geometry, q0, q1, g0, g1, k, v, k_n, v_n, mask,
                lse_row, delta_row, dq0, dq1, scale,
                False, WINDOWED, STACKED, MASKED, KEYS, D, D0, D1, ALIGN, PRECISION,
            )  # fmt: skip
        for block in range(whole, count):
            dq0, dq1 = _add_dq(
                block, shape, keys, box, geometry, q0, q1, g0, g1, k, v, k_n, v_n, mask,
                lse_row, delta_row, dq0, dq1, scale,
                True, WINDOWED, STACKED, MASKED, KEYS, D, D0, D1, ALIGN, PRECISION,
            )  # fmt: skip
        dq += head_offset(batch, head, d_b, D, OUT)
        store_rows(dq, row, d_n, valid, dq0 * scale, dq1 * scale, D, D0, D1, OUT)


@triton.jit
def _add_dkv(
    block, shape, queries, box, geometry, k0, k1, v0, v1, q, g, q_n, g_n, lse, delta,
    dk0, dk1, dv0, dv1, scale,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    REST: tl.constexpr, WINDOWED: tl.constexpr, STACKED: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries. Scores are transposed here, [keys, queries], so that the
    weights enter the next product as they are."""
    row, first, valid = rows_of(
        block, shape, queries, box, geometry, q, REST, WINDOWED, STACKED, False, ROWS
    )
    q0, q1 = load_rows(q + row_offset(first, q_n, ALIGN), row, q_n, valid, D, D0, D1, ALIGN)
    g0, g1 = load_rows(g + row_offset(first, g_n, ALIGN), row, g_n, valid, D, D0, D1, ALIGN)
    lse_row = tl.load(lse + first + row, mask=valid, other=float("inf"))
    p = tl.exp2(outer(k0, k1, q0, q1, D1, PRECISION) * (scale * LOG2E) - lse_row[None, :])
    if NEED_V:
        dv0, dv1 = accumulate(p, g0, g1, dv0, dv1, D1, PRECISION)
    if NEED_K:
        delta_row = tl.load(delta + first + row, mask=valid, other=0.0)
        ds = p * (outer(v0, v1, g0, g1, D1, PRECISION) - delta_row[None, :])
        dk0, dk1 = accumulate(ds, q0, q1, dk0, dk1, D1, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=RUNTIME_BACKWARD)
def flash_backward_kv(
    q, k, v, mask, g, lse, delta, dk, dv,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64,
    k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_n: tl.int64, v_h: tl.int64,
    g_b: tl.int64, g_n: tl.int64, g_h: tl.int64,
    d_b: tl.int64, d_n,
    queries, keys, heads, blocks, splits, scale, f, h, w, pf, ph, pw, of, oh, ow,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    ALIKE: tl.constexpr, WINDOWED: tl.constexpr, STACKED: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v, (B, splits, M, H, D): each split sums over a share of the queries.
    Parts are d_b apart and rows d_n, with the heads of a token one after the other.

    With P the weights: dV = Pᵀ g;  dS = P ∘ (g Vᵀ - delta);  dK = scale · dSᵀ Q.
    """
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    if ALIKE:
        v_b, v_n, v_h = k_b, k_n, k_h
    batch, head, block, box = place(blocks * splits, heads, geometry, WINDOWED)
    split, block = block // blocks, block % blocks
    shape, count, _whole = cut(keys, box, KEYS, WINDOWED)
    if block >= count:
        return
    OUT: tl.constexpr = D & -D
    ACC: tl.constexpr = lse.dtype.element_ty
    key, first, exists = rows_of(
        block, shape, keys, box, geometry, mask, True, WINDOWED, STACKED, False, KEYS
    )
    key += first
    present = exists
    if MASKED:
        mask += batch.to(tl.int64) * keys
        present = exists & (tl.load(mask + key, mask=exists, other=0) != 0)
    q += head_offset(batch, head, q_b, q_h, ALIGN)
    k += head_offset(batch, head, k_b, k_h, ALIGN)
    v += head_offset(batch, head, v_b, v_h, ALIGN)
    g += head_offset(batch, head, g_b, g_h, ALIGN)
    lse += (batch.to(tl.int64) * heads + head) * queries
    delta += (batch.to(tl.int64) * heads + head) * queries
    k0, k1 = load_rows(k, key, k_n, present, D, D0, D1, ALIGN)
    v0, v1 = load_rows(v, key, v_n, present, D, D0, D1, ALIGN)
    dk0, dk1 = zeros(KEYS, D0, D1, ACC)
    dv0, dv1 = zeros(KEYS, D0, D1, ACC)
    shape, count, whole = cut(queries, box, ROWS, WINDOWED)
    share = tl.cdiv(count, splits)
    first, last = split * share, tl.minimum((split + 1) * share, count)
    for block in range(first, tl.minimum(whole, last)):
        dk0, dk1, dv0, dv1 = _add_dkv(
            block, shape, queries, box, geometry, k0, k1, v0, v1, q, g, q_n, g_n, lse, delta,
            dk0, dk1, dv0, dv1, scale, NEED_K, NEED_V,
            False, WINDOWED, STACKED, ROWS, D, D0, D1, ALIGN, PRECISION,
        )  # fmt: skip
    for block in range(tl.maximum(whole, first), last):
        dk0, dk1, dv0, dv1 = _add_dkv(
            block, shape, queries, box, geometry, k0, k1, v0, v1, q, g, q_n, g_n, lse, delta,
            dk0, dk1, dv0, dv1, scale, NEED_K, NEED_V,
            True, WINDOWED, STACKED, ROWS, D, D0, D1, ALIGN, PRECISION,
        )  # fmt: skip
    # A key that takes no part was read as zero, and exp2(0 - lse) is any number.
    takes_part = present[:, None]
    own = head_offset(batch * splits + split, head, d_b, D, OUT)
    if NEED_K:
        x0, x1 = tl.where(takes_part, dk0 * scale, 0.0), tl.where(takes_part, dk1 * scale, 0.0)
        store_rows(dk + own, key, d_n, exists, x0, x1, D, D0, D1, OUT)
    if NEED_V:
        x0, x1 = tl.where(takes_part, dv0, 0.0), tl.where(takes_part, dv1, 0.0)
        store_rows(dv + own, key, d_n, exists, x0, x1, D, D0, D1, OUT)


def backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float,
    windows: WindowGrid | None, out: Tensor, lse: Tensor, g: Tensor, into: Gradients,
) -> None:  # fmt: skip
    """Writes `into`."""
    q, k, v, g = host.rows(q, k, v, g)
    delta = host.empty(lse, *lse.shape)
    mask = host.mask_bytes(key_mask, out)
    of_queries, of_keys, splits = _backward_plans(
        *host.facts(q, k, v, g), into.facts, key_mask is not None, scale, windows,
        host.target(q),
    )  # fmt: skip
    of_queries.start(q, k, v, mask, out, g, lse, delta, *host.or_(g, into.q))
    if into.k is not None or into.v is not None:
        parts = Parts(into, splits)
        of_keys.start(q, k, v, mask, g, lse, delta, *host.or_(g, parts.k, parts.v))
        parts.sum()


@planned
def _backward_plans(
    q: Any, k: Any, v: Any, g: Any, into: Places, masked: bool, scale: float,
    windows: WindowGrid | None, target: tuple[str, str],
) -> tuple[Plan, Plan, int]:  # fmt: skip
    """Of the gradients of queries, and of keys and values, and how many parts these come in."""
    (b, n, h, _), m = q[0], k[0][1]
    strides, after = host.strides_of(q, k, v, g), (scale, *host.geometry(windows))
    tiles = host.attention_tiles(target[1], q, k, v, g)
    sequences = b * num_sequences(windows)

    config, sizes = sizes_of("flash_backward_q", q, k, v, masked, windows, target)
    blocks = host.num_blocks(windows or n, config.rows)
    constants = dict(NEED_Q=into.q is not None) | sizes | tiles
    numbers = (*strides, *into.of_queries, n, m, h, blocks, *after)
    of_queries = Plan(
        flash_backward_q, sequences * blocks * h, *numbers, config=config, **constants
    )

    config, sizes = sizes_of("flash_backward_kv", q, k, v, masked, windows, target)
    blocks = host.num_blocks(windows or m, config.keys)
    splits = 1 if windows else splits_of(n, blocks)
    constants = dict(NEED_K=into.k is not None, NEED_V=into.v is not None) | sizes | tiles
    numbers = (*strides, *part_strides(k, splits, into), n, m, h, blocks, splits, *after)
    programs = sequences * blocks * splits * h
    of_keys = Plan(flash_backward_kv, programs, *numbers, config=config, **constants)
    return of_queries, of_keys, splits
