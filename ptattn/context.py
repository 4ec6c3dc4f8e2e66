"""What torch is doing around a call: autocast, transforms, and who looks at operators.

These are asked at every call, never remembered, and are the one home of torch's private queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast has for x's device, or None where it is off."""
    kind = x.device.type
    # Asking which devices have autocast is more than torch 2.11 can compile; "meta" has none.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


profiled = torch._C._autograd._profiler_enabled


def backward_pass() -> int:
    """The number of the backward pass that calls this code, such as a checkpoint's; or -1."""
    return torch._C._current_graph_task_id()


_PLAIN = {Tensor, nn.Parameter}


def saves_as_usual() -> bool:
    """Whether torch saves what a backward will need, and nobody else decides about that: no
    compiler, no transform, and no hooks for saved tensors, as checkpointing and offloading set."""
    hooks: Any = torch._C._autograd
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and hooks._saved_tensors_hooks_is_enabled()
        and hooks._top_saved_tensors_default_hooks(False) is None
    )


def intercepted() -> bool:
    """Whether operators go to torch.compile or a dispatch mode, such as the FLOP counter."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def observed(*tensors: Tensor | None) -> bool:
    """Whether a call must go through torch's dispatcher, as somebody looks at what passes there.

    That is torch.compile and other tracers, every dispatch mode (FLOP counting, selective
    checkpointing, fake tensors), transforms, tensors of other classes and of "meta", and tensors
    whose memory is not what they say: batches of gradients, and views not yet negated. Not the
    profiler, which is to see what runs without it.
    """
    given = [t for t in tensors if t is not None]
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or not _PLAIN.issuperset(map(type, given))
        or given[0].is_meta
        or any(map(torch._C._functorch.is_legacy_batchedtensor, given))
        or any(map(Tensor.is_neg, given))
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether something must run before or after its forward, such as what gathers sharded weights
    and what brings offloaded ones."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__
