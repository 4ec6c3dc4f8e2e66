"""The triton backend: the kernels as differentiable operations.

For the backward, attention keeps q, k and v, packed or not as they came, and where the kernel loops
over its keys the output and its log-sum-exp; a window mean keeps nothing, LayerNorm its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..context import autocast_dtype
from ..geometry import WindowGrid
from ..kernels import attention as attention_kernels
from ..kernels import configs, host
from ..kernels import norm as norm_kernels
from ..kernels import pool as pool_kernels
from ..kernels.host import Need
from ..packed import num_slices, unpacked
from .operator import Differentiable, Operator

INTERPRETED, TRITON, MAX_WINDOW = host.INTERPRETED, host.TRITON, host.MAX_WINDOW

_Ints = Sequence[int]


@torch.compiler.assume_constant_result
def faster_dense(device: torch.device) -> tuple[configs.Faster, ...]:
    """What kernels of torch's were measured to do faster than ours on this GPU."""
    return configs.faster(host.arch_of(device))


# What ops.py calls.


def window_mean(x: Tensor, windows: WindowGrid) -> Tensor:
    return _window_mean(x, windows)


def norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    windows: WindowGrid | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Under autocast the sum is of the widest dtype, as torch's; the norm, which linear layers
    take, is of autocast's."""
    total, normed, means = _norm(x, y, gate, shift, scale, windows, eps, _dtype(x))
    return x if y is None else total, normed, means


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """Under autocast in its dtype, as torch's own."""
    dtype = _dtype(q)
    if dtype != q.dtype:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return _attention(q, k, v, key_mask, scale)[0]


def window_attention(q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float) -> Tensor:
    """As `attention`."""
    dtype = _dtype(q)
    if dtype != q.dtype:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return _window_attention(q, k, v, windows, scale)[0]


def packed_attention(q: Tensor, kv: Tensor | None, key_mask: Tensor | None, scale: float) -> Tensor:
    """As `attention`."""
    dtype = _dtype(q)
    if dtype != q.dtype:
        q, kv = q.to(dtype), None if kv is None else kv.to(dtype)
    return _attention(q, kv, None, key_mask, scale)[0]


def packed_window_attention(qkv: Tensor, windows: WindowGrid, scale: float) -> Tensor:
    """As `attention`."""
    dtype = _dtype(qkv)
    qkv = qkv if dtype == qkv.dtype else qkv.to(dtype)
    return _window_attention(qkv, None, None, windows, scale)[0]


def _dtype(x: Tensor) -> torch.dtype:
    """That of x, or of autocast; float64 stays."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x) or x.dtype


# Attention, of q, k and v as they came, packed or not: see `kernels.attention`.


class _Attention(Differentiable):
    """The registered operators take three tensors, as their outputs may not share memory."""

    def _dispatch(self, *args: Any) -> Any:
        return super()._dispatch(*unpacked(*args[:3]), *args[3:])

    def _dispatch_backward(self, *args: Any) -> Any:
        given, rest = args[:3], args[3:-1]
        pairs = list(zip(given, args[-1], strict=True))
        need = [needed for t, needed in pairs for _ in range(num_slices(t))]
        found = iter(super()._dispatch_backward(*unpacked(*given), *rest, need))
        slices = [[next(found) for _ in range(num_slices(t))] for t in given]
        return tuple(
            [
                None if not needed else own[0] if t.ndim == 4 else torch.stack(own, 2)
                for (t, needed), own in zip(pairs, slices, strict=True)
            ]
        )


def _lse(q: Tensor, looped: bool) -> Tensor | None:
    b, n, h, _ = q.shape
    return q.new_empty((b, h, n), dtype=host.accumulator(q.dtype)) if looped else None


def _fake_attention(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:
    return q.new_empty(q.shape), _lse(q, k.shape[1] > attention_kernels.FEW_KEYS)


def _fake_window_attention(
    q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float
) -> tuple[Tensor, Tensor | None]:
    return q.new_empty(q.shape), _lse(q, attention_kernels.loops_over_window(windows.window))


def _fake_gradients(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    pairs = zip((q, k, v), rest[-1], strict=True)
    return tuple([t.new_empty(t.shape) if needed else None for t, needed in pairs])


def _attention_backward(
    q: Tensor, k: Tensor | None, v: Tensor | None, key_mask: Tensor | None, out: Tensor | None,
    lse: Tensor | None, grad: Tensor, scale: float, need: Need,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return attention_kernels.dense_backward(q, k, v, key_mask, scale, out, lse, grad, need)


def _window_attention_backward(
    q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor | None, lse: Tensor | None,
    grad: Tensor, windows: WindowGrid, scale: float, need: Need,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return attention_kernels.windowed_backward(q, k, v, windows, scale, out, lse, grad, need)


def _keep(ctx: Any, tensors: tuple[Tensor | None, ...], out: Tensor, lse: Tensor | None) -> None:
    looped = lse is not None and lse.ndim == 3  # an operator returns an empty tensor for None
    ctx.save_for_backward(*tensors, *((out, lse) if looped else (None, None)))
    ctx.set_materialize_grads(False)
    if lse is not None:
        ctx.mark_non_differentiable(lse)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, key_mask, ctx.scale = inputs
    _keep(ctx, (q, k, v, key_mask), *output)


def _save_window_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, ctx.windows, ctx.scale = inputs
    _keep(ctx, (q, k, v), *output)


def _wanted(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    return tuple([g if needed[i] else None for i, g in enumerate(gradients)])


def _attention_gradients(ctx: Any, run: Any, grad: Tensor | None, _lse: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 3
    need = ctx.needs_input_grad[:3]
    return _wanted(ctx, run(*ctx.saved_tensors, grad, ctx.scale, need))


def _window_attention_gradients(
    ctx: Any, run: Any, grad: Tensor | None, _lse: Any
) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 3
    need = ctx.needs_input_grad[:3]
    return _wanted(ctx, run(*ctx.saved_tensors, grad, ctx.windows, ctx.scale, need))


# FLOPs, two per multiply-add, as torch counts them. Shapes come in place of tensors.


def _attention_flops(q: _Ints, k: _Ints, *_: Any) -> int:
    b, n, h, d = q
    return 4 * b * h * n * k[1] * d


def _window_attention_flops(q: _Ints, k: _Ints, v: _Ints, windows: WindowGrid, *_: Any) -> int:
    return 4 * q[0] * q[2] * q[3] * windows.num_pairs


def _products(forward: int, need: Need) -> int:
    """Of the five products of the backward, each as large as half the forward, those needed."""
    need_q, need_k, need_v = need
    return forward // 2 * (1 + need_v + (need_q or need_k) + need_q + need_k)


_attention = _Attention(
    Operator(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale)"
        " -> (Tensor, Tensor)",
        attention_kernels.dense,
        _fake_attention,
        _attention_flops,
    ),
    Operator(
        "attention_backward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? out,"
        " Tensor? lse, Tensor grad, float scale, bool[3] need) -> (Tensor, Tensor, Tensor)",
        _attention_backward,
        _fake_gradients,
        lambda q, k, *rest: _products(_attention_flops(q, k), rest[-1]),
    ),
    _save_attention,
    _attention_gradients,
)

_window_attention = _Attention(
    Operator(
        "window_attention(Tensor q, Tensor k, Tensor v, SymInt[3] grid, SymInt[3] window,"
        " SymInt[3] shift, float scale) -> (Tensor, Tensor)",
        attention_kernels.windowed,
        _fake_window_attention,
        _window_attention_flops,
    ),
    Operator(
        "window_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? out, Tensor? lse,"
        " Tensor grad, SymInt[3] grid, SymInt[3] window, SymInt[3] shift, float scale,"
        " bool[3] need) -> (Tensor, Tensor, Tensor)",
        _window_attention_backward,
        _fake_gradients,
        lambda q, k, v, out, lse, grad, windows, scale, need: _products(
            _window_attention_flops(q, k, v, windows), need
        ),
    ),
    _save_window_attention,
    _window_attention_gradients,
)


# Window means.


def _save_window_mean(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.windows = inputs


def _fake_means(x: Tensor, windows: WindowGrid) -> Tensor:
    return x.new_empty(x.shape[0], windows.num_windows, x.shape[2])


_window_mean = Differentiable(
    Operator(
        "window_mean(Tensor x, SymInt[3] grid, SymInt[3] window) -> Tensor",
        pool_kernels.window_mean,
        _fake_means,
    ),
    Operator(
        "window_mean_backward(Tensor grad, SymInt[3] grid, SymInt[3] window) -> Tensor",
        lambda grad, windows: norm_kernels.means_backward(grad, windows),
        lambda grad, windows: grad.new_empty(grad.shape[0], windows.num_tokens, grad.shape[2]),
    ),
    _save_window_mean,
    lambda ctx, run, grad: (run(grad, ctx.windows),),
)


# LayerNorm, with the residual before it, and after it the modulation or window means.


def _norm_forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    windows: WindowGrid | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    if windows is not None:
        return pool_kernels.forward(x, y, gate, windows, eps, dtype)
    return *norm_kernels.forward(x, y, gate, shift, scale, eps, dtype), None


def _fake_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    windows: WindowGrid | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    total = x.new_empty(x.shape, dtype=norm_kernels.total_dtype(x, y, gate))
    means = None if windows is None else _fake_means(total, windows)
    return None if y is None else total, x.new_empty(x.shape, dtype=dtype), means


def _fake_norm_backward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    need_y, need_gate, need_modulation = rest[-1]
    b, _, c = x.shape
    columns = need_gate + 2 * need_modulation
    dy = y.new_empty(y.shape) if need_y and gate is not None and y is not None else None
    return x.new_empty(x.shape), dy, x.new_empty(b, columns * c) if columns else None


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """What was normed, the vectors, and y for the gradient of its gate."""
    x, y, gate, _shift, scale, ctx.windows, ctx.eps, _dtype = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:5]]
    normed_from = x if y is None else output[0]
    ctx.save_for_backward(normed_from, y if gate is not None else None, gate, scale)
    ctx.set_materialize_grads(False)


def _norm_gradients(
    ctx: Any, run: Any, dtotal: Tensor | None, dnormed: Tensor | None, dmeans: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, y, gate, scale = ctx.saved_tensors
    with_y = ctx.dtypes[1] is not None
    need_y, need_gate, need_shift, need_scale = ctx.needs_input_grad[1:5]
    need = (need_y, need_gate, need_shift or need_scale)
    dx, dy, sums = run(
        x, y, gate, scale, dtotal if with_y else None, dnormed,
        dmeans if ctx.windows is not None else None, ctx.windows, ctx.eps, need,
    )  # fmt: skip
    vectors = iter(sums.chunk(need_gate + 2 * need[2], 1) if any(need[1:]) else ())
    dgate = next(vectors) if need_gate else None
    dshift, dscale = (next(vectors), next(vectors)) if need[2] else (None, None)
    found = (dx, (dx if gate is None else dy) if need_y else None, dgate, dshift, dscale)
    return tuple(
        [
            g.to(dtype) if needed and g is not None else None
            for g, dtype, needed in zip(found, ctx.dtypes, ctx.needs_input_grad[:5], strict=True)
        ]
    )


_norm = Differentiable(
    Operator(
        "norm(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, SymInt[3]? grid,"
        " SymInt[3]? window, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
        _norm_forward,
        _fake_norm,
    ),
    Operator(
        "norm_backward(Tensor x, Tensor? y, Tensor? gate, Tensor? scale, Tensor? dtotal,"
        " Tensor? dnormed, Tensor? dmeans, SymInt[3]? grid, SymInt[3]? window, float eps,"
        " bool[3] need) -> (Tensor, Tensor, Tensor)",
        norm_kernels.backward,
        _fake_norm_backward,
    ),
    _save_norm,
    _norm_gradients,
)
