"""Parameters' gradients, averaged over the ranks of a split once a backward pass is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .exchange import collectives, wait

BUCKET = 2**25  # bytes that are averaged by one collective


def average(parameters: Iterable[nn.Parameter], ranks: list[int], group: str) -> None:
    """Put the mean over ranks into every `.grad`, in the order of the parameters.

    A gradient that is equal on all ranks stays as it is: one averaged in an earlier backward pass,
    or by DDP. FSDP averages a sharded gradient over its mesh: it is left alone where that mesh has
    all of these ranks, and is averaged over them where it has not.

    Args:
        parameters: the same on every rank, with gradients of the same.
        ranks: of the group.
        group: its name.
    """
    for bucket in _buckets(_local_gradients(parameters, ranks)):
        total = wait(collectives.all_reduce(_flatten_dense_tensors(bucket), "sum", group))
        means = _unflatten_dense_tensors(total.div_(len(ranks)), bucket)
        torch._foreach_copy_(bucket, list(means))


def _local_gradients(parameters: Iterable[nn.Parameter], ranks: list[int]) -> Iterator[Tensor]:
    for parameter in dict.fromkeys(parameters):
        grad: Any = parameter.grad
        if hasattr(grad, "to_local"):  # a DTensor
            if set(ranks) <= set(grad.device_mesh.mesh.flatten().tolist()):
                continue  # these ranks hold parts of it, made of the gradients of all of them
            grad = grad.to_local()
        if grad is not None:
            yield grad


def _buckets(grads: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to BUCKET."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or size + grad.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.nbytes
    if bucket:
        yield bucket
