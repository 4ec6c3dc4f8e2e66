"""Sums of the parts that several programs wrote, in a fixed order."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import host
from .configs import Config
from .host import Need, Plan, planned


@triton.jit(do_not_specialize=("splits", "inner"))
def sum_splits(parts, out, splits, inner, BLOCK: tl.constexpr):
    """(outer, splits, inner) -> (outer, inner), both contiguous; one program per BLOCK of inner."""
    blocks = tl.cdiv(inner, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = column < inner
    parts += row * splits * inner + column
    total = tl.load(parts, mask=valid, other=0.0)
    for _ in range(1, splits):
        parts += inner
        total += tl.load(parts, mask=valid, other=0.0)
    tl.store(out + row * inner + column, total.to(out.dtype.element_ty), mask=valid)


def sum_parts(parts: Tensor, out: Tensor) -> Tensor:
    """out = the sum of parts (outer, splits, inner) over its second axis; both contiguous."""
    _plan(*host.facts(parts, out), host.target(out)).start(parts, out)
    return out


@planned
def _plan(parts: Any, out: Any, target: tuple[str, str]) -> Plan:
    outer, splits, inner = parts[0]
    block = 1024
    programs = outer * host.cdiv(inner, block)
    return Plan(sum_splits, programs, splits, inner, BLOCK=block, config=Config(warps=4))


def splits_of(queries: int, blocks: int) -> int:
    """How many programs share a head's queries for the gradients of its keys, in `blocks` blocks.

    Enough to fill a GPU, few enough that their parts cost little. Depends on neither batch nor
    device: so that a sample's gradients have the same bits in every batch.
    """
    return max(1, min(host.cdiv(queries, 256), max(8, queries // 1024) // blocks))


class Parts:
    """dk and dv, in parts of fixed order where several programs share the queries.

    Args:
        k: the keys.
        splits: how many parts.
        need: of the gradients of queries, keys and values, which are needed.
    """

    def __init__(self, k: Tensor, splits: int, need: Need) -> None:
        self.k, self.splits = k, splits
        dtype = k.dtype if splits == 1 else host.accumulator(k.dtype)
        b, m, h, d = k.shape
        self.tensors = [
            host.empty(k, b, splits, m * h * d, dtype=dtype) if needed else None
            for needed in need[1:]
        ]

    def or_(self, unused: Tensor) -> list[Tensor]:
        """What kernels write to; `unused` where there is nothing to write."""
        return [unused if parts is None else parts for parts in self.tensors]

    def sums(self) -> list[Tensor | None]:
        """The gradients; None where one is not needed."""
        return [None if parts is None else self._sum(parts) for parts in self.tensors]

    def _sum(self, parts: Tensor) -> Tensor:
        if self.splits == 1:
            return parts.view(self.k.shape)
        return sum_parts(parts, host.empty(self.k, *self.k.shape))
