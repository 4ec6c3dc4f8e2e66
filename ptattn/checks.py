"""What the operations ask of their inputs: one check for each, whose errors name the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .context import autocast_dtype
from .geometry import WindowGrid
from .packed import unpacked

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def window_mean(windows: WindowGrid, x: Tensor) -> None:
    _tensors(3, "(B, N, C)", x=x)
    _tokens(windows, x=x)


def attention(_: None, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    _tensors(4, "(B, N, H, D)", q=q, k=k, v=v)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape; got {tuple(k.shape)} and {tuple(v.shape)}")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q (B, N, H, D) and k (B, M, H, D) must agree in B, H and D; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if key_mask is not None:
        _key_mask(key_mask, k)


def window_attention(windows: WindowGrid, q: Tensor, k: Tensor, v: Tensor) -> None:
    _tensors(4, "(B, N, H, D)", q=q, k=k, v=v)
    if not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k and v must have one shape (B, N, H, D); got {shapes}")
    _tokens(windows, q=q)


def packed_attention(_: None, q: Tensor, kv: Tensor | None, key_mask: Tensor | None) -> None:
    if kv is None:
        _packed(3, q=q)
    else:
        _tensors(4, "(B, N, H, D)", q=q)
        _packed(2, kv=kv)
    attention(None, *unpacked(q, kv), key_mask)


def packed_window_attention(windows: WindowGrid, qkv: Tensor) -> None:
    _packed(3, qkv=qkv)
    window_attention(windows, *unpacked(qkv))


def _packed(count: int, **tensor: Tensor) -> None:
    shape = f"(B, N, {count}, H, D)"
    _tensors(5, shape, **tensor)
    for name, t in tensor.items():
        if t.shape[2] != count:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(t.shape)}")


def _tensors(ndim: int, shape: str, **tensors: Tensor) -> None:
    _shapes(ndim, shape, **tensors)
    _same(("dtype", "device"), **tensors)


def _shapes(ndim: int, shape: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor of shape {shape}; got {type(t).__name__}")
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {t.dtype}")
        if t.ndim != ndim:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(t.shape)}")
        if 0 in t.shape[1:]:
            raise ValueError(f"{name} may be empty in its batch only; got {tuple(t.shape)}")


def _same(attributes: Sequence[str], **tensors: Tensor) -> None:
    for what in attributes:
        if len({getattr(t, what) for t in tensors.values()}) > 1:
            got = ", ".join(f"{name} {getattr(t, what)}" for name, t in tensors.items())
            raise ValueError(f"{', '.join(tensors)} must have one {what}; got {got}")


def norm(
    windows: WindowGrid | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
) -> None:
    """Under autocast the dtypes may differ."""
    tokens = dict(x=x) if y is None else dict(x=x, y=y)
    vectors = dict(gate=gate, shift=shift, scale=scale)
    given = {name: t for name, t in vectors.items() if t is not None}
    _shapes(3, "(B, N, C)", **tokens)
    _shapes(2, "(B, C)", **given)
    if y is not None and y.shape != x.shape:
        raise ValueError(
            f"x and y must have one shape (B, N, C); got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    expected = (x.shape[0], x.shape[2])
    for name, t in given.items():
        if t.shape != expected:
            raise ValueError(f"{name} must have shape (B, C) = {expected}; got {tuple(t.shape)}")
    if ("shift" in given) != ("scale" in given):
        raise ValueError(f"shift and scale come together; got {', '.join(given)} only")
    _same(("device",), **tokens, **given)
    if autocast_dtype(x) is None:
        _same(("dtype",), **tokens, **given)
    if windows is not None:
        _tokens(windows, x=x)


def _tokens(windows: WindowGrid, **tensor: Tensor) -> None:
    ((name, t),) = tensor.items()
    if t.shape[1] != windows.num_tokens:
        raise ValueError(
            f"{name} has {t.shape[1]} tokens, but grid {windows.grid} has {windows.num_tokens}"
        )


def _key_mask(key_mask: Tensor, k: Tensor) -> None:
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be a bool tensor (B, M), True = attend; got {got}")
    if key_mask.shape != k.shape[:2]:
        raise ValueError(
            f"key_mask must have shape (B, M) = {tuple(k.shape[:2])}; got {tuple(key_mask.shape)}"
        )
    if key_mask.device != k.device:
        raise ValueError(f"key_mask must be on {k.device}, where k is; got {key_mask.device}")
