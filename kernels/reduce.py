"""Sums of the parts that several programs wrote, in a fixed order."""

import triton
import triton.language as tl


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
