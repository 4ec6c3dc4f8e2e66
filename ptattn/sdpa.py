"""The portable fast backend: torch's scaled_dot_product_attention, on any device it runs on.

Each axis of the grid is split into first / interior / last runs of equal windows
(`WindowGrid.segments`), so that every slab of the grid is a dense batch of equal windows: no mask,
no roll, and never more scores than the windows have pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .geometry import Segment, WindowGrid


def window_mean(x: Tensor, windows: WindowGrid) -> Tensor:
    f, h, w = windows.grid
    means = _by_slab(_slab_mean, (x.unflatten(1, (f, h, w)),), windows)
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
    if x.shape[0] == 1 and not (torch.is_grad_enabled() and scale.requires_grad):
        return x, F.layer_norm(x, channels, 1 + scale[0], shift[0], eps), means
    normed = F.layer_norm(x, channels, eps=eps)
    return x, torch.addcmul(shift[:, None], normed, 1 + scale[:, None]), means


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    if key_mask is None:
        return _sdpa(q, k, v, scale)
    # Softmax over nothing is NaN: a sample without a key attends to all of them, made zero.
    has_key = key_mask.any(dim=1)[:, None]
    k, v = (torch.where(has_key[..., None, None], t, 0) for t in (k, v))
    return _sdpa(q, k, v, scale, (key_mask | ~has_key)[:, None, None, :])


def window_attention(q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float) -> Tensor:
    f, h, w = windows.grid

    def attend(q: Tensor, k: Tensor, v: Tensor, slab: tuple[Segment, ...]) -> Tensor:
        (nf, pf), (nh, ph), (nw, pw) = ((run.count, run.size) for run in slab)
        cut = "b (nf pf) (nh ph) (nw pw) h d -> (b nf nh nw) (pf ph pw) h d"
        sizes = dict(nf=nf, pf=pf, nh=nh, ph=ph, nw=nw, pw=pw)
        part = q.shape[1:4] != windows.grid
        q, k, v = (rearrange(t, cut, **sizes) for t in (q, k, v))
        if (
            part
        ):  # a slab of one window is a view still, which would keep the whole for the backward
            q, k, v = (t.contiguous() for t in (q, k, v))
        out = _sdpa(q, k, v, scale)
        join = "(b nf nh nw) (pf ph pw) h d -> b (nf pf) (nh ph) (nw pw) h d"
        return rearrange(out, join, **sizes)

    out = _by_slab(attend, tuple(t.unflatten(1, (f, h, w)) for t in (q, k, v)), windows)
    return out.flatten(1, 3)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """(B, N, H, D) in and out, as everywhere here; torch wants heads first."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _slab_mean(x: Tensor, slab: tuple[Segment, ...]) -> Tensor:
    pf, ph, pw = (run.size for run in slab)
    cut = rearrange(x, "b (nf pf) (nh ph) (nw pw) c -> b nf pf nh ph nw pw c", pf=pf, ph=ph, pw=pw)
    exact = torch.promote_types(x.dtype, torch.float32)
    return cut.mean(dim=(2, 4, 6), dtype=exact).to(x.dtype)


def _by_slab(
    apply: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    windows: WindowGrid,
    slab: tuple[Segment, ...] = (),
) -> Tensor:
    """Apply `apply(*tensors, slab)` to every slab of the grid (axes 1 to 3) and join the results.

    Splitting and joining an axis at a time keeps the backward at one pass per axis; slicing each
    slab out of the whole would give every one a full-size gradient of zeros.
    """
    axis = len(slab)
    if axis == 3:
        return apply(*tensors, slab)
    runs = windows.segments(axis)
    if len(runs) == 1:
        return _by_slab(apply, tensors, windows, (*slab, runs[0]))
    lengths = [run.length for run in runs]
    pieces = zip(*(t.split(lengths, dim=axis + 1) for t in tensors), strict=True)
    results = [
        _by_slab(apply, piece, windows, (*slab, run))
        for piece, run in zip(pieces, runs, strict=True)
    ]
    return torch.cat(results, dim=axis + 1)
