"""Sums of the parts that several programs wrote, in a fixed order."""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import host
from .configs import Config
from .host import Need, Plan, planned


@triton.jit(do_not_specialize=("splits", "inner"))
def sum_splits(
    parts, out, splits, inner, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    """(outer, splits, inner) -> (outer, inner), both contiguous; one program per BLOCK of inner.

    Of a tile of ROWS parts each row adds up every ROWS'th part; the rows are added at the end.
    """
    inner = inner // ALIGN * ALIGN  # ALIGN divides it; untold of it, loads are narrow
    blocks = tl.cdiv(inner, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = column < inner
    total = tl.zeros([ROWS, BLOCK], parts.dtype.element_ty)
    for first in range(0, splits, ROWS):
        part = first + tl.arange(0, ROWS)
        offset = ((row * splits + part) * inner)[:, None] + column[None, :]
        total += tl.load(parts + offset, mask=(part < splits)[:, None] & valid[None, :], other=0.0)
    total = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + row * inner + column, total, mask=valid)


def sum_parts(parts: Tensor, out: Tensor) -> Tensor:
    """out = the sum of parts (outer, splits, inner) over its second axis; both contiguous."""
    _plan(*host.facts(parts, out), host.target(out)).start(parts, out)
    return out


@planned
def _plan(parts: Any, out: Any, target: tuple[str, str]) -> Plan:
    outer, splits, inner = parts[0]
    # Narrow tiles are many programs, tall ones many loads under way: a GPU is to be filled by both.
    rows, block = 64 if splits <= 64 else 256, 32
    programs = outer * host.cdiv(inner, block)
    constants = dict(ROWS=rows, BLOCK=block, ALIGN=math.gcd(16, inner))
    config = Config(warps=4 if rows == 64 else 8)
    return Plan(sum_splits, programs, splits, inner, config=config, **constants)


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
