"""Whom an operation is timed against: torch's own attentions, with the copies that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import baselines, op_gate
from .baselines import KERNELS
from .op_workloads import DENSE, RESIDUAL, ROWWISE, WINDOWED, Operation

Outputs = tuple[Tensor, ...]
Call = Callable[[tuple[Tensor, ...]], Outputs]

# FlexAttention looks at every pair of tokens to make its block mask.
MOST_FLEX_TOKENS = 2**14


def baselines_of(
    operation: Operation, key_mask: Tensor | None, *, backend: str, compiled: bool
) -> Iterator[dict[str, Callable[[], Call]]]:
    """Makers of the baselines by name; those of a later dict are tried if no earlier one runs.

    One may refuse when it is made, or when it is called. `compiled` adds those that take
    torch.compile's time. What `backend` itself does is no baseline of it.
    """
    if operation.op in ROWWISE:
        first: dict[str, Callable[[], Call]] = {}
        if operation.op in RESIDUAL:
            first["eager"] = lambda: _eager(operation)
        if backend != "sdpa":
            first["torch"] = lambda: _rowwise(operation)
        if compiled:
            first["torch.compile"] = lambda: _compiled_rowwise(operation)
        yield first
        return
    fast, *others = (dict(_attentions(operation, key_mask, kinds, backend)) for kinds in KERNELS)
    if compiled and backend != "sdpa" and operation.op in WINDOWED:
        fast["flex"] = lambda: _flex(operation)
    yield from (fast, *others)


def _eager(operation: Operation) -> Call:
    """One operation of torch after the other."""
    return lambda tensors: tuple(op_gate.formula(operation, tensors, None))


def _rowwise(operation: Operation) -> Call:
    return lambda tensors: operation.call("sdpa", tensors, None)


def _compiled_rowwise(operation: Operation) -> Call:
    _keep_for_repeats()
    compiled = torch.compile(_rowwise(operation), dynamic=False)
    return lambda tensors: compiled(tensors)


def _attentions(
    operation: Operation, key_mask: Tensor | None, kinds: dict[str, SDPBackend], backend: str
) -> Iterator[tuple[str, Callable[[], Call]]]:
    for name, kind in kinds.items():
        if backend != "sdpa":
            yield f"sdpa {name}", partial(_sdpa, operation, key_mask, kind)
        if operation.op in WINDOWED and (operation.op == "shifted" or backend == "sdpa"):
            yield f"roll-mask {name}", partial(_roll_mask, operation, kind)


def _sdpa(operation: Operation, key_mask: Tensor | None, kind: SDPBackend) -> Call:
    """ptattn's own portable backend; windows as slabs of equal ones, so without a mask."""

    def call(tensors: tuple[Tensor, ...]) -> Outputs:
        with sdpa_kernel(kind):
            return operation.call("sdpa", tensors, key_mask if operation.op in DENSE else None)

    return call


def _roll_mask(operation: Operation, kind: SDPBackend) -> Call:
    masks: list[Tensor] = []

    def call(tensors: tuple[Tensor, ...]) -> Outputs:
        if not masks and operation.op == "shifted":
            q = tensors[0]
            masks.append(baselines.region_mask(operation.windows, q.dtype).to(q.device))
        with sdpa_kernel(kind):
            mask = masks[0] if masks else None
            q, k, v = tensors
            return (baselines.roll_mask_attention(q, k, v, operation.windows, mask),)

    return call


def _flex(operation: Operation) -> Call:
    """On the tokens in raster order: a block mask says which blocks of them share windows."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = operation.queries
    if n > MOST_FLEX_TOKENS:
        raise ValueError(f"its block mask of {n} tokens would look at {n**2:.0e} pairs")
    ids = operation.windows.window_ids("cuda")

    def same_window(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ids[query] == ids[key]

    mask = create_block_mask(same_window, None, None, n, n, device="cuda")
    _keep_for_repeats()
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(tensors: tuple[Tensor, ...]) -> Outputs:
        q, k, v = (t.transpose(1, 2) for t in tensors)
        return (compiled(q, k, v, block_mask=mask).transpose(1, 2),)

    return call


def _keep_for_repeats() -> None:
    """A compiled backward may overwrite what the forward saved; timing runs it again and again."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
