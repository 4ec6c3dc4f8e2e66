"""Attention that loops over its keys in blocks: dense, or within windows of any size.

Dense are proxy self-attention and cross-attention to more than 128 keys; `few_keys` has the rest. A
window of more than 64 tokens is a dense attention whose rows are the tokens of its box of the grid:
WINDOWED changes how many rows there are and how a row finds its token, nothing else.

Every loop runs over whole blocks first and then over the rest, and only the rest is masked. The
forward keeps each row's log-sum-exp (in base 2) for the backward.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..geometry import WindowGrid
from . import host
from .configs import Config
from .host import Gradients, Places, Plan, planned
from .reduce import Parts, part_strides, splits_of
from .tile import (
    LOG2E,
    accumulate,
    box_size,
    head_offset,
    load_rows,
    num_windows,
    outer,
    row_dots,
    store_rows,
    token_in_box,
    window_box,
    zeros,
)

RUNTIME = (
    *(f"{x}_{axis}" for x in ("q", "k", "v") for axis in "bnh"),
    *("queries", "keys", "heads", "blocks", "scale"),
    *("f", "h", "w", "pf", "ph", "pw", "of", "oh", "ow"),
)
RUNTIME_BACKWARD = (*RUNTIME, "g_b", "g_n", "g_h", "d_b", "d_n", "splits")


@triton.jit
def _place(queries, keys, blocks, heads, geometry, WINDOWED: tl.constexpr):
    """This program's sample, head and block, the box of its window, and how many queries and keys
    there are: all, or those of the window.

    Heads are fastest: neighbouring programs read neighbouring bytes of the same tokens.
    """
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % blocks
    sample = tl.program_id(0) // heads // blocks
    window = sample * 0
    if WINDOWED:
        windows = num_windows(geometry)
        sample, window = sample // windows, sample % windows
    box = window_box(window, geometry)
    if WINDOWED:
        queries, keys = box_size(box), box_size(box)
    return sample, head, block, box, queries, keys


@triton.jit
def _token(slot, box, geometry, WINDOWED: tl.constexpr):
    if WINDOWED:
        return token_in_box(slot, box, geometry)
    else:
        return slot


@triton.jit
def _keys_of(start, length, mask, BLOCK: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr):
    """The slots of a block of keys, and which of them take part: all, unless it is of the rest."""
    slot = start + tl.arange(0, BLOCK)
    present = tl.full([BLOCK], True, tl.int1)
    if REST:
        present = slot < length
        if MASKED:
            present = present & (tl.load(mask + slot, mask=present, other=0) != 0)
    return slot, present


@triton.jit
def _attend(
    start, length, q0, q1, k, v, k_n, v_n, mask, high, total, o0, o1, scale, box, geometry,
    REST: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the block of keys at `start`, for a scale >= 0."""
    slot, present = _keys_of(start, length, mask, BLOCK, REST, MASKED)
    key = _token(slot, box, geometry, WINDOWED)
    k0, k1 = load_rows(k, key, k_n, present, D, D0, D1, ALIGN)
    v0, v1 = load_rows(v, key, v_n, present, D, D0, D1, ALIGN)
    s = outer(q0, q1, k0, k1, D1, PRECISION)
    if REST:
        s = tl.where(present[None, :], s * (scale * LOG2E), float("-inf"))
        new_high = tl.maximum(high, tl.max(s, 1))
        # Where no key has come yet, any finite number serves: -inf - -inf is NaN.
        shift = tl.where(new_high == float("-inf"), 0.0, new_high) if MASKED else new_high
        p = tl.exp2(s - shift[:, None])
    else:
        new_high = tl.maximum(high, tl.max(s, 1) * (scale * LOG2E))
        shift = new_high
        p = tl.exp2(s * (scale * LOG2E) - shift[:, None])
    rescale = tl.exp2(high - shift)
    total = total * rescale + tl.sum(p, 1)
    o0 *= rescale[:, None]
    if D1 > 0:
        o1 *= rescale[:, None]
    o0, o1 = accumulate(p, v0, v1, o0, o1, D1, PRECISION)
    return new_high, total, o0, o1


@triton.jit(do_not_specialize=RUNTIME)
def flash_forward(
    q, k, v, mask, out, lse,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64,
    k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_n: tl.int64, v_h: tl.int64,
    queries, keys, heads, blocks, scale, f, h, w, pf, ph, pw, of, oh, ow,
    NEGATIVE: tl.constexpr,
    WINDOWED: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale · q kᵀ) v.

    mask (B, M) bytes, out (B, N, H, D) and lse (B, H, N) are contiguous; `blocks` is how many
    blocks of ROWS hold the queries of the largest window; `scale` comes without
    its sign, NEGATIVE.
    """
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    batch, head, block, box, n_queries, n_keys = _place(
        queries, keys, blocks, heads, geometry, WINDOWED
    )
    if block * ROWS >= n_queries:
        return
    OUT: tl.constexpr = D & -D
    ACC: tl.constexpr = lse.dtype.element_ty
    slot = block * ROWS + tl.arange(0, ROWS)
    valid = slot < n_queries
    row = _token(slot, box, geometry, WINDOWED)
    q += head_offset(batch, head, q_b, q_h, ALIGN)
    k += head_offset(batch, head, k_b, k_h, ALIGN)
    v += head_offset(batch, head, v_b, v_h, ALIGN)
    mask += batch.to(tl.int64) * keys
    q0, q1 = load_rows(q, row, q_n, valid, D, D0, D1, ALIGN)
    if NEGATIVE:  # the largest product has the largest score only where the scale is not negative
        q0, q1 = -q0, -q1

    high = tl.full([ROWS], float("-inf"), ACC)
    total = tl.zeros([ROWS], ACC)
    o0, o1 = zeros(ROWS, D0, D1, ACC)
    whole = 0 if MASKED else n_keys // KEYS * KEYS
    for start in range(0, whole, KEYS):
        high, total, o0, o1 = _attend(
            start, n_keys, q0, q1, k, v, k_n, v_n, mask, high, total, o0, o1, scale, box, geometry,
            False, WINDOWED, MASKED, KEYS, D, D0, D1, ALIGN, PRECISION,
        )  # fmt: skip
    for start in range(whole, n_keys, KEYS):
        high, total, o0, o1 = _attend(
            start, n_keys, q0, q1, k, v, k_n, v_n, mask, high, total, o0, o1, scale, box, geometry,
            True, WINDOWED, MASKED, KEYS, D, D0, D1, ALIGN, PRECISION,
        )  # fmt: skip

    some = tl.where(total == 0, 1.0, total)
    out += head_offset(batch, head, queries * heads.to(tl.int64) * D, D, OUT)
    o0, o1 = o0 / some[:, None], o1 / some[:, None]
    store_rows(out, row, heads * D, valid, o0, o1, D, D0, D1, OUT)
    lse += (batch.to(tl.int64) * heads + head) * queries
    tl.store(lse + row, high + tl.log2(some), mask=valid)


@triton.jit
def _add_dq(
    start, length, q0, q1, g0, g1, k, v, k_n, v_n, mask, lse, delta, dq0, dq1, scale, box, geometry,
    REST: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slot, present = _keys_of(start, length, mask, BLOCK, REST, MASKED)
    key = _token(slot, box, geometry, WINDOWED)
    k0, k1 = load_rows(k, key, k_n, present, D, D0, D1, ALIGN)
    v0, v1 = load_rows(v, key, v_n, present, D, D0, D1, ALIGN)
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
    WINDOWED: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out ∘ g) (B, H, N), which `flash_backward_kv` reads, and the gradient of q
    (B, N, H, D), of the strides d_b and d_n, with the heads of a token one after the other.

    With P the weights: dP = g Vᵀ;  dS = P ∘ (dP - delta);  dQ = scale · dS K.
    """
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    batch, head, block, box, n_queries, n_keys = _place(
        queries, keys, blocks, heads, geometry, WINDOWED
    )
    if block * ROWS >= n_queries:
        return
    OUT: tl.constexpr = D & -D
    ACC: tl.constexpr = lse.dtype.element_ty
    slot = block * ROWS + tl.arange(0, ROWS)
    valid = slot < n_queries
    row = _token(slot, box, geometry, WINDOWED)
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
        whole = 0 if MASKED else n_keys // KEYS * KEYS
        for start in range(0, whole, KEYS):
            dq0, dq1 = _add_dq(
                start, n_keys, q0, q1, g0, g1, k, v, k_n, v_n, mask, lse_row, delta_row, dq0, dq1,
                scale, box, geometry,
                False, WINDOWED, MASKED, KEYS, D, D0, D1, ALIGN, PRECISION,
            )  # fmt: skip
        for start in range(whole, n_keys, KEYS):
            dq0, dq1 = _add_dq(
                start, n_keys, q0, q1, g0, g1, k, v, k_n, v_n, mask, lse_row, delta_row, dq0, dq1,
                scale, box, geometry,
                True, WINDOWED, MASKED, KEYS, D, D0, D1, ALIGN, PRECISION,
            )  # fmt: skip
        dq += head_offset(batch, head, d_b, D, OUT)
        store_rows(dq, row, d_n, valid, dq0 * scale, dq1 * scale, D, D0, D1, OUT)


@triton.jit
def _add_dkv(
    start, length, k0, k1, v0, v1, q, g, q_n, g_n, lse, delta, dk0, dk1, dv0, dv1, scale,
    box, geometry,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    REST: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The block of queries at `start`. Scores are transposed here, [keys, queries], so that the
    weights enter the next product as they are."""
    slot, valid = _keys_of(start, length, q, BLOCK, REST, False)
    row = _token(slot, box, geometry, WINDOWED)
    q0, q1 = load_rows(q, row, q_n, valid, D, D0, D1, ALIGN)
    g0, g1 = load_rows(g, row, g_n, valid, D, D0, D1, ALIGN)
    lse_row = tl.load(lse + row, mask=valid, other=float("inf"))
    p = tl.exp2(outer(k0, k1, q0, q1, D1, PRECISION) * (scale * LOG2E) - lse_row[None, :])
    if NEED_V:
        dv0, dv1 = accumulate(p, g0, g1, dv0, dv1, D1, PRECISION)
    if NEED_K:
        delta_row = tl.load(delta + row, mask=valid, other=0.0)
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
    WINDOWED: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v, (B, splits, M, H, D): each split sums over a share of the queries.
    Parts are d_b apart and rows d_n, with the heads of a token one after the other.

    With P the weights: dV = Pᵀ g;  dS = P ∘ (g Vᵀ - delta);  dK = scale · dSᵀ Q.
    """
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    batch, head, block, box, n_queries, n_keys = _place(
        queries, keys, blocks * splits, heads, geometry, WINDOWED
    )
    split, block = block // blocks, block % blocks
    if block * KEYS >= n_keys:
        return
    OUT: tl.constexpr = D & -D
    ACC: tl.constexpr = lse.dtype.element_ty
    slot, exists = _keys_of(block * KEYS, n_keys, mask, KEYS, True, False)
    _, present = _keys_of(
        block * KEYS, n_keys, mask + batch.to(tl.int64) * keys, KEYS, True, MASKED
    )
    key = _token(slot, box, geometry, WINDOWED)
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
    share = tl.cdiv(tl.cdiv(n_queries, ROWS), splits) * ROWS
    first, last = split * share, tl.minimum((split + 1) * share, n_queries)
    whole = first + tl.maximum(last - first, 0) // ROWS * ROWS
    for start in range(first, whole, ROWS):
        dk0, dk1, dv0, dv1 = _add_dkv(
            start, last, k0, k1, v0, v1, q, g, q_n, g_n, lse, delta, dk0, dk1, dv0, dv1, scale,
            box, geometry, NEED_K, NEED_V,
            False, WINDOWED, ROWS, D, D0, D1, ALIGN, PRECISION,
        )  # fmt: skip
    for start in range(whole, last, ROWS):
        dk0, dk1, dv0, dv1 = _add_dkv(
            start, last, k0, k1, v0, v1, q, g, q_n, g_n, lse, delta, dk0, dk1, dv0, dv1, scale,
            box, geometry, NEED_K, NEED_V,
            True, WINDOWED, ROWS, D, D0, D1, ALIGN, PRECISION,
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


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float,
    windows: WindowGrid | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, N, H, D) and the log-sum-exp (B, H, N) in base 2; within windows where they are given."""
    q, k, v = host.rows(q, k, v)
    b, n, h, _ = q.shape
    out = host.empty(q, *q.shape)
    lse = host.empty(q, b, h, n, dtype=host.accumulator(q.dtype))
    masked = key_mask is not None
    plan = _forward_plan(*host.facts(q, k, v), masked, scale, windows, host.target(q))
    plan.start(q, k, v, host.mask_bytes(key_mask, out), out, lse)
    return out, lse


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
def _forward_plan(
    q: Any, k: Any, v: Any, masked: bool, scale: float, windows: WindowGrid | None,
    target: tuple[str, str],
) -> Plan:  # fmt: skip
    (b, n, h, _), m = q[0], k[0][1]
    config = _config("flash_forward", q, masked, windows, target)
    count, longest = _rows_of(windows, n)
    blocks = host.cdiv(longest, config.rows)
    numbers = (*host.strides_of(q, k, v), n, m, h, blocks, abs(scale), *host.geometry(windows))
    tiles = host.attention_tiles(target[1], q, k, v)
    constants = dict(NEGATIVE=scale < 0) | _sizes(config, masked, windows) | tiles
    return Plan(flash_forward, b * count * blocks * h, *numbers, config=config, **constants)


@planned
def _backward_plans(
    q: Any, k: Any, v: Any, g: Any, into: Places, masked: bool, scale: float,
    windows: WindowGrid | None, target: tuple[str, str],
) -> tuple[Plan, Plan, int]:  # fmt: skip
    """Of the gradients of queries, and of keys and values, and how many parts these come in."""
    (b, n, h, _), m = q[0], k[0][1]
    strides, after = host.strides_of(q, k, v, g), (scale, *host.geometry(windows))
    tiles = host.attention_tiles(target[1], q, k, v, g)

    config = _config("flash_backward_q", q, masked, windows, target)
    count, longest = _rows_of(windows, n)
    blocks = host.cdiv(longest, config.rows)
    numbers = (*strides, *into.of_queries, n, m, h, blocks, *after)
    constants = dict(NEED_Q=into.q is not None) | _sizes(config, masked, windows) | tiles
    programs = b * count * blocks * h
    of_queries = Plan(flash_backward_q, programs, *numbers, config=config, **constants)

    config = _config("flash_backward_kv", q, masked, windows, target)
    count, longest = _rows_of(windows, m)
    blocks = host.cdiv(longest, config.keys)
    splits = 1 if windows else splits_of(n, blocks)
    numbers = (*strides, *part_strides(k, splits, into), n, m, h, blocks, splits, *after)
    need = dict(NEED_K=into.k is not None, NEED_V=into.v is not None)
    constants = need | _sizes(config, masked, windows) | tiles
    programs = b * count * blocks * splits * h
    of_keys = Plan(flash_backward_kv, programs, *numbers, config=config, **constants)
    return of_queries, of_keys, splits


def _rows_of(windows: WindowGrid | None, length: int) -> tuple[int, int]:
    """How many sequences a sample has, and the length of the longest."""
    return (windows.num_windows, host.largest_window(windows)) if windows else (1, length)


def _config(
    kernel: str, q: Any, masked: bool, windows: WindowGrid | None, target: tuple[str, str]
) -> Config:
    (_, n, _, d), _, dtype, _ = q
    sizes = dict(
        channels=sum(host.split_channels(d)),
        queries=host.largest_window(windows) if windows else n,
        windowed=windows is not None,
        masked=masked,
    )
    return host.config_of(kernel, target[0], dtype, **sizes)


def _sizes(config: Config, masked: bool, windows: WindowGrid | None) -> dict[str, Any]:
    windowed = windows is not None
    return dict(WINDOWED=windowed, MASKED=masked, ROWS=config.rows, KEYS=config.keys)
