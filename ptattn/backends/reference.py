"""The specification: the operations in plain math, slow and exact, for any float dtype.

Everything is computed in at least float32 (in float64 for float64 inputs) with autocast off, and
rounded once at the end. All other backends are tested against these functions in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import WindowGrid
from ..packed import unpacked


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def window_mean(x: Tensor, windows: WindowGrid) -> Tensor:
    """proxy[w] = mean of the tokens that window w holds."""
    with torch.autocast(x.device.type, enabled=False):
        ids = windows.window_ids(x.device)
        sums = _exact(x).new_zeros(x.shape[0], windows.num_windows, x.shape[2])
        sums = sums.index_add(1, ids, _exact(x))
        counts = torch.bincount(ids, minlength=windows.num_windows)
        return (sums / counts[:, None]).to(x.dtype)


def norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    windows: WindowGrid | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """total = x + gate · y, LayerNorm(total) · (1 + scale) + shift, and total's window means.

    The vectors are (B, C); what is None is left out.
    """
    with torch.autocast(x.device.type, enabled=False):
        total = x
        if y is not None:
            update = _exact(y) if gate is None else _exact(y) * _exact(gate)[:, None]
            total = (_exact(x) + update).to(torch.promote_types(x.dtype, y.dtype))
        normed = F.layer_norm(_exact(total), x.shape[-1:], eps=eps)
        if shift is not None and scale is not None:
            normed = normed * (1 + _exact(scale)[:, None]) + _exact(shift)[:, None]
    means = None if windows is None else window_mean(total, windows)
    return total, normed.to(total.dtype), means


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys where `key_mask` is True; zeros where there is none."""
    if key_mask is not None:  # what takes no part may hold anything: a weight of zero keeps NaN
        k, v = (torch.where(key_mask[..., None, None], t, 0) for t in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bnhd,bmhd->bhnm", _exact(q), _exact(k)) * scale
        if key_mask is None:
            weights = scores.softmax(-1)
        else:
            absent = ~key_mask[:, None, None, :]
            # The lowest finite number, not -inf: a row without a key must give zeros, and -inf
            # gives NaN.
            weights = scores.masked_fill(absent, torch.finfo(scores.dtype).min).softmax(-1)
            weights = weights.masked_fill(absent, 0)
        return torch.einsum("bhnm,bmhd->bnhd", weights, _exact(v)).to(q.dtype).contiguous()


def window_attention(q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float) -> Tensor:
    """`attention` inside each window, one window after the other."""
    ids = windows.window_ids(q.device)
    members = [(ids == w).nonzero()[:, 0] for w in range(windows.num_windows)]
    outs = [attention(q[:, m], k[:, m], v[:, m], None, scale) for m in members]
    order = torch.cat(members).argsort()
    return torch.cat(outs, dim=1)[:, order]


def packed_attention(q: Tensor, kv: Tensor | None, key_mask: Tensor | None, scale: float) -> Tensor:
    return attention(*unpacked(q, kv), key_mask, scale)


def packed_window_attention(qkv: Tensor, windows: WindowGrid, scale: float) -> Tensor:
    return window_attention(*unpacked(qkv), windows, scale)
