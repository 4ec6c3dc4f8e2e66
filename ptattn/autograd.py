"""The triton backend: the kernels as differentiable torch operators.

Each is registered with torch.library: what it computes, the shapes and strides that it returns, its
gradient and its FLOPs, so that eager, torch.compile, checkpointing and the FLOP counter see one and
the same. For the backward it keeps q, k and v, and where the kernel loops over its keys the output
and its log-sum-exp; a window mean keeps nothing, LayerNorm its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .geometry import WindowGrid
from .kernels import launch

# Whether the kernels take CPU tensors, and only those: TRITON_INTERPRET=1 when first imported.
INTERPRETED: bool = launch.INTERPRETED
# Triton's major and minor version.
TRITON: tuple[int, int] = launch.TRITON
# The largest window, in tokens, whose coordinates the kernels divide exactly.
MAX_WINDOW: int = launch.MAX_WINDOW

_Ints = Sequence[int]
_Need = tuple[bool, bool, bool]
_library = torch.library.Library("ptattn", "DEF")


# What ops.py calls.


def window_mean(x: Tensor, windows: WindowGrid) -> Tensor:
    return torch.ops.ptattn.window_mean(x, windows.grid, windows.window)


def norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    windows: WindowGrid | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Under autocast the sum is of the widest dtype, as torch's; the norm, which linear layers
    take, is of autocast's."""
    geometry = (None, None) if windows is None else (windows.grid, windows.window)
    return torch.ops.ptattn.norm(x, y, gate, shift, scale, *geometry, eps, _autocast_dtype(x))


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    return torch.ops.ptattn.attention(*_autocast(q, k, v), key_mask, scale)[0]


def window_attention(q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float) -> Tensor:
    geometry = windows.grid, windows.window, windows.shift
    return torch.ops.ptattn.window_attention(*_autocast(q, k, v), *geometry, scale)[0]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, attention runs in its dtype, as torch's own does; float64 stays."""
    return tuple(t.to(_autocast_dtype(t)) for t in tensors)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    known = torch.amp.is_autocast_available(device)  # not for the meta device
    if x.dtype == torch.float64 or not known or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


# Registration.


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function an operator; its errors name the operator and its tensors."""
    name = schema.split("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            try:
                return function(*args)
            except (torch.OutOfMemoryError, launch.KernelError) as error:
                tensors = [a for a in args if isinstance(a, Tensor)]
                got = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors)
                raise type(error)(f"ptattn.{name} of {got}: {error}") from error

        _library.define(schema)
        for key in ("CPU", "CUDA"):
            _library.impl(name, run, key)
        return function

    return register


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"ptattn::{name}", lib=_library)


def _differentiable(name: str, backward: Callable[..., Any], save: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"ptattn::{name}", backward, setup_context=save, lib=_library)
    backward_name = f"{name}_backward"

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"ptattn.{name} has no double backward on the triton backend; "
            f"use backend='reference' for gradients of gradients"
        )

    torch.library.register_autograd(f"ptattn::{backward_name}", refuse, lib=_library)


def _rows(t: Tensor) -> Tensor:
    """The kernels read rows of channels one after the other: a copy where they are not."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _like(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _log_sum_exp(q: Tensor, needed: bool) -> Tensor:
    """(B, H, N), or nothing where the backward needs none."""
    b, n, h, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((b, h, n) if needed else (0,), dtype=dtype)


# Attention.


@_operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale) -> (Tensor, Tensor)"
)
def _attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return launch.attention(_rows(q), _rows(k), _rows(v), key_mask, scale)


@_operator(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale,"
    " Tensor? out, Tensor lse, Tensor grad, bool[3] need) -> (Tensor, Tensor, Tensor)"
)
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float,
    out: Tensor | None, lse: Tensor, grad: Tensor, need: _Need,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
    return launch.attention_backward(q, k, v, key_mask, scale, out, lse, grad, need)


@_fake("attention")
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Any:
    return _like(q), _log_sum_exp(q, k.shape[1] > launch.FEW_KEYS)


@_operator(
    "window_attention(Tensor q, Tensor k, Tensor v, SymInt[3] grid, SymInt[3] window,"
    " SymInt[3] shift, float scale) -> (Tensor, Tensor)"
)
def _window_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: _Ints, window: _Ints, shift: _Ints, scale: float
) -> tuple[Tensor, Tensor]:
    windows = WindowGrid(grid, window, shift)
    return launch.window_attention(_rows(q), _rows(k), _rows(v), windows, scale)


@_operator(
    "window_attention_backward(Tensor q, Tensor k, Tensor v, SymInt[3] grid,"
    " SymInt[3] window, SymInt[3] shift, float scale, Tensor? out, Tensor lse, Tensor grad,"
    " bool[3] need) -> (Tensor, Tensor, Tensor)"
)
def _window_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, grid: _Ints, window: _Ints, shift: _Ints, scale: float,
    out: Tensor | None, lse: Tensor, grad: Tensor, need: _Need,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    windows = WindowGrid(grid, window, shift)
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
    return launch.window_attention_backward(q, k, v, windows, scale, out, lse, grad, need)


@_fake("window_attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, grid: _Ints, window: _Ints, shift: _Ints, scale: float
) -> Any:
    return _like(q), _log_sum_exp(q, launch.loops_over_windows(WindowGrid(grid, window, shift)))


def _fake_gradients(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(
        _like(t) if needed else t.new_empty(0)
        for t, needed in zip((q, k, v), rest[-1], strict=True)
    )


def _keep(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor
) -> None:
    ctx.save_for_backward(q, k, v, key_mask, out if lse.ndim == 3 else None, lse)
    ctx.mark_non_differentiable(lse)


def _wanted(ctx: Any, gradients: Sequence[Tensor], others: int) -> tuple[Tensor | None, ...]:
    """The gradients of q, k and v that are wanted, and None for each other input."""
    wanted = (g if w else None for g, w in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*wanted, *(None,) * others)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, ctx.scale = inputs
    _keep(ctx, q, k, v, key_mask, *output)


def _differentiate_attention(ctx: Any, grad: Tensor, _dlse: Any) -> tuple[Tensor | None, ...]:
    q, k, v, key_mask, out, lse = ctx.saved_tensors
    run = torch.ops.ptattn.attention_backward
    need = ctx.needs_input_grad[:3]
    return _wanted(ctx, run(q, k, v, key_mask, ctx.scale, out, lse, grad, need), 2)


def _save_window_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, *ctx.geometry, ctx.scale = inputs
    _keep(ctx, q, k, v, None, *output)


def _differentiate_window_attention(
    ctx: Any, grad: Tensor, _dlse: Any
) -> tuple[Tensor | None, ...]:
    q, k, v, _, out, lse = ctx.saved_tensors
    run = torch.ops.ptattn.window_attention_backward
    need = ctx.needs_input_grad[:3]
    return _wanted(ctx, run(q, k, v, *ctx.geometry, ctx.scale, out, lse, grad, need), 4)


_fake("attention_backward")(_fake_gradients)
_fake("window_attention_backward")(_fake_gradients)
_differentiable("attention", _differentiate_attention, _save_attention)
_differentiable("window_attention", _differentiate_window_attention, _save_window_attention)


# Window means.


@_operator("window_mean(Tensor x, SymInt[3] grid, SymInt[3] window) -> Tensor")
def _window_mean(x: Tensor, grid: _Ints, window: _Ints) -> Tensor:
    return launch.window_mean(_rows(x), WindowGrid(grid, window))


@_operator("window_mean_backward(Tensor grad, SymInt[3] grid, SymInt[3] window) -> Tensor")
def _window_mean_backward(grad: Tensor, grid: _Ints, window: _Ints) -> Tensor:
    return launch.window_mean_backward(_rows(grad), WindowGrid(grid, window))


@_fake("window_mean")
def _proxies(x: Tensor, grid: _Ints, window: _Ints) -> Tensor:
    return x.new_empty(x.shape[0], WindowGrid(grid, window).num_windows, x.shape[2])


@_fake("window_mean_backward")
def _(grad: Tensor, grid: _Ints, window: _Ints) -> Tensor:
    return grad.new_empty(grad.shape[0], grid[0] * grid[1] * grid[2], grad.shape[2])


def _save_window_mean(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.geometry = inputs


def _differentiate_window_mean(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.ptattn.window_mean_backward(grad, *ctx.geometry), None, None


_differentiable("window_mean", _differentiate_window_mean, _save_window_mean)


# LayerNorm, with the residual before it, and after it the modulation or window means.


@_operator(
    "norm(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, SymInt[3]? grid,"
    " SymInt[3]? window, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
def _norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    grid: _Ints | None, window: _Ints | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (t if t is None else _rows(t) for t in (x, y, gate, shift, scale))
    return launch.norm(*tensors, _windows(grid, window), eps, dtype)


@_operator(
    "norm_backward(Tensor x, Tensor? y, Tensor? gate, Tensor? scale, Tensor? dtotal,"
    " Tensor? dnormed, Tensor? dmeans, SymInt[3]? grid, SymInt[3]? window, float eps,"
    " bool[3] need) -> (Tensor, Tensor, Tensor)"
)
def _norm_backward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, dtotal: Tensor | None,
    dnormed: Tensor | None, dmeans: Tensor | None, grid: _Ints | None, window: _Ints | None,
    eps: float, need: _Need,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = (x, y, gate, scale, dtotal, dnormed, dmeans)
    tensors = (t if t is None else _rows(t) for t in given)
    return launch.norm_backward(*tensors, _windows(grid, window), eps, need)


def _windows(grid: _Ints | None, window: _Ints | None) -> WindowGrid | None:
    return None if grid is None or window is None else WindowGrid(grid, window)


@_fake("norm")
def _(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Any, scale: Any,
    grid: _Ints | None, window: _Ints | None, eps: float, dtype: torch.dtype,
) -> Any:  # fmt: skip
    total = x.new_empty((0,) if y is None else x.shape, dtype=launch.total_dtype(x, y, gate))
    means = x.new_empty(0) if grid is None else _proxies(total.new_empty(x.shape), grid, window)
    return total, x.new_empty(x.shape, dtype=dtype), means


@_fake("norm_backward")
def _(x: Tensor, y: Tensor | None, gate: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    need_y, need_gate, need_modulation = rest[-1]
    b, _, c = x.shape
    columns = need_gate + 2 * need_modulation
    dy = _like(y) if need_y and gate is not None and y is not None else x.new_empty(0)
    return _like(x), dy, x.new_empty(b, columns * c) if columns else x.new_empty(0)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What was normed, the vectors, and y for the gradient of its gate."""
    x, y, gate, _shift, scale, *ctx.geometry, ctx.eps, _dtype = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:5]]
    normed_from = x if y is None else output[0]
    ctx.save_for_backward(normed_from, y if gate is not None else None, gate, scale)
    ctx.set_materialize_grads(False)


def _differentiate_norm(
    ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None, dmeans: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, y, gate, scale = ctx.saved_tensors
    with_y = ctx.dtypes[1] is not None
    need_y, need_gate, need_shift, need_scale = ctx.needs_input_grad[1:5]
    need = (need_y, need_gate, need_shift or need_scale)
    dx, dy, sums = torch.ops.ptattn.norm_backward(
        x, y, gate, scale, dtotal if with_y else None, dnormed,
        dmeans if ctx.geometry[0] is not None else None, *ctx.geometry, ctx.eps, need,
    )  # fmt: skip
    vectors = iter(sums.chunk(need_gate + 2 * need[2], 1) if any(need[1:]) else ())
    dgate = next(vectors) if need_gate else None
    dshift, dscale = (next(vectors), next(vectors)) if need[2] else (None, None)
    found = (dx, (dx if gate is None else dy) if need_y else None, dgate, dshift, dscale)
    wanted = (
        g.to(dtype) if needed and g is not None else None
        for g, dtype, needed in zip(found, ctx.dtypes, ctx.needs_input_grad[:5], strict=True)
    )
    return (*wanted, *(None,) * 4)


_differentiable("norm", _differentiate_norm, _save_norm)


# FLOPs, two per multiply-add, as torch counts them. Shapes come in place of tensors.


def _products(forward: int, need: _Need) -> int:
    """Of the five products of the backward, each as large as half the forward, those needed."""
    need_q, need_k, need_v = need
    return forward // 2 * (1 + need_v + (need_q or need_k) + need_q + need_k)


@register_flop_formula(torch.ops.ptattn.attention)
def _attention_flops(q: _Ints, k: _Ints, *_: Any, **__: Any) -> int:
    b, n, h, d = q
    return 4 * b * h * n * k[1] * d


@register_flop_formula(torch.ops.ptattn.attention_backward)
def _attention_backward_flops(q: _Ints, k: _Ints, *rest: Any, **_: Any) -> int:
    return _products(_attention_flops(q, k), rest[-1])


@register_flop_formula(torch.ops.ptattn.window_attention)
def _window_attention_flops(
    q: _Ints, k: _Ints, v: _Ints, grid: _Ints, window: _Ints, shift: _Ints, *_: Any, **__: Any
) -> int:
    return 4 * q[0] * q[2] * q[3] * WindowGrid(grid, window, shift).num_pairs


@register_flop_formula(torch.ops.ptattn.window_attention_backward)
def _window_attention_backward_flops(*args: Any, **_: Any) -> int:
    return _products(_window_attention_flops(*args[:6]), args[-1])
