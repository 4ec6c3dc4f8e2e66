"""The specification: the three operations in plain math, slow and exact, for any float dtype.

Everything is computed in at least float32 (in float64 for float64 inputs) with autocast off, and
rounded once at the end. All other backends are tested against these functions in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import WindowGrid


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


def layer_norm_window_mean(x: Tensor, windows: WindowGrid, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm of every token, and the means of the tokens as they were."""
    with torch.autocast(x.device.type, enabled=False):
        normed = F.layer_norm(_exact(x), x.shape[-1:], eps=eps).to(x.dtype)
    return normed, window_mean(x, windows)


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys where `key_mask` is True; zeros where there is none."""
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
        return torch.einsum("bhnm,bmhd->bnhd", weights, _exact(v)).to(q.dtype)


def window_attention(q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float) -> Tensor:
    """`attention` inside each window, one window after the other."""
    ids = windows.window_ids(q.device)
    members = [(ids == w).nonzero()[:, 0] for w in range(windows.num_windows)]
    outs = [attention(q[:, m], k[:, m], v[:, m], None, scale) for m in members]
    order = torch.cat(members).argsort()
    return torch.cat(outs, dim=1)[:, order]
