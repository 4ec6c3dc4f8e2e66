"""Attention that loops over its keys in blocks: dense, or within windows of any size.

Dense are proxy self-attention and cross-attention to more than 128 keys; `few_keys` has the rest. A
window of more than 64 tokens is a dense attention whose rows are the tokens of its box of the grid:
WINDOWED changes how many rows there are and how a block of them finds its tokens, nothing else.

Every loop runs over whole blocks first and then over the rest, and only the rest is masked. The
forward keeps each row's log-sum-exp (in base 2) for the backward, `flash_backward`.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..geometry import WindowGrid
from . import host
from .blocks import cut, place, rows_of
from .configs import Config
from .host import Plan, planned
from .tile import LOG2E, accumulate, head_offset, load_rows, outer, row_offset, store_rows, zeros

RUNTIME = (
    *(f"{x}_{axis}" for x in ("q", "k", "v") for axis in "bnh"),
    *("queries", "keys", "heads", "blocks", "scale"),
    *("f", "h", "w", "pf", "ph", "pw", "of", "oh", "ow"),
)


@triton.jit
def _attend(
    block, shape, keys, box, geometry, q0, q1, k, v, k_n, v_n, mask, scale, high, total, o0, o1,
    REST: tl.constexpr, WINDOWED: tl.constexpr, STACKED: tl.constexpr, MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: a block of keys, for a scale >= 0."""
    key, first, present = rows_of(
        block, shape, keys, box, geometry, mask, REST, WINDOWED, STACKED, MASKED, KEYS
    )
    k0, k1 = load_rows(k + row_offset(first, k_n, ALIGN), key, k_n, present, D, D0, D1, ALIGN)
    v0, v1 = load_rows(v + row_offset(first, v_n, ALIGN), key, v_n, present, D, D0, D1, ALIGN)
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
    ALIKE: tl.constexpr, WINDOWED: tl.constexpr, STACKED: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale · q kᵀ) v.

    mask (B, M) bytes, out (B, N, H, D) and lse (B, H, N) are contiguous; `blocks` is how many
    blocks of ROWS hold the queries of the largest window; `scale` comes without
    its sign, NEGATIVE.
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
    mask += batch.to(tl.int64) * keys
    q0, q1 = load_rows(q, row, q_n, valid, D, D0, D1, ALIGN)
    if NEGATIVE:  # the largest product has the largest score only where the scale is not negative
        q0, q1 = -q0, -q1

    high = tl.full([ROWS], float("-inf"), ACC)
    total = tl.zeros([ROWS], ACC)
    o0, o1 = zeros(ROWS, D0, D1, ACC)
    shape, count, whole = cut(keys, box, KEYS, WINDOWED)
    whole = 0 if MASKED else whole
    for block in range(0, whole):
        high, total, o0, o1 = _attend(
            block, shape, keys, box, geometry, q0, q1, k, v, k_n, v_n, mask, scale,
            high, total, o0, o1,
            False, WINDOWED, STACKED, MASKED, KEYS, D, D0, D1, ALIGN, PRECISION,
        )  # fmt: skip
    for block in range(whole, count):
        high, total, o0, o1 = _attend(
            block, shape, keys, box, geometry, q0, q1, k, v, k_n, v_n, mask, scale,
            high, total, o0, o1,
            True, WINDOWED, STACKED, MASKED, KEYS, D, D0, D1, ALIGN, PRECISION,
        )  # fmt: skip

    some = tl.where(total == 0, 1.0, total)
    out += head_offset(batch, head, queries * heads.to(tl.int64) * D, D, OUT)
    o0, o1 = o0 / some[:, None], o1 / some[:, None]
    store_rows(out, row, heads * D, valid, o0, o1, D, D0, D1, OUT)
    lse += (batch.to(tl.int64) * heads + head) * queries
    tl.store(lse + row, high + tl.log2(some), mask=valid)


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


@planned
def _forward_plan(
    q: Any, k: Any, v: Any, masked: bool, scale: float, windows: WindowGrid | None,
    target: tuple[str, str],
) -> Plan:  # fmt: skip
    (b, n, h, _), m = q[0], k[0][1]
    config, sizes = sizes_of("flash_forward", q, k, v, masked, windows, target)
    blocks = host.num_blocks(windows or n, config.rows)
    programs = b * num_sequences(windows) * blocks * h
    numbers = (*host.strides_of(q, k, v), n, m, h, blocks, abs(scale), *host.geometry(windows))
    constants = dict(NEGATIVE=scale < 0) | sizes | host.attention_tiles(target[1], q, k, v)
    return Plan(flash_forward, programs, *numbers, config=config, **constants)


def num_sequences(windows: WindowGrid | None) -> int:
    """Of a sample."""
    return windows.num_windows if windows else 1


def sizes_of(
    kernel: str, q: Any, k: Any, v: Any, masked: bool, windows: WindowGrid | None,
    target: tuple[str, str],
) -> tuple[Config, dict[str, Any]]:  # fmt: skip
    """The configuration of one of the kernels, and what it makes constant."""
    (_, n, _, d), _, dtype, _ = q
    windowed = windows is not None
    config = host.config_of(
        kernel,
        target[0],
        dtype,
        channels=sum(host.split_channels(d)),
        queries=host.largest_window(windows) if windows else n,
        windowed=windowed,
        masked=masked,
    )
    size = min(config.rows, config.keys)
    stacked = windows is not None and windows.window[0] == 1 and windows.window[2] <= size
    constants = dict(ALIKE=k[1] == v[1], WINDOWED=windowed, STACKED=stacked, MASKED=masked)
    return config, dict(constants, ROWS=config.rows, KEYS=config.keys)
