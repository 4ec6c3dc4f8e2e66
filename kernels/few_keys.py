"""Dense attention to at most 128 keys, such as the proxies of an image: all keys stay on chip.

A program owns all keys of one head and walks over some of its queries, so that a row's softmax is
one pass, and the backward one kernel. It keeps the gradients of keys and values in registers and
writes them once per program; where several programs share a head's queries, `reduce.sum_splits`
adds up their parts in a fixed order. Nothing is kept from the forward but q, k and v.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import host
from .configs import Config
from .host import Gradients, Places, Plan, planned
from .reduce import Parts, part_strides, splits_of
from .tile import (
    LOG2E,
    accumulate,
    head_offset,
    load_rows,
    outer,
    product,
    softmax,
    softmax_gradient,
    store_rows,
    zeros,
)

RUNTIME = (
    *(f"{x}_{axis}" for x in ("q", "k", "v") for axis in "bnh"),
    *("queries", "keys", "heads", "splits", "scale"),
)


@triton.jit
def _place(queries, heads, splits, ROWS: tl.constexpr):
    """This program's sample, head and split, and its first and last-but-one query."""
    head = tl.program_id(0) % heads
    split = tl.program_id(0) // heads % splits
    batch = tl.program_id(0) // heads // splits
    share = tl.cdiv(tl.cdiv(queries, ROWS), splits) * ROWS
    return batch, head, split, split * share, tl.minimum((split + 1) * share, queries)


@triton.jit
def _present(mask, batch, keys, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """Number of every key of the tile, whether there is one, and whether it may be attended to."""
    key = tl.arange(0, KEYS)
    exists = key < keys
    if MASKED:
        row = mask + batch.to(tl.int64) * keys
        return key, exists, exists & (tl.load(row + key, mask=exists, other=0) != 0)
    else:
        return key, exists, exists


@triton.jit(do_not_specialize=RUNTIME)
def few_keys_forward(
    q, k, v, mask, out,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64,
    k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_n: tl.int64, v_h: tl.int64,
    queries, keys, heads, splits, scale,
    MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale · q kᵀ) v; mask (B, M) bytes, out (B, N, H, D), both contiguous."""
    OUT: tl.constexpr = D & -D
    batch, head, _split, first, last = _place(queries, heads, splits, ROWS)
    key, _exists, present = _present(mask, batch, keys, KEYS, MASKED)
    q += head_offset(batch, head, q_b, q_h, ALIGN)
    k += head_offset(batch, head, k_b, k_h, ALIGN)
    v += head_offset(batch, head, v_b, v_h, ALIGN)
    out += head_offset(batch, head, queries * heads.to(tl.int64) * D, D, OUT)
    k0, k1 = load_rows(k, key, k_n, present, D, D0, D1, ALIGN)
    v0, v1 = load_rows(v, key, v_n, present, D, D0, D1, ALIGN)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < last
        q0, q1 = load_rows(q, row, q_n, valid, D, D0, D1, ALIGN)
        s = outer(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)
        p, total = softmax(s, present[None, :])
        o0, o1 = product(p, v0, v1, D1, PRECISION)
        o0, o1 = o0 / total[:, None], o1 / total[:, None]
        store_rows(out, row, heads * D, valid, o0, o1, D, D0, D1, OUT)


@triton.jit(do_not_specialize=(*RUNTIME, "g_b", "g_n", "g_h", "dq_b", "dq_n", "dk_b", "dk_n"))
def few_keys_backward(
    q, k, v, mask, g, dq, dk, dv,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64,
    k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_n: tl.int64, v_h: tl.int64,
    g_b: tl.int64, g_n: tl.int64, g_h: tl.int64,
    dq_b: tl.int64, dq_n, dk_b: tl.int64, dk_n,
    queries, keys, heads, splits, scale,
    NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of `few_keys_forward`, g being that of out; see `window_backward` for the math.

    dq (B, N, H, D), and dk and dv (B, splits, M, H, D) in parts dk_b apart: each with the heads of
    a token one after the other.
    """
    OUT: tl.constexpr = D & -D
    batch, head, split, first, last = _place(queries, heads, splits, ROWS)
    key, exists, present = _present(mask, batch, keys, KEYS, MASKED)
    q += head_offset(batch, head, q_b, q_h, ALIGN)
    k += head_offset(batch, head, k_b, k_h, ALIGN)
    v += head_offset(batch, head, v_b, v_h, ALIGN)
    g += head_offset(batch, head, g_b, g_h, ALIGN)
    dq += head_offset(batch, head, dq_b, D, OUT)
    k0, k1 = load_rows(k, key, k_n, present, D, D0, D1, ALIGN)
    v0, v1 = load_rows(v, key, v_n, present, D, D0, D1, ALIGN)
    ACC: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    dk0, dk1 = zeros(KEYS, D0, D1, ACC)
    dv0, dv1 = zeros(KEYS, D0, D1, ACC)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < last
        q0, q1 = load_rows(q, row, q_n, valid, D, D0, D1, ALIGN)
        g0, g1 = load_rows(g, row, g_n, valid, D, D0, D1, ALIGN)
        # A query past the last has q = 0 and g = 0, and adds nothing to dk and dv.
        s = outer(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)
        p, total = softmax(s, present[None, :])
        p *= (1.0 / total)[:, None]
        if NEED_V:
            dv0, dv1 = accumulate(tl.trans(p), g0, g1, dv0, dv1, D1, PRECISION)
        if NEED_Q or NEED_K:
            dp = outer(g0, g1, v0, v1, D1, PRECISION)
            ds = softmax_gradient(p, dp) * scale
            if NEED_Q:
                x0, x1 = product(ds, k0, k1, D1, PRECISION)
                # By the tile's first row and rows from 0 on, which takes fewer registers.
                tile = dq + tl.multiple_of(start * dq_n.to(tl.int64), OUT)
                store_rows(tile, row - start, dq_n, valid, x0, x1, D, D0, D1, OUT)
            if NEED_K:
                dk0, dk1 = accumulate(tl.trans(ds), q0, q1, dk0, dk1, D1, PRECISION)
    # Where a query's weights are NaN, so are those of the keys that take no part.
    takes_part = present[:, None]
    own = head_offset(batch * splits + split, head, dk_b, D, OUT)
    if NEED_K:
        x0, x1 = tl.where(takes_part, dk0, 0.0), tl.where(takes_part, dk1, 0.0)
        store_rows(dk + own, key, dk_n, exists, x0, x1, D, D0, D1, OUT)
    if NEED_V:
        x0, x1 = tl.where(takes_part, dv0, 0.0), tl.where(takes_part, dv1, 0.0)
        store_rows(dv + own, key, dk_n, exists, x0, x1, D, D0, D1, OUT)


def forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """(B, N, H, D)."""
    q, k, v = host.rows(q, k, v)
    out = host.empty(q, *q.shape)
    plan = _forward_plan(*host.facts(q, k, v), key_mask is not None, scale, host.target(q))
    plan.start(q, k, v, host.mask_bytes(key_mask, out), out)
    return out


def backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, g: Tensor,
    into: Gradients,
) -> None:  # fmt: skip
    """Writes `into`."""
    q, k, v, g = host.rows(q, k, v, g)
    masked = key_mask is not None
    plan, splits = _backward_plan(
        *host.facts(q, k, v, g), into.facts, masked, scale, host.target(q)
    )
    parts = Parts(into, splits)
    written = host.or_(g, into.q, parts.k, parts.v)
    plan.start(q, k, v, host.mask_bytes(key_mask, g), g, *written)
    parts.sum()


@planned
def _forward_plan(
    q: Any, k: Any, v: Any, masked: bool, scale: float, target: tuple[str, str]
) -> Plan:
    (b, n, h, _), m = q[0], k[0][1]
    config, sizes = _tiles("few_keys_forward", q, m, target)
    splits = host.cdiv(n, config.rows * 4)
    numbers = (*host.strides_of(q, k, v), n, m, h, splits, scale)
    tiles = host.attention_tiles(target[1], q, k, v)
    constants = dict(MASKED=masked) | sizes | tiles
    return Plan(few_keys_forward, b * splits * h, *numbers, config=config, **constants)


@planned
def _backward_plan(
    q: Any, k: Any, v: Any, g: Any, into: Places, masked: bool, scale: float,
    target: tuple[str, str],
) -> tuple[Plan, int]:  # fmt: skip
    """And how many parts the gradients of keys and values come in."""
    (b, n, h, _), m = q[0], k[0][1]
    config, sizes = _tiles("few_keys_backward", q, m, target)
    splits = _splits(n, m)
    strides = (*host.strides_of(q, k, v, g), *into.of_queries, *part_strides(k, splits, into))
    tiles = host.attention_tiles(target[1], q, k, v, g)
    constants = host.needs(into.need) | dict(MASKED=masked) | sizes | tiles
    numbers = (*strides, n, m, h, splits, scale)
    return Plan(few_keys_backward, b * splits * h, *numbers, config=config, **constants), splits


def _splits(queries: int, keys: int) -> int:
    """Programs that share a head's queries in the backward. With up to 64 keys they are small
    enough for several on a multiprocessor, so that more of them pay: one for 256 queries, and for
    512 where 16 programs a head fill a large GPU, as each writes a part that is read again."""
    if keys > 64:
        return splits_of(queries, 1)
    return max(min(host.cdiv(queries, 256), 16), host.cdiv(queries, 512))


def _tiles(kernel: str, q: Any, m: int, target: tuple[str, str]) -> tuple[Config, dict[str, int]]:
    channels = sum(host.split_channels(q[0][-1]))
    keys = max(16, host.next_power_of_2(m))
    config = host.config_of(kernel, target[0], q[2], channels=channels, keys=keys)
    return config, dict(ROWS=config.rows, KEYS=keys)
