"""What the gate demands of a compiled kernel; `benchmarks.aot` says it in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks import roofline
from benchmarks.compiled import Compiled

if TYPE_CHECKING:
    from benchmarks.aot import Job, Row

# Kernels that may be alone on their multiprocessor, by a pattern of their labels, and why. What was
# tried was compiled with triton 3.6 on 2026-11-26.
ALONE = {
    r"D(72|128) window_backward 1x[24]x[24]": "windows that share a tile: 4 warps spill",
    r"few_keys_backward 16384 to 128": "65 to 128 keys: their gradients fill the registers of 8 "
    "warps, which an H200 measured faster than two programs of 4",
    r"D128 few_keys_backward": "head dim 128: 4 warps spill",
    r"D128 flash_backward_kv \dx16x16": "head dim 128: 4 warps spill, with 32 rows too",
}

# Kernels that may spill on sm90, the bytes of the largest spill, and why.
SPILLS = {
    r"D(64|72) few_keys_backward 16384 to 128": (
        388,
        "65 to 128 keys: 128 queries by 8 warps took 149 and 409 µs on an H200 (head dim 72, 120 "
        "keys, 16,384 and 49,152 queries), 64 by 4 warps 157 and 429, without a spill 216 and 610",
    ),
    r"D128 few_keys_backward 16384 to 128": (608, "the same tiles, not measured"),
}

# Fewer registers than an attention can do with. Triton 3.6 turned a backward with 128 keys into a
# trap on sm100, without an error.
TRAP = 32


def failures(row: Row) -> list[str]:
    """The checks that a row fails, each in words."""
    job, built = row.job, row.compiled
    if built is None:
        return [f"does not build: {row.error}"]
    limit = roofline.SHARED_LIMITS[job.arch]
    found = []
    if built.shared > limit:
        found.append(f"{built.shared} bytes of shared memory, of {limit}")
    if job.kernel in roofline.PRODUCTS and built.resources.registers < TRAP:
        found.append(f"{built.resources.registers} registers: ptxas made a trap of it")
    if job.uses[0].case.dtype == "fp32":
        return found
    forward = job.kernel.endswith("_forward")
    resources = built.resources
    held = forward or job.arch == "sm90"
    if held and max(resources.spilled, resources.stack) > _excused(job):
        unit = "registers" if job.arch.startswith("gfx") else "bytes"
        found.append(f"spills {resources.spilled} {unit}; stack of {resources.stack} bytes")
    if job.arch == "sm90":
        found += _failures_on_hopper(row, built)
    return found


def _excused(job: Job) -> int:
    """The bytes that a kernel may spill."""
    found = [most for pattern, (most, _) in SPILLS.items() if re.search(pattern, job.label)]
    return max(found, default=0) if job.arch == "sm90" else 0


def _failures_on_hopper(row: Row, built: Compiled) -> Iterator[str]:
    instructions, tiles = built.instructions, built.tiles
    if tiles.elsewhere or instructions.other_products or instructions.wgmma < tiles.on_wgmma:
        yield (
            f"{instructions.wgmma} wgmma instructions and {instructions.other_products} older ones "
            f"for {tiles.on_wgmma} products on wgmma; not on it: {list(tiles.elsewhere)}"
        )
    if instructions.wide_loads < tiles.wide_loads:
        yield f"{instructions.wide_loads} loads of 16 bytes; its tiles take {tiles.wide_loads}"
    kernel = row.job.kernel
    watched = kernel in roofline.PRODUCTS or "_backward" in kernel
    excused = any(re.search(pattern, row.job.label) for pattern in ALONE)
    if watched and row.per_sm < 2 and not excused:
        yield f"{row.per_sm} program per multiprocessor"
