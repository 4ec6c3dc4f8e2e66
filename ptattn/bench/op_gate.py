"""The gate of the operations: outputs and gradients against float64, by the rule of the tests.

Heads do not depend on one another, nor do samples, so the first head of the first sample and the
last of the last are checked whole, against the formula below in float64 and in the tested dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import WindowGrid
from .op_workloads import DENSE, INPUTS, OUTPUTS, ROWWISE, Inputs, Operation
from .parity import FORWARD, GRADIENT, WrongError, assert_within_rule, relative_error

# Relative error allowed to a baseline in bf16, in the norm, against ours, which has been checked.
BASELINE = 2e-2


def check(operation: Operation, inputs: Inputs, backend: str = "triton") -> dict[str, float]:
    """Hold ours to the rule; the error of each output and gradient as a share of plain torch's.

    Raises:
        WrongError: naming what is wrong.
    """
    outs = operation.call(backend, inputs.tensors, inputs.key_mask)
    grads = torch.autograd.grad(outs, inputs.tensors, inputs.upstream)
    names = (*OUTPUTS[operation.op], *(f"d{name}" for name in INPUTS[operation.op]))
    errors = dict.fromkeys(names, 0.0)
    for part in _parts(operation):
        tensors, upstream = (
            [_cut(t, part) for t in ts] for ts in (inputs.tensors, inputs.upstream)
        )
        mask = None if inputs.key_mask is None else inputs.key_mask[part[0]]
        gold, eager = (
            _evaluate(operation, tensors, upstream, mask, dtype)
            for dtype in (torch.float64, tensors[0].dtype)
        )
        for name, whole, exact, plain in zip(names, (*outs, *grads), gold, eager, strict=True):
            mine, ratio = _cut(whole, part), FORWARD if name in OUTPUTS[operation.op] else GRADIENT
            assert_within_rule(name, mine, exact, [plain], ratio)
            worst, allowed = ((t.double() - exact).abs().max().item() for t in (mine, plain))
            share = worst / allowed if allowed else float(worst > 0)
            errors[name] = max(share, errors[name])
    return errors


def check_baseline(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Raise WrongError where a baseline computes something else."""
    for mine, other in zip(ours, theirs, strict=True):
        error = relative_error(other, mine)
        if not error <= BASELINE:
            raise WrongError(f"error {error:.1e} against ours, limit {BASELINE:.0e}")


def _parts(operation: Operation) -> list[tuple[slice, slice]]:
    """Samples and heads to check; rows of channels have no heads."""
    first, last = slice(0, 1), slice(-1, None)
    if operation.op in ROWWISE:
        parts = [(first, slice(None)), (last, slice(None))]
        return parts[: min(2, operation.batch)]
    return [(first, first), (last, last)]


def _cut(t: Tensor, part: tuple[slice, slice]) -> Tensor:
    sample, head = part
    t = t.detach()
    return t[sample, :, head] if t.ndim == 4 else t[sample]


def _evaluate(
    operation: Operation,
    tensors: Sequence[Tensor],
    upstream: Sequence[Tensor],
    mask: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    outs = tuple(formula(operation, leaves, mask))
    grads = torch.autograd.grad(outs, leaves, [g.to(dtype) for g in upstream])
    return [t.detach() for t in (*outs, *grads)]


def formula(
    operation: Operation, tensors: Sequence[Tensor], key_mask: Tensor | None
) -> Iterator[Tensor]:
    """The outputs in plain torch, in the dtype of the inputs; windows are gathered side by side."""
    if operation.op in DENSE:
        present = None if key_mask is None else key_mask[:, None, None]
        yield _attention(tensors, operation.head_dim**-0.5, present)
        return
    if operation.op in ROWWISE:
        yield from _rowwise(operation, *tensors)
        return
    slots, present = _slots(operation.windows, tensors[0].device)
    gathered = [t[:, slots].flatten(0, 1) for t in tensors]  # (B·W, P, H, D)
    keys = present.repeat(tensors[0].shape[0], 1)[:, None, None]
    out = _attention(gathered, operation.head_dim**-0.5, keys)
    out = out.unflatten(0, (tensors[0].shape[0], -1))[:, present]
    yield out[:, slots[present].argsort()]


def _rowwise(
    operation: Operation,
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Iterator[Tensor]:
    if y is not None and gate is not None:
        x = x + gate[:, None] * y
        yield x
    if "normed" in OUTPUTS[operation.op]:
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        if scale is not None and shift is not None:
            normed = normed * (1 + scale[:, None]) + shift[:, None]
        yield normed
    if "means" in OUTPUTS[operation.op]:
        slots, present = _slots(operation.windows, x.device)
        members = torch.where(present[..., None], x[:, slots], 0)
        yield members.sum(2) / present.sum(1)[:, None].to(x.dtype)


def _attention(qkv: Sequence[Tensor], scale: float, present: Tensor | None) -> Tensor:
    q, k, v = qkv
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    if present is not None:
        scores = scores.masked_fill(~present, float("-inf"))
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def _slots(windows: WindowGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens of every window, (W, P), and which of the places hold one."""
    ids = windows.window_ids(device)
    order = ids.argsort(stable=True)
    sizes = torch.bincount(ids)
    place = torch.arange(int(sizes.max()), device=device)
    present = place < sizes[:, None]
    starts = sizes.cumsum(0) - sizes
    slots = order[(starts[:, None] + place).clamp(max=len(order) - 1)]
    return torch.where(present, slots, 0), present
