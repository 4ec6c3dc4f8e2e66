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


def layer_norm_window_mean(x: Tensor, windows: WindowGrid, eps: float) -> tuple[Tensor, Tensor]:
    return torch.ops.ptattn.layer_norm_window_mean(x, windows.grid, windows.window, eps)


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    return torch.ops.ptattn.attention(*_autocast(q, k, v), key_mask, scale)[0]


def window_attention(q: Tensor, k: Tensor, v: Tensor, windows: WindowGrid, scale: float) -> Tensor:
    geometry = windows.grid, windows.window, windows.shift
    return torch.ops.ptattn.window_attention(*_autocast(q, k, v), *geometry, scale)[0]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, attention runs in its dtype, as torch's own does; float64 stays."""
    device = tensors[0].device.type
    known = torch.amp.is_autocast_available(device)  # not for the meta device
    if tensors[0].dtype == torch.float64 or not known or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


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


def _proxies(x: Tensor, grid: _Ints, window: _Ints) -> Tensor:
    return x.new_empty(x.shape[0], WindowGrid(grid, window).num_windows, x.shape[2])


@_operator("window_mean(Tensor x, SymInt[3] grid, SymInt[3] window) -> Tensor")
def _window_mean(x: Tensor, grid: _Ints, window: _Ints) -> Tensor:
    return launch.pool(_rows(x), WindowGrid(grid, window), None)[0]


@_operator("window_mean_backward(Tensor grad, SymInt[3] grid, SymInt[3] window) -> Tensor")
def _window_mean_backward(grad: Tensor, grid: _Ints, window: _Ints) -> Tensor:
    return launch.pool_backward(_rows(grad), WindowGrid(grid, window), None)


@_operator(
    "layer_norm_window_mean(Tensor x, SymInt[3] grid, SymInt[3] window, float eps)"
    " -> (Tensor, Tensor)"
)
def _layer_norm_window_mean(
    x: Tensor, grid: _Ints, window: _Ints, eps: float
) -> tuple[Tensor, Tensor]:
    means, normed = launch.pool(_rows(x), WindowGrid(grid, window), eps)
    return normed, means


@_operator(
    "layer_norm_window_mean_backward(Tensor x, SymInt[3] grid, SymInt[3] window, float eps,"
    " Tensor dnormed, Tensor dmeans) -> Tensor"
)
def _layer_norm_window_mean_backward(
    x: Tensor, grid: _Ints, window: _Ints, eps: float, dnormed: Tensor, dmeans: Tensor
) -> Tensor:
    norm = _rows(x), _rows(dnormed), eps
    return launch.pool_backward(_rows(dmeans), WindowGrid(grid, window), norm)


_fake("window_mean")(_proxies)
_fake("window_mean_backward")(
    lambda grad, grid, window: grad.new_empty(grad.shape[0], _tokens(grid), grad.shape[2])
)
_fake("layer_norm_window_mean")(lambda x, grid, window, eps: (_like(x), _proxies(x, grid, window)))
_fake("layer_norm_window_mean_backward")(lambda x, *_: _like(x))


def _tokens(grid: _Ints) -> int:
    return grid[0] * grid[1] * grid[2]


def _save_window_mean(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.geometry = inputs


def _differentiate_window_mean(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.ptattn.window_mean_backward(grad, *ctx.geometry), None, None


def _save_layer_norm_window_mean(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x)


def _differentiate_layer_norm_window_mean(
    ctx: Any, dnormed: Tensor, dmeans: Tensor
) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    run = torch.ops.ptattn.layer_norm_window_mean_backward
    return run(x, *ctx.options, dnormed, dmeans), None, None, None


_differentiable("window_mean", _differentiate_window_mean, _save_window_mean)
_differentiable(
    "layer_norm_window_mean", _differentiate_layer_norm_window_mean, _save_layer_norm_window_mean
)


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
