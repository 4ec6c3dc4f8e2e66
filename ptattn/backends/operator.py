"""A kernel operation as torch knows it: an operator, and the short way past torch's dispatcher.

The operator (torch.library) has what it computes, its fake kernel, its gradient, its FLOPs and its
refusal of a second derivative. A call that nothing observes goes straight to the kernels, where
gradients are needed within an autograd.Function with the same formulas; both ways give the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils.flop_counter import register_flop_formula

from ..context import observed, profiled
from ..geometry import WindowGrid, window_grid
from ..kernels.host import KernelError

_library = torch.library.Library("ptattn", "DEF")


class Operator:
    """One operator; called with a WindowGrid in place of its geometry.

    Args:
        schema: tensors first, then the geometry (SymInt[3] each), then the rest.
        run: by the kernels; takes a WindowGrid or None in place of the geometry, and may return
            None for tensors that it need not make.
        fake: what `run` returns, for tensors without data.
        flops: of `run`, by shapes in place of tensors; None for none.
    """

    def __init__(
        self,
        schema: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name = schema.split("(")[0]
        inputs = schema[schema.index("(") : schema.rindex("->")]
        self.tensors, self.geometry = inputs.count("Tensor"), inputs.count("SymInt[3]")
        self._run = run
        _library.define(schema)
        for key in ("CPU", "CUDA"):
            _library.impl(
                self.name, lambda *args: _made(self.run(*self.joined(args)), args[0]), key
            )
        torch.library.register_fake(
            f"ptattn::{self.name}",
            lambda *args: _made(fake(*self.joined(args)), args[0]),
            lib=_library,
        )
        self.dispatch = getattr(torch.ops.ptattn, self.name)
        if flops is not None:
            register_flop_formula(self.dispatch)(
                lambda *args, **_: flops(*self.joined(args)),
            )

    def run(self, *args: Any) -> Any:
        """By the kernels; a profile and errors name the operator, errors its tensors."""
        try:
            if profiled():
                with record_function(f"ptattn::{self.name}"):
                    return self._run(*args)
            return self._run(*args)
        except (torch.OutOfMemoryError, KernelError) as error:
            got = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in args if isinstance(t, Tensor))
            raise type(error)(f"ptattn.{self.name} of {got}: {error}") from error

    def joined(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The dispatcher's arguments, with a WindowGrid or None for the geometry."""
        args = tuple([tuple(a) if isinstance(a, list) else a for a in args])
        if not self.geometry:
            return args
        first, last = self.tensors, self.tensors + self.geometry
        windows = None if args[first] is None else window_grid(*args[first:last])
        return (*args[:first], windows, *args[last:])

    def split(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The other way."""
        if not self.geometry:
            return args
        windows: WindowGrid | None = args[self.tensors]
        parts: tuple[Any, ...] = (None,) * 3
        if windows is not None:
            parts = (windows.grid, windows.window, windows.shift)
        return (*args[: self.tensors], *parts[: self.geometry], *args[self.tensors + 1 :])


class Differentiable:
    """An operation and its gradient; called with a WindowGrid in place of its geometry.

    Args:
        forward, backward: the operators.
        save: keep in `ctx` what the gradient needs, given ctx, the inputs and the output.
        gradients: of the tensor inputs, given ctx, a function that runs `backward`, and the
            gradients of the output; None for those not needed.
    """

    def __init__(
        self,
        forward: Operator,
        backward: Operator,
        save: Callable[..., None],
        gradients: Callable[..., tuple[Tensor | None, ...]],
    ) -> None:
        self.forward, self.backward = forward, backward

        def of_all_inputs(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            found = gradients(ctx, self._backward, *grads)
            return (*found, *(None,) * (len(ctx.needs_input_grad) - len(found)))

        def refuse(ctx: Any, *_: Any) -> None:
            raise RuntimeError(
                f"ptattn.{forward.name} has no double backward on the triton backend; "
                f"use backend='reference' for gradients of gradients"
            )

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, forward.joined(inputs), output)

        register = torch.library.register_autograd
        register(f"ptattn::{forward.name}", of_all_inputs, setup_context=setup, lib=_library)
        register(f"ptattn::{backward.name}", refuse, lib=_library)

        def run(ctx: Any, *args: Any) -> Any:
            output = forward.run(*args)
            save(ctx, args, output)
            return output

        parts = dict(forward=staticmethod(run), backward=staticmethod(of_all_inputs))
        function: Any = type(forward.name, (torch.autograd.Function,), parts)
        self._with_gradients = function.apply

    def __call__(self, *args: Any) -> Any:
        """`forward` by the shortest way."""
        tensors = args[: self.forward.tensors]
        if observed(*tensors):
            return self._dispatch(*args)
        if torch.is_grad_enabled():
            for t in tensors:
                if t is not None and t.requires_grad:
                    return self._with_gradients(*args)
        return self.forward.run(*args)

    def _backward(self, *args: Any) -> Any:
        """`backward`, by the dispatcher where it records for a second derivative, to refuse it."""
        if torch.is_grad_enabled() or observed(*args[: self.backward.tensors]):
            return self._dispatch_backward(*args)
        return self.backward.run(*args)

    def _dispatch(self, *args: Any) -> Any:
        return self.forward.dispatch(*self.forward.split(args))

    def _dispatch_backward(self, *args: Any) -> Any:
        return self.backward.dispatch(*self.backward.split(args))


def _made(output: Any, like: Tensor) -> Any:
    """With an empty tensor for each that was not made, as an operator returns all."""
    if not isinstance(output, tuple):
        return output
    return tuple([like.new_empty(0) if t is None else t for t in output])
