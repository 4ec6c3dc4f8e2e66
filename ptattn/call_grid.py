"""The token grid of a call, for attention deep in somebody else's model.

The model's patch embedding sees the grid, its attention needs it, and nothing between them hands it
on. So it is kept by call: in a context variable, one value per thread and task, from the beginning
of the model's forward to its end. Activation checkpointing computes a block once more when the call
is over; so what goes into blocks carries its grid too, as an attribute of its memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import context

Grid = tuple[int, int, int]

_LOCK = threading.Lock()  # of what calls in several threads share


@dataclass(eq=False)
class _Call:
    """A call in progress: of a model, or of a block whose input carries its grid."""

    of: CallGrid
    outer: _Call | None
    # It ends with this module's. None is a loose one: the patch embedding alone was called, as by
    # timm's forward_features, and nobody says when the call is over.
    owner: nn.Module | None
    grid: Grid | None = None
    marks: bool = True  # what goes into blocks, as these may be computed once more
    asked: bool = False  # a loose one's, since the patch embedding was called
    doubtful: bool = False  # of two patch embeddings in a row, whose tokens come next?

    def __post_init__(self) -> None:
        self.backward = context.backward_pass()


_CALL: ContextVar[_Call | None] = ContextVar("ptattn_call", default=None)


class CallGrid:
    """The grid of every call of a model, for those of its layers that ask.

    Args:
        model: whose forward is a call.
        patches: in it, makes the tokens; its output (B, C, h, w) has the grid.
        names: of the layers.
    """

    def __init__(self, model: nn.Module, patches: nn.Module, names: Iterable[str]) -> None:
        self.layers = 0  # that ask
        self.seen: set[Grid] = set()
        self.only: Grid | None = None  # all that was ever seen, if it is one
        self.open: list[Grid] = []
        # Compiled code can read no context variable. It reads the grid of the calls in progress, if
        # it is one.
        self.current: Grid | None = None
        self.handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._open, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
            patches.register_forward_hook(self._see),
        ]
        blocks = _above(model, names)
        for module in blocks:
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
        (name,) = (name for name, module in model.named_modules() if module is patches)
        for module in {*blocks, *_above(model, [name])}:
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def release(self) -> None:
        """A layer asks no more. After the last one the model has none of these hooks."""
        self.layers -= 1
        if not self.layers:
            for handle in self.handles:
                handle.remove()

    def of(self, x: Tensor) -> Grid:
        """The grid of the tokens (B, N, C) that a layer is called with.

        Raises:
            ValueError: it cannot be known.
        """
        if torch.compiler.is_compiling():
            grid = self.only if self.current is None else self.current
        else:
            grid = self._find(x)
            if grid is None and context.backward_pass() >= 0:
                grid = self.only  # what is computed once more has been computed before
        if grid is None:
            raise ValueError(
                "the grid of these tokens is not known, as no patch embedding has made them in "
                "this call: call the model as a whole, or give replace_attention a grid"
            )
        return grid

    # Hooks.

    def _open(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._begin(model, None, marks=torch.is_grad_enabled())

    def _see(self, patches: nn.Module, args: Any, out: Tensor) -> None:
        grid = cast(Grid, (1, *out.shape[-2:]))
        if torch.compiler.is_compiling():
            self.current = grid
            return
        call = self._call()
        with _LOCK:
            self.seen.add(grid)
            self.only = grid if len(self.seen) == 1 else None
            if call is not None and call.owner is not None:
                self._set(call, grid)
                return
        if call is None:
            outer = _CALL.get()
            while outer is not None and outer.owner is None and outer.backward >= 0:
                outer = outer.outer  # of a backward pass that is over
            _CALL.set(_Call(self, outer, None, grid))
        else:
            call.doubtful = not call.asked and (call.doubtful or call.grid != grid)
            call.grid, call.asked = grid, False

    def _enter(self, block: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        call = self._call()
        if call is not None and call.owner is not None and not call.marks:
            return  # within a call that nothing is computed once more of
        grid = self._find(_first_tensor((*args, *kwargs.values())))
        if grid is not None and (call is None or call.owner is None):
            self._begin(block, grid)

    def _leave(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if torch.compiler.is_compiling():
            return
        call = self._call()
        if call is None or call.owner not in (None, module):
            return
        # Where no call of the model goes on, what a block returns must say its grid to the next.
        self._mark(_first_tensor(output), call.grid)
        if call.owner is module:
            self._end(call)

    # Calls.

    def _find(self, tokens: Tensor | None) -> Grid | None:
        """The grid of a module's input, which carries it from now on."""
        call = self._call()
        if call is not None and call.owner is not None:
            grid = call.grid
        else:
            grid = self._marked(tokens)
            if grid is None and call is not None:
                grid, call.asked = None if call.doubtful else call.grid, True
        if call is None or call.marks:
            self._mark(tokens, grid)
        return grid

    def _call(self) -> _Call | None:
        """The innermost call of this model, within this backward pass or outside of all."""
        call, backward = _CALL.get(), context.backward_pass()
        while call is not None and (call.of is not self or call.backward != backward):
            call = call.outer
        return call

    def _begin(self, owner: nn.Module, grid: Grid | None, marks: bool = True) -> None:
        call = _Call(self, _CALL.get(), owner, marks=marks)
        with _LOCK:
            self._set(call, grid)
        _CALL.set(call)

    def _end(self, call: _Call) -> None:
        """End a call, and those within it that an interrupt has left open."""
        while (innermost := _CALL.get()) is not None:
            _CALL.set(innermost.outer)
            with _LOCK:
                innermost.of._set(innermost, None)
            if innermost is call:
                return

    def _set(self, call: _Call, grid: Grid | None) -> None:
        if call.owner is not None:
            if call.grid is not None:
                self.open.remove(call.grid)
            if grid is not None:
                self.open.append(grid)
            self.current = self.open[0] if len(set(self.open)) == 1 else None
        call.grid = grid

    # Marks. A storage's attributes live as long as its memory, whoever keeps that.

    def _mark(self, tokens: Tensor | None, grid: Grid | None) -> None:
        if grid is not None and _can_carry(tokens) and tokens.shape[1:2] == (math.prod(grid),):
            tokens.untyped_storage()._ptattn_grid = self, grid  # type: ignore[attr-defined]

    def _marked(self, tokens: Tensor | None) -> Grid | None:
        if not _can_carry(tokens):
            return None
        mark: Any = getattr(tokens.untyped_storage(), "_ptattn_grid", (None, None))
        of, grid = mark
        return grid if of is self and tokens.shape[1:2] == (math.prod(grid),) else None


def _can_carry(tokens: Tensor | None) -> TypeGuard[Tensor]:
    """Tensors of other classes and within transforms need not have memory."""
    return type(tokens) in (Tensor, nn.Parameter) and not context.transformed()


def _first_tensor(value: Any) -> Tensor | None:
    """What hosts give to a block, or take from it, as its tokens."""
    values = value if isinstance(value, tuple | list) else (value,)
    return next((v for v in values if isinstance(v, Tensor)), None)


def _above(model: nn.Module, names: Iterable[str]) -> set[nn.Module]:
    """The modules between a model and those of the names."""
    paths = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    return {model.get_submodule(path) for path in paths}
