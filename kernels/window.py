"""Attention within windows of at most 64 tokens: several windows share one tile of rows.

A tile of ROWS rows holds ROWS // SLOTS windows, each in SLOTS rows, the power of two that holds the
largest window; scores between two windows are masked. A program owns whole windows, so it needs
neither atomics nor anything from the forward but q, k and v: the backward computes the softmax of
its whole rows anew. The rows of a tile are the tokens of windows as they are cut from the grid:
nothing is rolled, padded or masked in memory. Larger windows loop over their keys: `flash`.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..geometry import WindowGrid
from . import host
from .configs import Config
from .host import Gradients, Places, Plan, planned
from .tile import (
    LOG2E,
    box_size,
    head_offset,
    load_rows,
    num_tokens,
    num_windows,
    outer,
    product,
    softmax,
    softmax_gradient,
    store_rows,
    token_in_box,
    window_box,
)

RUNTIME = (
    *(f"{x}_{axis}" for x in ("q", "k", "v") for axis in "bnh"),
    *("heads", "scale", "f", "h", "w", "pf", "ph", "pw", "of", "oh", "ow"),
)


@triton.jit
def _rows(tile, geometry, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """Of every row of a tile its token, its window's place in the tile, and whether there is such
    a token."""
    row = tl.arange(0, ROWS)
    group, slot = row // SLOTS, row % SLOTS
    # Of a window alone in its tile all but the slots is one number for all rows.
    window = tile if SLOTS == ROWS else tile * (ROWS // SLOTS) + group
    box = window_box(window, geometry)
    valid = slot < box_size(box)  # no slot of a window past the last
    return token_in_box(slot, box, geometry), group, valid


@triton.jit
def _pairs(group, valid, GROUPS: tl.constexpr):
    """Which keys each row of a tile attends to, [R, R]. Of a window alone [1, R]: rows without a
    token need no mask, as their zeros add nothing to the gradients of keys and values."""
    pair = valid[None, :]
    if GROUPS > 1:
        pair = pair & (group[:, None] == group[None, :]) & valid[:, None]
    return pair


@triton.jit
def _contained(x, pair, GROUPS: tl.constexpr):
    """x [R, R] without what windows of a tile have with one another, which may be NaN."""
    return tl.where(pair, x, 0.0) if GROUPS > 1 else x


@triton.jit
def _is_finite(x):
    """Whether a whole tile is: x - x is 0, but NaN for NaN and infinities."""
    return tl.sum(tl.sum((x - x != 0).to(tl.int32), 1), 0) == 0


@triton.jit
def _contained_product(
    p, x0, x1, group, D1: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr
):
    """p x for a block-diagonal p, where a number that is not finite stays in its window.

    A zero of p times NaN is NaN, so a tile that holds one is multiplied window by window.
    """
    y0, y1 = product(p, x0, x1, D1, PRECISION)
    if GROUPS > 1:
        if not (_is_finite(x0) & _is_finite(x1)):
            for g in range(GROUPS):
                own = (group == g)[:, None]
                own0, own1 = tl.where(own, x0, 0.0), tl.where(own, x1, 0.0)
                z0, z1 = product(p, own0.to(x0.dtype), own1.to(x1.dtype), D1, PRECISION)
                y0, y1 = tl.where(own, z0, y0), tl.where(own, z1, y1)
    return y0, y1


@triton.jit(do_not_specialize=RUNTIME)
def window_forward(
    q, k, v, out,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64,
    k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_n: tl.int64, v_h: tl.int64,
    heads, scale, f, h, w, pf, ph, pw, of, oh, ow,
    SLOTS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale · q kᵀ) v within windows; out (B, N, H, D) is contiguous."""
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    GROUPS: tl.constexpr = ROWS // SLOTS
    tiles = tl.cdiv(num_windows(geometry), GROUPS)
    # Heads are fastest: neighbouring programs read neighbouring bytes of the same tokens.
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % tiles
    batch = tl.program_id(0) // heads // tiles
    token, group, valid = _rows(tile, geometry, SLOTS, ROWS)
    q += head_offset(batch, head, q_b, q_h, ALIGN)
    k += head_offset(batch, head, k_b, k_h, ALIGN)
    v += head_offset(batch, head, v_b, v_h, ALIGN)
    q0, q1 = load_rows(q, token, q_n, valid, D, D0, D1, ALIGN)
    k0, k1 = load_rows(k, token, k_n, valid, D, D0, D1, ALIGN)
    v0, v1 = load_rows(v, token, v_n, valid, D, D0, D1, ALIGN)

    s = outer(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)
    p, total = softmax(s, _pairs(group, valid, GROUPS))
    o0, o1 = _contained_product(p, v0, v1, group, D1, PRECISION, GROUPS)

    out += head_offset(batch, head, num_tokens(geometry) * heads.to(tl.int64) * D, D, D & -D)
    o0, o1 = o0 / total[:, None], o1 / total[:, None]
    store_rows(out, token, heads * D, valid, o0, o1, D, D0, D1, D & -D)


@triton.jit
def _tile_gradients(
    q, k, v, g, dq, dk, dv, own, tile, geometry, q_n, k_n, v_n, g_n, d_n, scale,
    NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of one head; `own` is where that head's gradients begin."""
    GROUPS: tl.constexpr = ROWS // SLOTS
    OUT: tl.constexpr = D & -D  # divides the strides of gradients, whose rows are whole heads
    token, group, valid = _rows(tile, geometry, SLOTS, ROWS)
    q0, q1 = load_rows(q, token, q_n, valid, D, D0, D1, ALIGN)
    k0, k1 = load_rows(k, token, k_n, valid, D, D0, D1, ALIGN)
    v0, v1 = load_rows(v, token, v_n, valid, D, D0, D1, ALIGN)
    g0, g1 = load_rows(g, token, g_n, valid, D, D0, D1, ALIGN)

    pair = _pairs(group, valid, GROUPS)
    s = outer(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)
    p, total = softmax(s, pair)
    p = _contained(p / total[:, None], pair, GROUPS)
    if NEED_V:
        x0, x1 = _contained_product(tl.trans(p), g0, g1, group, D1, PRECISION, GROUPS)
        store_rows(dv + own, token, d_n, valid, x0, x1, D, D0, D1, OUT)
    if NEED_Q or NEED_K:
        dp = _contained(outer(g0, g1, v0, v1, D1, PRECISION), pair, GROUPS)
        ds = _contained(softmax_gradient(p, dp), pair, GROUPS) * scale
        if NEED_Q:
            x0, x1 = _contained_product(ds, k0, k1, group, D1, PRECISION, GROUPS)
            store_rows(dq + own, token, d_n, valid, x0, x1, D, D0, D1, OUT)
        if NEED_K:
            x0, x1 = _contained_product(tl.trans(ds), q0, q1, group, D1, PRECISION, GROUPS)
            store_rows(dk + own, token, d_n, valid, x0, x1, D, D0, D1, OUT)


@triton.jit(do_not_specialize=(*RUNTIME, "g_b", "g_n", "g_h", "d_b", "d_n", "share"))
def window_backward(
    q, k, v, g, dq, dk, dv,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64,
    k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_n: tl.int64, v_h: tl.int64,
    g_b: tl.int64, g_n: tl.int64, g_h: tl.int64,
    d_b: tl.int64, d_n, heads, scale, f, h, w, pf, ph, pw, of, oh, ow, share,
    NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of `window_forward`, g being that of out; dq, dk, dv (B, N, H, D) have the strides
    d_b and d_n, and the heads of a token one after the other.

    With P the weights: dV = Pᵀ dO;  dP = dO Vᵀ;  dS = P ∘ (dP - rowsum(P ∘ dP));
    dQ = scale · dS K;  dK = scale · dSᵀ Q.

    A program walks over `share` tiles, the next one's rows on their way meanwhile; over one where
    windows share tiles, as a loop around what keeps them apart takes too many registers.
    """
    geometry = (f, h, w, pf, ph, pw, of, oh, ow)
    GROUPS: tl.constexpr = ROWS // SLOTS
    tiles = tl.cdiv(num_windows(geometry), GROUPS)
    shares = tl.cdiv(tiles, share)
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads % shares * share
    batch = tl.program_id(0) // heads // shares
    q += head_offset(batch, head, q_b, q_h, ALIGN)
    k += head_offset(batch, head, k_b, k_h, ALIGN)
    v += head_offset(batch, head, v_b, v_h, ALIGN)
    g += head_offset(batch, head, g_b, g_h, ALIGN)
    own = head_offset(batch, head, d_b, D, D & -D)
    if GROUPS == 1:
        for tile in tl.range(first, tl.minimum(first + share, tiles), num_stages=STAGES):
            _tile_gradients(
                q, k, v, g, dq, dk, dv, own, tile, geometry, q_n, k_n, v_n, g_n,
                d_n, scale, NEED_Q, NEED_K, NEED_V, SLOTS, ROWS, D, D0, D1, ALIGN, PRECISION,
            )  # fmt: skip
    else:
        _tile_gradients(
            q, k, v, g, dq, dk, dv, own, first, geometry, q_n, k_n, v_n, g_n,
            d_n, scale, NEED_Q, NEED_K, NEED_V, SLOTS, ROWS, D, D0, D1, ALIGN, PRECISION,
        )  # fmt: skip


# The backward: one tile a program until a head has twice FEW_TILES, lest there be too few programs
# for a GPU, and then up to MOST_TILES. Depends on neither batch nor device.
FEW_TILES, MOST_TILES = 128, 4


def forward(q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float) -> Tensor:
    """(B, N, H, D)."""
    q, k, v = host.rows(q, k, v)
    out = host.empty(q, *q.shape)
    _forward_plan(*host.facts(q, k, v), windows, scale, host.target(q)).start(q, k, v, out)
    return out


def backward(
    q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float, g: Tensor, into: Gradients
) -> None:
    """Writes `into`."""
    q, k, v, g = host.rows(q, k, v, g)
    facts = host.facts(q, k, v, g)
    plan = _backward_plan(*facts, into.facts, windows, scale, host.target(q))
    plan.start(q, k, v, g, *host.or_(g, into.q, into.k, into.v))


@planned
def _forward_plan(
    q: Any, k: Any, v: Any, windows: WindowGrid, scale: float, target: tuple[str, str]
) -> Plan:
    b, _, heads, _ = q[0]
    tiles, config, sizes = _tiles("window_forward", q, windows, target)
    numbers = (*host.strides_of(q, k, v), heads, scale, *host.geometry(windows))
    constants = sizes | host.attention_tiles(target[1], q, k, v)
    return Plan(window_forward, b * tiles * heads, *numbers, config=config, **constants)


@planned
def _backward_plan(
    q: Any, k: Any, v: Any, g: Any, into: Places, windows: WindowGrid, scale: float,
    target: tuple[str, str],
) -> Plan:  # fmt: skip
    b, _, heads, _ = q[0]
    tiles, config, sizes = _tiles("window_backward", q, windows, target)
    alone = sizes["SLOTS"] == sizes["ROWS"]
    share = max(1, min(MOST_TILES, tiles // FEW_TILES)) if alone else 1
    own = into.of_queries if into.q else into.of_keys  # all lie alike
    before = (*host.strides_of(q, k, v, g), *own, heads, scale)
    numbers = (*before, *host.geometry(windows), share)
    constants = host.needs(into.need) | sizes | host.attention_tiles(target[1], q, k, v, g)
    programs = b * host.cdiv(tiles, share) * heads
    return Plan(
        window_backward, programs, *numbers, config=config, STAGES=config.stages, **constants
    )


def _tiles(
    kernel: str, q: Any, windows: WindowGrid, target: tuple[str, str]
) -> tuple[int, Config, dict[str, int]]:
    """How many tiles a sample's head has, the configuration, and the tiles' constants."""
    (*_, d), _, dtype, _ = q
    slots = host.next_power_of_2(math.prod(windows.window))
    channels = sum(host.split_channels(d))
    config = host.config_of(kernel, target[0], dtype, channels=channels, slots=slots)
    rows = max(config.rows, slots)
    return host.cdiv(windows.num_windows, rows // slots), config, dict(SLOTS=slots, ROWS=rows)
