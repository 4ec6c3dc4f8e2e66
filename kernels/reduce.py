"""Sums of the parts that several programs wrote, in a fixed order."""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import host
from .configs import Config
from .host import Gradients, Places, Plan, planned


@triton.jit(do_not_specialize=("splits", "lines", "inner", "out_b", "out_n"))
def sum_splits(
    parts, out, splits, lines, inner, out_b: tl.int64, out_n,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(outer, splits, lines, inner), contiguous -> (outer, lines, inner), of the strides out_b and
    out_n; one program per BLOCK of inner.

    Of a tile of ROWS parts each row adds up every ROWS'th part; the rows are added at the end.
    """
    inner = inner // ALIGN * ALIGN  # ALIGN divides it; untold of it, loads are narrow
    blocks = tl.cdiv(inner, BLOCK)
    line = tl.program_id(0) // blocks % lines
    row = (tl.program_id(0) // blocks // lines).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = column < inner
    total = tl.zeros([ROWS, BLOCK], parts.dtype.element_ty)
    for first in range(0, splits, ROWS):
        part = first + tl.arange(0, ROWS)
        offset = (((row * splits + part) * lines + line) * inner)[:, None] + column[None, :]
        total += tl.load(parts + offset, mask=(part < splits)[:, None] & valid[None, :], other=0.0)
    total = tl.sum(total, 0).to(out.dtype.element_ty)
    out += tl.multiple_of(row * out_b + line.to(tl.int64) * out_n, ALIGN)
    tl.store(out + column, total, mask=valid)


def sum_parts(parts: Tensor, out: Tensor) -> Tensor:
    """out = the sum of parts (outer, splits, inner) over its second axis, both contiguous; or of
    (outer, splits, lines, inner), where out has any strides of its first two axes."""
    _plan(*host.facts(parts, out), host.target(out)).start(parts, out)
    return out


@planned
def _plan(parts: Any, out: Any, target: tuple[str, str]) -> Plan:
    outer, splits, *middle, inner = parts[0]
    lines, strides = 1, (math.prod(middle) * inner, inner)
    if middle and out[1][:2] != strides:
        (lines,), strides = middle, out[1][:2]
    else:
        inner = strides[0]
    # Narrow tiles are many programs, tall ones many loads under way: a GPU is to be filled by both.
    rows, block = (4, 256) if splits <= 8 else (64, 32) if splits <= 64 else (256, 32)
    programs = outer * lines * host.cdiv(inner, block)
    constants = dict(ROWS=rows, BLOCK=block, ALIGN=math.gcd(8, inner, *strides))
    config = Config(warps=4 if rows <= 64 else 8)
    numbers = (splits, lines, inner, *strides)
    return Plan(sum_splits, programs, *numbers, config=config, **constants)


def splits_of(queries: int, blocks: int) -> int:
    """How many programs share a head's queries for the gradients of its keys, in `blocks` blocks.

    Enough to fill a GPU, few enough that their parts cost little. Depends on neither batch nor
    device: so that a sample's gradients have the same bits in every batch.
    """
    return max(1, min(host.cdiv(queries, 256), max(8, queries // 1024) // blocks))


def part_strides(k: Any, splits: int, into: Places) -> tuple[int, ...]:
    """Of the parts of the gradients of keys and values, and of the tokens within a part."""
    if splits == 1:
        return into.of_keys
    _, m, h, d = k[0]
    row = h * d * (2 if into.packed else 1)
    return m * row, row


class Parts:
    """dk and dv, in parts of fixed order where several programs share the queries.

    Args:
        into: where they go in the end.
        splits: how many parts.

    Attributes:
        k, v: what the kernels write to, as `part_strides` has it; None where one is not needed.
    """

    def __init__(self, into: Gradients, splits: int) -> None:
        self.k, self.v = into.k, into.v
        self._sums: list[tuple[Tensor, Tensor]] = []
        if splits == 1:
            return
        if into.packed and into.k is not None and into.v is not None:
            b, m, h, d = into.k.shape
            both = into.k.as_strided((b, m, 2 * h * d), (*into.k.stride()[:2], 1))
            self.k, self.v = self._parts(both, splits).view(b, splits, m, 2, h, d).unbind(3)
        else:
            self.k, self.v = [
                None if t is None else self._parts(t.flatten(2), splits) for t in (into.k, into.v)
            ]

    def _parts(self, out: Tensor, splits: int) -> Tensor:
        b, m, c = out.shape
        parts = host.empty(out, b, splits, m, c, dtype=host.accumulator(out.dtype))
        self._sums.append((parts, out))
        return parts

    def sum(self) -> None:
        """Add up what the kernels wrote."""
        for parts, out in self._sums:
            sum_parts(parts, out)
