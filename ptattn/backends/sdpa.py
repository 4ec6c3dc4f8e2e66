"""The portable fast backend: torch's scaled_dot_product_attention, on any device it runs on.

Each axis of the grid is split into first / interior / last runs of equal windows
(`WindowGrid.segments`), so that every slab of the grid is a dense batch of equal windows: no mask,
no roll, and never more scores than the windows have pairs. Axes are cut by plain reshapes: where
there are many slabs, torch.compile takes several times as long to trace einops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Segment, WindowGrid
from ..packed import unpacked

Slab = tuple[Segment, ...]  # a run of windows on each axis


def window_mean(x: Tensor, windows: WindowGrid) -> Tensor:
    f, h, w = windows.grid
    means = _by_slab(_slab_mean, (x.unflatten(1, (f, h, w)),), _runs(windows))
    return means.flatten(1, 3)


def norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    windows: WindowGrid | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """In as few passes over the tokens as torch has: one for the sum, one or two for the norm."""
    channels = x.shape[-1:]
    if y is not None:
        x = x + y if gate is None else torch.addcmul(x, gate[:, None], y)
    means = None if windows is None else window_mean(x, windows)
    if shift is None or scale is None:
        return x, F.layer_norm(x, channels, eps=eps), means
    # One sample's modulation is an affine norm; torch sums its gradients badly in 16 bits.
    if x.shape[0] == 1 and not scale.requires_grad:
        affine = (1 + scale[0]).to(x.dtype), shift[0].to(x.dtype)  # autocast lets them differ
        return x, F.layer_norm(x, channels, *affine, eps), means
    normed = F.layer_norm(x, channels, eps=eps)
    return x, torch.addcmul(shift[:, None], normed, 1 + scale[:, None]), means


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    if key_mask is None:
        return _sdpa(q, k, v, scale).contiguous()
    # What takes no part may hold anything, also NaN, which a weight of zero does not remove.
    k, v = (torch.where(key_mask[..., None, None], t, 0) for t in (k, v))
    # Softmax over nothing is NaN: a sample without a key attends to all of them, which are zero.
    has_key = key_mask.any(dim=1)[:, None]
    return _sdpa(q, k, v, scale, (key_mask | ~has_key)[:, None, None, :]).contiguous()


def window_attention(q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float) -> Tensor:
    f, h, w = windows.grid
    runs = _runs(windows)
    part = any(len(own) > 1 for own in runs)

    def attend(q: Tensor, k: Tensor, v: Tensor, slab: Slab) -> Tensor:
        (nf, pf), (nh, ph), (nw, pw) = slab
        b, heads, d = q.shape[0], q.shape[4], q.shape[5]

        def cut(t: Tensor) -> Tensor:
            t = t.reshape(b, nf, pf, nh, ph, nw, pw, heads, d).permute(0, 1, 3, 5, 2, 4, 6, 7, 8)
            t = t.reshape(b * nf * nh * nw, pf * ph * pw, heads, d)
            # A slab of one window is a view still, which would keep the whole for the backward.
            return t.contiguous() if part else t

        out = _sdpa(cut(q), cut(k), cut(v), scale)
        out = out.reshape(b, nf, nh, nw, pf, ph, pw, heads, d).permute(0, 1, 4, 2, 5, 3, 6, 7, 8)
        return out.reshape(b, nf * pf, nh * ph, nw * pw, heads, d)

    out = _by_slab(attend, tuple(t.unflatten(1, (f, h, w)) for t in (q, k, v)), runs)
    return out.flatten(1, 3).contiguous()


def packed_attention(q: Tensor, kv: Tensor | None, key_mask: Tensor | None, scale: float) -> Tensor:
    return attention(*unpacked(q, kv), key_mask, scale)


def packed_window_attention(qkv: Tensor, windows: WindowGrid, scale: float) -> Tensor:
    return window_attention(*unpacked(qkv), windows, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """(B, N, H, D) in and out, as everywhere here; torch wants heads first."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _slab_mean(x: Tensor, slab: Slab) -> Tensor:
    (nf, pf), (nh, ph), (nw, pw) = slab
    cut = x.reshape(x.shape[0], nf, pf, nh, ph, nw, pw, x.shape[4])
    exact = torch.promote_types(x.dtype, torch.float32)
    return cut.mean(dim=(2, 4, 6), dtype=exact).to(x.dtype)


def _runs(windows: WindowGrid) -> list[Slab]:
    return [windows.segments(axis) for axis in range(3)]


def _by_slab(
    apply: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    runs: Sequence[Slab],
    slab: Slab = (),
) -> Tensor:
    """Apply `apply(*tensors, slab)` to every slab of the grid (axes 1 to 3) and join the results.

    Splitting and joining an axis at a time keeps the backward at one pass per axis; slicing each
    slab out of the whole would give every one a full-size gradient of zeros.
    """
    axis = len(slab)
    if axis == 3:
        return apply(*tensors, slab)
    own = runs[axis]
    if len(own) == 1:
        return _by_slab(apply, tensors, runs, (*slab, own[0]))
    lengths = [run.length for run in own]
    pieces = zip(*(t.split(lengths, dim=axis + 1) for t in tensors), strict=True)
    results = [
        _by_slab(apply, piece, runs, (*slab, run)) for piece, run in zip(pieces, own, strict=True)
    ]
    return torch.cat(results, dim=axis + 1)
