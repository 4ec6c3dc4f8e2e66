"""Packed projections: queries, keys and values as slices of what one linear layer gives.

A packed tensor is (B, N, k, H, D), k slices (B, N, H, D): keys and values, or queries too.
"""

from __future__ import annotations

from torch import Tensor


def num_slices(t: Tensor | None) -> int:
    """How many slices a tensor has: one where it is not packed, none where there is none."""
    return 0 if t is None else t.shape[2] if t.ndim == 5 else 1


def unpacked(*tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The slices of all, views: q, k and v of themselves, of q and kv, or of qkv."""
    found: list[Tensor] = []
    for t in tensors:
        if t is not None:
            found += t.unbind(2) if t.ndim == 5 else (t,)
    return tuple(found)  # type: ignore[return-value]
