"""The gate before every time: a wrong result has no speed.

The one tolerance rule: no backend may be further from the truth than plain PyTorch is. With gold,
the reference in float64 on the inputs as already rounded to the tested dtype, and eager, the
formula written out in that dtype:

    max|ours − gold| ≤ r · max|eager − gold| + 4·eps·max|gold|,   r = 1 forward, 1.5 gradients
    rms(ours − gold) ≤ 1.1 · rms(eager − gold) + 4·eps·rms(gold)

NaN and infinities are where gold has them.

In float16 and bfloat16 a backend that accumulates in float32 is well within this. In float32 and
float64 it rounds as finely as eager does, and which of the two is nearer is luck: there, several
eagers are given, and the largest error counts.

Whole blocks and models go by the norm instead (`gate`): their errors are those of many roundings
one after another, of which the largest says little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FORWARD, GRADIENT, RMS, FLOOR = 1.0, 1.5, 1.1, 4.0


class WrongError(AssertionError):
    """A result that the rule does not allow."""


class UnluckyError(WrongError):
    """The rule is exceeded in a precision where that can be luck."""


def assert_within_rule(
    name: str, ours: Tensor, gold: Tensor, eagers: Sequence[Tensor], ratio: float
) -> None:
    """Hold one tensor to the rule.

    Args:
        name: what an error calls the tensor.
        ours, gold, eagers: of one shape, gold in float64.
        ratio: FORWARD or GRADIENT.

    Raises:
        WrongError: naming the tensor, its error and the limit.
    """
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(test(ours), test(gold.to(ours.dtype))):
            raise WrongError(f"{name}: {test.__name__} differs from gold")
    finite = gold.to(ours.dtype).isfinite()
    if not finite.any():
        return
    truth = gold[finite]
    errors = [t[finite].double() - truth for t in (ours, *eagers)]
    if not all(e.isfinite().all() for e in errors):
        raise WrongError(f"{name}: eager overflows, so it bounds nothing")
    eps = FLOOR * torch.finfo(ours.dtype).eps
    sizes: tuple[tuple[str, Callable[[Tensor], float], float], ...]
    sizes = (("max", _max, ratio), ("rms", _rms, RMS))
    for what, size, factor in sizes:
        mine, *others = (size(error) for error in errors)
        bound = factor * max(others) + eps * size(truth)
        if not mine <= bound:
            kind = WrongError if ours.dtype in HALF else UnluckyError
            raise kind(f"{name}: {what} error {mine:.3g} > {bound:.3g}, eager {max(others):.3g}")


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """In the norm."""
    exact = torch.promote_types(truth.dtype, torch.float32)
    truth = truth.to(exact)
    return ((ours.to(exact) - truth).norm() / truth.norm()).item()


def _max(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
