"""Which kernels attend: all keys on chip where they are few, else in a loop over blocks of keys."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..geometry import WindowGrid
from . import few_keys, flash, flash_backward, window
from .host import Need

# A window of more tokens, or an attention to more keys, loops over its keys.
SHARED_TILE, FEW_KEYS = 64, 128


def loops_over_window(sizes: Sequence[int]) -> bool:
    """By the window as given, whatever the grid, so that torch.compile need not know the grid."""
    return math.prod(sizes) > SHARED_TILE


def dense(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """(B, N, H, D) and, where the backward needs it, the log-sum-exp (B, H, N) in base 2."""
    if k.shape[1] > FEW_KEYS:
        return flash.forward(q, k, v, key_mask, scale, None)
    return few_keys.forward(q, k, v, key_mask, scale), None


def dense_backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float,
    out: Tensor | None, lse: Tensor | None, g: Tensor, need: Need,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv; None where `need` says that one is not."""
    if out is None or lse is None:
        return few_keys.backward(q, k, v, key_mask, scale, g, need)
    return flash_backward.backward(q, k, v, key_mask, scale, None, out, lse, g, need)


def windowed(
    q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float
) -> tuple[Tensor, Tensor | None]:
    """As `dense`, within windows."""
    if loops_over_window(windows.window):
        return flash.forward(q, k, v, None, scale, windows)
    return window.forward(q, k, v, windows, scale), None


def windowed_backward(
    q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float,
    out: Tensor | None, lse: Tensor | None, g: Tensor, need: Need,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As `dense_backward`, within windows."""
    if out is None or lse is None:
        return window.backward(q, k, v, windows, scale, g, need)
    return flash_backward.backward(q, k, v, None, scale, windows, out, lse, g, need)
