"""The gate of blocks and models: no time without it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import baselines
from .floor import TRAINING
from .implementations import Model
from .parity import WrongError, relative_error

# Relative errors in the norm: of an implementation against plain torch's; plain torch's own, beyond
# which what is computed amplifies rounding so much that nothing can be checked on it; and of linear
# layers in 8 bits, which is shown beside their time.
NEAR, BLURRED, QUANTIZED = 1.5, 0.2, 0.2


class Gate:
    """What the implementations of a block or model are held to: truth, and plain torch's error.

    Truth is computed in a finer dtype, on inputs and weights as rounded to the tested one. Both are
    by the backend `reference`, the specification, for PT-DiT; by `sdpa` for full attention, whose
    scores would not fit.
    """

    def __init__(self, model: Model, task: str) -> None:
        dtype = model.leaves[0].dtype
        by = "reference" if model.entry.is_proxy_tokenized else "sdpa"
        finer = torch.float64 if dtype == torch.float32 else torch.float32
        self.truth, self.plain = (_by(model, by, kind, task) for kind in (finer, dtype))

    def check(self, model: Model, results: Sequence[Tensor]) -> float:
        """The largest relative error, in the norm, of an output and the gradients of the leaves.

        Args:
            model: an implementation of it.
            results: what that computed.

        Raises:
            WrongError: an error beyond NEAR times plain torch's, beyond QUANTIZED of what computes
                in 8 bits, or a shape or NaN that truth has not.
        """
        worst = 0.0
        # Of a training step the gradients of the weights follow, which are not looked at.
        for i, (own, exact, usual) in enumerate(zip(results, self.truth, self.plain, strict=False)):
            mine, what = own.detach(), "output" if i == 0 else "gradient"
            if i < 2 and model.order is not None:
                mine = baselines.reverse(mine, model.order)
            if mine.shape != exact.shape:
                raise WrongError(f"{what} of shape {tuple(mine.shape)}, not {tuple(exact.shape)}")
            error, known = (relative_error(t, exact) for t in (mine, usual))
            limit = NEAR * known + torch.finfo(mine.dtype).eps
            if not known <= BLURRED:
                raise WrongError(f"plain torch's own {what} error is {known:.1e}")
            if model.quantized:
                limit = QUANTIZED
            if not error <= limit:
                raise WrongError(f"{what} error {error:.1e}, limit {limit:.1e}")
            worst = max(worst, error)
        return worst


def _by(model: Model, backend: str, dtype: torch.dtype, task: str) -> tuple[Tensor, ...]:
    """The output, and in training the gradients of the leaves."""
    module = copy.deepcopy(model.module).to(dtype)
    parts: Iterable[Any] = module.modules()
    for part in parts:
        if hasattr(part, "backend"):
            part.backend = backend
    leaves = [leaf.detach().to(dtype) for leaf in model.leaves]
    if task == TRAINING:
        leaves = [leaf.requires_grad_() for leaf in leaves]
    with torch.set_grad_enabled(task == TRAINING):
        out = model.forward(module, *leaves)
    if task != TRAINING:
        return (out,)
    return out.detach(), *torch.autograd.grad(out, leaves, model.upstream.to(dtype))
