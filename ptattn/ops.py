"""The public differentiable operations: what they compute, checked inputs, dispatch. No math.

Shapes: B batch, N = f·h·w tokens in raster order, M keys or proxies, C channels, H heads, D head
dim. Inputs may have any strides; outputs are contiguous and of the input dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor

from . import backends, checks
from .backends import Backend
from .context import autocast_dtype, transformed
from .geometry import NO_SHIFT, WindowGrid, window_grid
from .memo import Memo
from .packed import unpacked


def window_mean(
    x: Tensor,
    grid: Sequence[int] | WindowGrid,
    window: Sequence[int] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Average every window of tokens into one proxy token.

    proxy[w] = mean of the tokens in window w, over the tokens it really holds: windows at the far
    edge of an axis that the window does not divide are smaller. Source: arXiv 2409.04005.

    Args:
        x: (B, N, C) tokens in raster order, float16, bfloat16, float32 or float64.
        grid: (f, h, w) or (h, w), with f·h·w = N; or a WindowGrid without shift, in place of grid
            and window.
        window: (pf, ph, pw) or (ph, pw).
        backend: "auto", "reference", "sdpa" or "triton".

    Returns:
        (B, M, C), M = ⌈f/pf⌉·⌈h/ph⌉·⌈w/pw⌉ proxies in raster order.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was expected.
        RuntimeError: the named backend cannot run here.

    Examples:
        >>> x = torch.randn(2, 64, 32)  # 8 x 8 tokens
        >>> window_mean(x, grid=(8, 8), window=(4, 4)).shape
        torch.Size([2, 4, 32])
    """
    windows = _unshifted(grid, window)
    return _backend(backend, checks.window_mean, windows, x).window_mean(x, windows)


def layer_norm(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Adaptive layer norm, LayerNorm(x) · (1 + scale) + shift, in one pass (arXiv 2212.09748).

    The norm has no affine parameters.

    Args:
        x: (B, N, C) tokens, float16, bfloat16, float32 or float64.
        shift, scale: (B, C), one vector per sample; both or neither.
        eps: added to the variance, positive.
        backend: "auto", "reference", "sdpa" or "triton".

    Returns:
        (B, N, C).

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was expected.
        RuntimeError: the named backend cannot run here.
    """
    return _norm(x, None, None, shift, scale, None, eps, backend)[1]


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual x + gate · y and its `layer_norm`, in one pass.

    Args:
        x, y: (B, N, C) tokens and what is added to them.
        gate: (B, C), one vector per sample; None for 1.
        shift, scale, eps, backend: as in `layer_norm`.

    Returns:
        x + gate · y and its modulated norm, both (B, N, C).

    Raises:
        TypeError, ValueError, RuntimeError: as `layer_norm`.
    """
    return _norm(x, y, gate, shift, scale, None, eps, backend)[:2]


def layer_norm_window_mean(
    x: Tensor,
    grid: Sequence[int] | WindowGrid,
    window: Sequence[int] | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """LayerNorm of every token, and `window_mean` of the tokens as they were, by one read of them.

    These are the queries and the proxies of the global information interaction module (arXiv
    2409.04005), before their projections.

    Args:
        x, grid, window: as in `window_mean`.
        eps, backend: as in `layer_norm`.

    Returns:
        The normed tokens (B, N, C) and the proxies (B, M, C) in raster order.

    Raises:
        TypeError, ValueError, RuntimeError: as `window_mean`.
    """
    return _norm(x, None, None, None, None, _unshifted(grid, window), eps, backend)[1:]


def residual_layer_norm_window_mean(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    grid: Sequence[int] | WindowGrid,
    window: Sequence[int] | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual x + gate · y, then its `layer_norm_window_mean`, in one pass.

    Args:
        x, y, gate: as in `residual_layer_norm`.
        grid, window: as in `window_mean`.
        eps, backend: as in `layer_norm`.

    Returns:
        x + gate · y and its norm (B, N, C), and the proxies (B, M, C).

    Raises:
        TypeError, ValueError, RuntimeError: as `window_mean`.
    """
    return _norm(x, y, gate, None, None, _unshifted(grid, window), eps, backend)


def _norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    windows: WindowGrid | None,
    eps: float,
    backend: str,
) -> tuple[Any, Any, Any]:
    run = _backend(backend, checks.norm, windows, x, y, gate, shift, scale).norm
    eps = float(eps)
    if not eps >= _LEAST_EPS:
        raise ValueError(f"eps must be positive, {_LEAST_EPS:.2g} at least; got {eps!r}")
    return run(x, y, gate, shift, scale, windows, eps)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dense attention, softmax(scale · q kᵀ) v, for self- and cross-attention.

    Args:
        q: (B, N, H, D) queries.
        k, v: (B, M, H, D) keys and values.
        key_mask: (B, M) bool, True where a key may be attended to. Other keys and their values
            take no part whatever they hold, NaN too, and get zero gradients. A sample with no key
            that may be attended to gives zeros, and zero gradients.
        scale: factor on the scores; D^-0.5 by default.
        backend: "auto", "reference", "sdpa" or "triton".

    Returns:
        (B, N, H, D), contiguous.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was expected.
        RuntimeError: the named backend cannot run here.
    """
    run = _backend(backend, checks.attention, None, q, k, v, key_mask).attention
    return run(q, k, v, key_mask, q.shape[-1] ** -0.5 if scale is None else _number(scale))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int] | WindowGrid,
    window: Sequence[int] | None = None,
    shift: Sequence[int] = NO_SHIFT,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside each window of the grid; with a shift, Swin's shifted-window attention.

    Every axis is cut at 0, s, s + p, s + 2p, ..., L; tokens attend to the tokens of their own
    piece. This equals rolling by -s, masking between the regions that a wrapped window joins, and
    rolling back.

    Args:
        q, k, v: (B, N, H, D) tokens in raster order.
        grid: (f, h, w) or (h, w), with f·h·w = N; or a WindowGrid, in place of all three.
        window: (pf, ph, pw) or (ph, pw).
        shift: (sf, sh, sw) or (sh, sw), each in [0, window); none by default.
        scale: factor on the scores; D^-0.5 by default.
        backend: "auto", "reference", "sdpa" or "triton".

    Returns:
        (B, N, H, D), contiguous.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was expected.
        RuntimeError: the named backend cannot run here.
    """
    windows = window_grid(grid, window, shift)
    run = _backend(backend, checks.window_attention, windows, q, k, v).window_attention
    return run(q, k, v, windows, q.shape[-1] ** -0.5 if scale is None else _number(scale))


def packed_attention(
    q: Tensor,
    kv: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`attention` of packed projections, whose gradient the kernels write as one.

    The same as of their slices, where torch has to stack the gradients of q, k and v.

    Args:
        q: (B, N, 3, H, D) queries, keys and values; or with kv (B, N, H, D) queries.
        kv: (B, M, 2, H, D) keys and values.
        key_mask, scale, backend: as in `attention`.

    Returns:
        (B, N, H, D), contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as `attention`.
    """
    run = _backend(backend, checks.packed_attention, None, q, kv, key_mask).packed_attention
    return run(q, kv, key_mask, q.shape[-1] ** -0.5 if scale is None else _number(scale))


def packed_window_attention(
    qkv: Tensor,
    grid: Sequence[int] | WindowGrid,
    window: Sequence[int] | None = None,
    shift: Sequence[int] = NO_SHIFT,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`window_attention` of a packed projection, as `packed_attention`.

    Args:
        qkv: (B, N, 3, H, D) queries, keys and values of tokens in raster order.
        grid, window, shift, scale, backend: as in `window_attention`.

    Returns:
        (B, N, H, D), contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as `window_attention`.
    """
    windows = window_grid(grid, window, shift)
    run = _backend(backend, checks.packed_window_attention, windows, qkv).packed_window_attention
    return run(qkv, windows, qkv.shape[-1] ** -0.5 if scale is None else _number(scale))


def _unshifted(grid: Sequence[int] | WindowGrid, window: Sequence[int] | None = None) -> WindowGrid:
    windows = window_grid(grid, window)
    if any(windows.shift):
        raise ValueError(f"means are over windows without a shift; got shift {windows.shift}")
    return windows


_LEAST_EPS = torch.finfo(torch.float32).tiny  # kernels compute in float32
# What a call depends on of its tensors, until they are at work.
_facts = attrgetter("__class__", "shape", "dtype", "device")
_DENSE = checks.attention, checks.packed_attention
# The backend of each call that has passed its check, by all that the check and the choice look at.
_known: Memo[Backend] = Memo()


def _backend(
    name: str,
    check: Callable[..., None],
    windows: WindowGrid | None,
    x: Tensor,
    *others: Tensor | None,
) -> Backend:
    """The backend that runs a call, once its inputs have passed `check`; both are paid for once."""
    if torch.compiler.is_compiling() or transformed():
        return _settle(name, check, windows, x, *others)
    try:
        own = [None if t is None else _facts(t) for t in others]
        key = (name, check, windows, autocast_dtype(x), _facts(x), *own)
        found = _known.get(key)
    except (AttributeError, TypeError):  # no tensor, or symbolic sizes, which cannot be looked up
        return _settle(name, check, windows, x, *others)
    return found or _known.keep(key, _settle(name, check, windows, x, *others))


def _settle(
    name: str, check: Callable[..., None], windows: WindowGrid | None, *tensors: Any
) -> Backend:
    check(windows, *tensors)
    floating = [t for t in tensors if t is not None and t.is_floating_point()]
    inputs = unpacked(*floating)
    backend = backends.resolve(name, *inputs, windows=windows)
    if name == "auto" and backend == "triton" and check in _DENSE:
        *_, key_mask = tensors
        if not backends.unmeasured(*inputs, key_mask):
            return cast(Backend, backends.AutoDense)
    return backends.load(backend)


def _number(scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None; got {scale!r}")
    return float(scale)
