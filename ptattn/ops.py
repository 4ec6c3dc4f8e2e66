"""The public differentiable operations: what they compute, checked inputs, dispatch. No math.

Shapes: B batch, N = f·h·w tokens in raster order, M keys or proxies, C channels, H heads, D head
dim. Inputs may have any strides; outputs are contiguous and of the input dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor

from . import backends, checks
from .backends import Backend
from .context import autocast_dtype, transformed
from .geometry import NO_SHIFT, WindowGrid, window_grid
from .memo import Memo


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

    Example:
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
    if not eps > 0:
        raise ValueError(f"eps must be positive; got {eps!r}")
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
        key_mask: (B, M) bool, True where a key may be attended to. A sample with no such key gives
            zeros, and zero gradients.
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


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that `auto` takes, and why each other one cannot run.

    `kept` is why dense attention is kept from torch's SDPA, where the kernels can run.
    """

    op: str
    backend: str
    reasons: dict[str, tuple[str, ...]]
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: auto takes {self.backend}"]
        for name, reasons in self.reasons.items():
            text = "; ".join(reasons) or "can run"
            if name == "sdpa" and self.kept:
                text += ", but is not taken: " + "; ".join(self.kept)
            lines.append(f"  {name}: {text}")
        return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `auto` takes for a call, and each reason why another cannot run.

    Args:
        op: the name of an operation, such as "window_attention".
        *args, **kwargs: what the operation would be called with, but for a backend.

    Example:
        >>> print(explain("window_mean", torch.randn(1, 64, 32), (8, 8), (4, 4)))
        window_mean: auto takes sdpa
          reference: can run
          sdpa: can run
          triton: on the CPU the kernels run under TRITON_INTERPRET=1 only
    """
    if op not in _OPS:
        raise ValueError(f"op must be one of {', '.join(_OPS)}; got {op!r}")
    given = inspect.signature(_OPS[op]).bind_partial(*args, **kwargs).arguments
    tensors = [a for a in given.values() if isinstance(a, Tensor)]
    geometry = [given[name] for name in ("grid", "window", "shift") if name in given]
    windows = window_grid(*geometry) if geometry else None
    reasons = {
        name: tuple(backends.reasons_against(name, *tensors, windows=windows))
        for name in backends.BACKENDS
    }
    backend = backends.resolve("auto", *tensors, windows=windows)
    if op != "attention" or backend != "triton":
        return Explanation(op, backend, reasons)
    q, k, v = tensors[:3]
    kept = backends.against_sdpa(q, k, v, given.get("key_mask"), given.get("scale") or 1.0)
    return Explanation(op, "triton" if kept else "sdpa", reasons, tuple(kept))


_OPS = {
    function.__name__: function
    for function in (
        window_mean,
        layer_norm,
        residual_layer_norm,
        layer_norm_window_mean,
        residual_layer_norm_window_mean,
        attention,
        window_attention,
    )
}


def _unshifted(grid: Sequence[int] | WindowGrid, window: Sequence[int] | None = None) -> WindowGrid:
    windows = window_grid(grid, window)
    if any(windows.shift):
        raise ValueError(f"means are over windows without a shift; got shift {windows.shift}")
    return windows


# What a call depends on of its tensors, until they are at work.
_facts = attrgetter("__class__", "shape", "dtype", "device")
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
    inputs = [t for t in tensors if t is not None and t.is_floating_point()]
    backend = backends.resolve(name, *inputs, windows=windows)
    of_two = name == "auto" and backend == "triton" and check is checks.attention
    if of_two and not backends.unmeasured(*tensors):
        return cast(Backend, backends.AutoDense)
    return backends.load(backend)


def _number(scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None; got {scale!r}")
    return float(scale)
