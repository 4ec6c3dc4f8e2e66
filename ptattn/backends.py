"""Backend names, what each can run, and the choice that `auto` makes.

An explicit name runs that backend or raises with every reason why it cannot; it never falls back.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import reference, sdpa

_RUNNABLE: dict[str, ModuleType] = {"reference": reference, "sdpa": sdpa}
BACKENDS = ("reference", "sdpa", "triton")
CHOICES = (*BACKENDS, "auto")


def reasons_against(backend: str, *tensors: Tensor) -> list[str]:
    """Every reason why `backend` cannot run on these tensors; empty if it can."""
    if backend == "triton":
        return ["ptattn 0.1 has no Triton kernels yet"]
    return []


def check(backend: str) -> None:
    """Raise ValueError unless `backend` is a known name."""
    if backend not in CHOICES:
        raise ValueError(f"backend must be one of {', '.join(CHOICES)}; got {backend!r}")


def resolve(backend: str, *tensors: Tensor) -> str:
    """The backend that runs: the one named, or for `auto` triton where it can and else sdpa.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend cannot run here; the message lists every reason.
    """
    check(backend)
    if backend == "auto":
        return "sdpa" if reasons_against("triton", *tensors) else "triton"
    if reasons := reasons_against(backend, *tensors):
        raise RuntimeError(f"backend {backend!r} cannot run here: " + "; ".join(reasons))
    return backend


def load(backend: str) -> ModuleType:
    return _RUNNABLE[backend]
