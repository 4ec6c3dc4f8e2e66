"""Which backend runs a call of an operation, and why not another."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import backends, ops
from .geometry import window_grid
from .packed import unpacked

_OPS = {
    function.__name__: function
    for function in (
        ops.window_mean,
        ops.layer_norm,
        ops.residual_layer_norm,
        ops.layer_norm_window_mean,
        ops.residual_layer_norm_window_mean,
        ops.attention,
        ops.window_attention,
        ops.packed_attention,
        ops.packed_window_attention,
    )
}


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that `auto` takes, and why each other one cannot run.

    `kept` is why dense attention is kept from torch's SDPA, where the kernels can run.
    """

    op: str
    backend: str
    reasons: dict[str, tuple[str, ...]]
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: auto takes {self.backend}"]
        for name, reasons in self.reasons.items():
            text = "; ".join(reasons) or "can run"
            if name == "sdpa" and self.kept:
                text += ", but is not taken: " + "; ".join(self.kept)
            lines.append(f"  {name}: {text}")
        return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `auto` takes for a call, and each reason why another cannot run.

    Args:
        op: the name of an operation, such as "window_attention".
        *args, **kwargs: what the operation would be called with, but for a backend.

    Examples:
        >>> print(explain("window_mean", torch.randn(1, 64, 32), (8, 8), (4, 4)))
        window_mean: auto takes sdpa
          reference: can run
          sdpa: can run
          triton: on the CPU the kernels run under TRITON_INTERPRET=1 only
    """
    if op not in _OPS:
        raise ValueError(f"op must be one of {', '.join(_OPS)}; got {op!r}")
    given = inspect.signature(_OPS[op]).bind_partial(*args, **kwargs).arguments
    tensors = unpacked(*[a for a in given.values() if isinstance(a, Tensor)])
    geometry = [given[name] for name in ("grid", "window", "shift") if name in given]
    windows = window_grid(*geometry) if geometry else None
    reasons = {
        name: tuple(backends.reasons_against(name, *tensors, windows=windows))
        for name in backends.BACKENDS
    }
    backend = backends.resolve("auto", *tensors, windows=windows)
    if op not in ("attention", "packed_attention") or backend != "triton":
        return Explanation(op, backend, reasons)
    q, k, v = tensors[:3]
    kept = backends.against_sdpa(q, k, v, given.get("key_mask"), given.get("scale") or 1.0)
    return Explanation(op, "triton" if kept else "sdpa", reasons, tuple(kept))
