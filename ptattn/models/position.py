"""The fixed sin-cos embedding of token positions; its axes are kept from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..geometry import Triple

# Axes that were asked for, by what they depend on. None is ever dropped, as a captured CUDA graph
# may read it; past so many, others are made anew in every call.
_kept: dict[tuple[Any, ...], Tensor] = {}
_MOST_KEPT = 1024


def position_embedding(
    grid: Triple, like: Tensor, scale: float = 1, box: Sequence[range] | None = None
) -> Tensor:
    """Fixed 3-D sin-cos embedding (N, D) of a token grid, with the dtype and device of `like`; of
    the positions in a box of it, where one is given.

    Channels [0, D/4) encode the frame, [D/4, 5D/8) the column, [5D/8, D) the row, each as [sin,
    cos] of position · 10000^(-i / (n/2)); rows and columns are divided by `scale`.
    """
    dim = like.shape[-1]
    frame, side = dim // 4, 3 * dim // 8
    frames = _axis(grid[0], frame, 1, like)
    rows, columns = (_axis(length, side, scale, like) for length in grid[1:])
    if box is not None:
        frames, rows, columns = (
            axis[own.start : own.stop]
            for axis, own in zip((frames, rows, columns), box, strict=True)
        )
    f, h, w = map(len, (frames, rows, columns))
    parts = (
        frames[:, None, None].expand(f, h, w, frame),
        columns[None, None].expand(f, h, w, side),
        rows[None, :, None].expand(f, h, w, side),
    )
    return torch.cat(parts, dim=-1).flatten(0, 2)


def _axis(length: int, channels: int, scale: float, like: Tensor) -> Tensor:
    """One axis, (length, channels)."""
    # What is traced or watched makes its own: its tensors may be fake, its sizes symbolic.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _made(length, channels, scale, like)
    key = length, channels, scale, like.dtype, like.device
    found = _kept.get(key)
    if found is not None:
        return found
    with torch.inference_mode(False):  # a kept inference tensor would be refused in training
        found = _made(length, channels, scale, like)
    if len(_kept) < _MOST_KEPT and _lasts(found):
        _kept[key] = found
    return found


def _lasts(axis: Tensor) -> bool:
    """Whether others may read it: it is of numbers, and written once they do."""
    if axis.device.type == "meta" or torch._C._functorch.is_functorch_wrapped_tensor(axis):
        return False
    if axis.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return False  # it is the graph's memory, written by its replays
        torch.cuda.current_stream(axis.device).synchronize()  # before other streams read it
    return True


def _made(length: int, channels: int, scale: float, like: Tensor) -> Tensor:
    # float64 keeps the angles of far positions exact; MPS has none.
    exact = torch.float32 if like.device.type == "mps" else torch.float64
    steps = torch.arange(channels // 2, device=like.device, dtype=exact) / (channels // 2)
    position = torch.arange(length, device=like.device, dtype=exact) / scale
    angle = position[:, None] * 10000.0**-steps
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(like.dtype)
