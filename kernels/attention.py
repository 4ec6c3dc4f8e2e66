"""Which kernels attend: all keys on chip where they are few, else in a loop over blocks of keys.

q, k and v are as they came: three tensors; q, packed k and v, and None; or packed q, k and v, and
None twice. So are their gradients, of which the kernels write slices.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from ..geometry import WindowGrid
from ..packed import unpacked
from . import few_keys, flash, flash_backward, host, window
from .host import Gradients, Need

# A window of more tokens, or an attention to more keys, loops over its keys.
SHARED_TILE, FEW_KEYS = 64, 128


def loops_over_window(sizes: Sequence[int]) -> bool:
    """By the window as given, whatever the grid, so that torch.compile need not know the grid."""
    return math.prod(sizes) > SHARED_TILE


def dense(
    q: Tensor, k: Tensor | None, v: Tensor | None, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """(B, N, H, D) and, where the backward needs it, the log-sum-exp (B, H, N) in base 2."""
    if k is None or v is None:
        q, k, v = unpacked(q, k)
    if k.shape[1] > FEW_KEYS:
        return flash.forward(q, k, v, key_mask, scale, None)
    return few_keys.forward(q, k, v, key_mask, scale), None


def dense_backward(
    q: Tensor, k: Tensor | None, v: Tensor | None, key_mask: Tensor | None, scale: float,
    out: Tensor | None, lse: Tensor | None, g: Tensor, need: Need,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of q, k and v as they came; None where `need` says that one is not."""
    gradients, into = _memory((q, k, v), need)
    if k is None or v is None:
        q, k, v = unpacked(q, k)
    if out is None or lse is None:
        few_keys.backward(q, k, v, key_mask, scale, g, into)
    else:
        flash_backward.backward(q, k, v, key_mask, scale, None, out, lse, g, into)
    return gradients


def windowed(
    q: Tensor, k: Tensor | None, v: Tensor | None, windows: WindowGrid, scale: float
) -> tuple[Tensor, Tensor | None]:
    """As `dense`, within windows."""
    if k is None or v is None:
        q, k, v = unpacked(q, k)
    if loops_over_window(windows.window):
        return flash.forward(q, k, v, None, scale, windows)
    return window.forward(q, k, v, windows, scale), None


def windowed_backward(
    q: Tensor, k: Tensor | None, v: Tensor | None, windows: WindowGrid, scale: float,
    out: Tensor | None, lse: Tensor | None, g: Tensor, need: Need,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As `dense_backward`, within windows."""
    gradients, into = _memory((q, k, v), need)
    if k is None or v is None:
        q, k, v = unpacked(q, k)
    if out is None or lse is None:
        window.backward(q, k, v, windows, scale, g, into)
    else:
        flash_backward.backward(q, k, v, None, scale, windows, out, lse, g, into)
    return gradients


def _memory(
    given: tuple[Tensor | None, ...], need: Need
) -> tuple[tuple[Tensor | None, ...], Gradients]:
    """For the gradients of what was given, and its slices, which the kernels write."""
    q, k, v = made = tuple(
        [
            host.empty(t, *t.shape) if needed and t is not None else None
            for t, needed in zip(given, need, strict=True)
        ]
    )
    if q is not None and given[1] is None:
        q, k, v = q.unbind(2)
    elif k is not None and given[2] is None:
        k, v = k.unbind(2)
    return made, Gradients(q, k, v, packed=given[2] is None)
