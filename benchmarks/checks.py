"""What the gate demands of a compiled kernel; `benchmarks.aot` says it in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks import roofline
from benchmarks.compiled import Compiled

if TYPE_CHECKING:
    from benchmarks.aot import Row

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
    arch, kernel, built = row.arch, row.kernel, row.built
    if isinstance(built, str):
        return [f"does not build: {built}"]
    limit, resources = roofline.SHARED_LIMITS[arch], built.resources
    found = []
    if built.shared > limit:
        found.append(f"{built.shared} bytes of shared memory, of {limit}")
    if kernel.startswith(roofline.PRODUCTS) and resources.registers < TRAP:
        found.append(f"{resources.registers} registers: ptxas made a trap of it")
    if row.case.dtype == "fp32":
        return found
    held = kernel.endswith("_forward") or arch == "sm90"
    if held and max(resources.spilled, resources.stack) > _excused(row):
        unit = "registers" if arch.startswith("gfx") else "bytes"
        found.append(f"spills {resources.spilled} {unit}; stack of {resources.stack} bytes")
    if arch == "sm90":
        found += _failures_on_hopper(row, built)
    return found


def _excused(row: Row) -> int:
    """The bytes that a kernel may spill."""
    found = [most for pattern, (most, _) in SPILLS.items() if re.search(pattern, row.label)]
    return max(found, default=0) if row.arch == "sm90" else 0


def _failures_on_hopper(row: Row, built: Compiled) -> Iterator[str]:
    found = built.hopper
    if found.elsewhere or found.older or found.wgmma < found.on_wgmma:
        yield (
            f"{found.wgmma} wgmma instructions and {found.older} older ones for {found.on_wgmma} "
            f"products on wgmma; not on it: {list(found.elsewhere)}"
        )
    if found.wide_loads < found.tile_loads:
        yield f"{found.wide_loads} loads of 16 bytes; its tiles take {found.tile_loads}"
    watched = row.kernel.startswith(roofline.PRODUCTS) or row.kernel.endswith("_backward")
    excused = any(re.search(pattern, row.label) for pattern in ALONE)
    warps = row.launch.config.warps
    per_sm = roofline.programs_per_sm(built.resources.registers, built.shared, warps)
    if watched and per_sm < 2 and not excused:
        yield f"{per_sm} program per multiprocessor"
