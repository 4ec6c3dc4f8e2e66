"""Whom an operation is timed against: torch's own attentions, with the copies that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from . import baselines, op_gate
from .baselines import KERNELS, by_kernel
from .op_workloads import DTYPE, RESIDUAL, ROWWISE, WINDOWED, Inputs, Operation

Outputs = tuple[Tensor, ...]
Call = Callable[[tuple[Tensor, ...]], Outputs]

# FlexAttention looks at every pair of tokens to make its block mask.
MOST_FLEX_TOKENS = 2**14


def baselines_of(
    operation: Operation, inputs: Inputs, *, backend: str, compiled: bool
) -> Iterator[dict[str, Callable[[], Call]]]:
    """Makers of the baselines by name; those of a later dict are tried if no earlier one runs.

    One may refuse when it is made, or when it is called. `compiled` adds those that take
    torch.compile's time. What `backend` itself does is no baseline of it.
    """

    def by_torch(tensors: tuple[Tensor, ...]) -> Outputs:
        """ptattn's own portable backend; windows as slabs of equal ones, so without a mask."""
        return operation.call("sdpa", tensors, inputs.key_mask)

    if operation.op in ROWWISE:
        found: dict[str, Callable[[], Call]] = {}
        if operation.op in RESIDUAL:  # one operation of torch after the other
            found["eager"] = lambda: (
                lambda tensors: tuple(op_gate.formula(operation, tensors, None))
            )
        if backend != "sdpa":
            found["torch"] = lambda: by_torch
        if compiled:
            found["torch.compile"] = lambda: _compiled(by_torch)
        yield found
        return
    windowed, device = operation.op in WINDOWED, inputs.tensors[0].device
    for kinds in KERNELS:
        found = {}
        for name, kind in kinds.items():
            if backend != "sdpa":
                found[f"sdpa {name}"] = partial(by_kernel, kind, by_torch)
            if windowed and (operation.op == "shifted" or backend == "sdpa"):
                found[f"roll-mask {name}"] = partial(_roll_mask, operation, device, kind)
        if kinds is KERNELS[0] and compiled and windowed and backend != "sdpa":
            found["flex"] = lambda: _flex(operation)
        yield found


def _roll_mask(operation: Operation, device: torch.device, kind: SDPBackend) -> Call:
    windows, mask = operation.windows, None
    if operation.op == "shifted":
        mask = baselines.region_mask(windows, DTYPE).to(device)
    attend = by_kernel(kind, baselines.roll_mask_attention)
    return lambda tensors: (attend(*tensors, windows, mask),)


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
    compiled = _compiled(flex_attention)

    def call(tensors: tuple[Tensor, ...]) -> Outputs:
        q, k, v = (t.transpose(1, 2) for t in tensors)
        return (compiled(q, k, v, block_mask=mask).transpose(1, 2),)

    return call


def _compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled backward may overwrite what the forward saved; timing runs it again and again."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    return torch.compile(call, dynamic=False)
