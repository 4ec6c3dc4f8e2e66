"""Compile every default configuration for GPUs that need not be there, and check what comes out.

    python -m benchmarks.aot [--arch sm90] [--only "bf16 D72"] [--json FILE]

On all architectures a kernel must build and fit the shared memory, and a forward kernel must not
spill. On sm90 none may spill or have a stack, but for `checks.SPILLS`, every matrix product must
run on wgmma, tiles must be loaded 16 bytes at a time, and two programs of an attention or of a
backward must fit a multiprocessor, but for `checks.ALONE`. Kernels in fp32 must only build and fit.
Exit status 1 if a check fails.

In the table, spills are in bytes (registers on AMD), "16-byte" has the loads that there are and
that the tiles take, "per SM" the programs that a multiprocessor holds.
"serial" stands where ptxas makes each wgmma wait for the one before. That fails no check: what
avoids it, loads that are not pipelined, may cost more.

Times are predicted for an H200, by `roofline`, at one sample of 16 heads and 128 x 128 tokens, or
8 x 64 x 64 tokens where the window has frames, or the queries that the case has. Windows of
attention are shifted by half. How far such predictions are from what was measured:
`python -m benchmarks.against`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import compiled, roofline
from benchmarks.checks import failures
from benchmarks.compiled import Compiled
from benchmarks.tables import table
from ptattn.bench.command import pattern
from ptattn.bench.op_workloads import DENSE, TASKS, WINDOWED, Operation
from ptattn.geometry import Triple
from ptattn.kernels.host import Launch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS, IMAGE, VIDEO = 16, (1, 128, 128), (8, 64, 64)
WINDOWS = ((1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16), (4, 16, 16))
# Of dense attention: 64, 128, 256 and 768 keys, masked, and proxies among themselves.
KEYS = (
    *(("cross", IMAGE, window, False) for window in ((1, 16, 16), (1, 16, 8), (1, 8, 8))),
    ("cross", (3, 64, 64), (1, 4, 4), False),
    *(("cross", IMAGE, window, True) for window in ((1, 16, 8), (1, 8, 8))),
    ("proxy", (3, 64, 64), (1, 4, 4), False),
)
CHANNELS = (384, 1152)
NORM_CHANNELS = (64, 1152, 1440, 4096)
HEAD_DIMS = {"bf16": (48, 64, 72, 128), "fp32": (72,)}


@dataclass(frozen=True)
class Case:
    """An operation, forward and backward, in a dtype, with a key mask or without."""

    operation: Operation
    dtype: str = "bf16"
    masked: bool = False

    def __str__(self) -> str:
        of = self.operation
        if of.op in DENSE:
            return f"{of.queries} to {of.keys}{' masked' * self.masked}"
        size = "x".join(map(str, of.window))
        return size if of.op in WINDOWED else f"{of.op} {size}"

    @property
    def width(self) -> str:
        of = self.operation
        attention = of.op in DENSE or of.op in WINDOWED
        return f"{self.dtype} {f'D{of.head_dim}' if attention else f'C{of.channels}'}"

    def launches(self, arch: str) -> list[Launch]:
        of, mask = self.operation, None
        if self.masked:
            mask = torch.empty(of.batch, of.keys, dtype=torch.bool, device="meta")
        found = (compiled.launches(of, task, arch, DTYPES[self.dtype], mask) for task in TASKS)
        return [launch for own in found for launch in own]


def _operation(op: str, head_dim: int, window: Triple, grid: Triple | None = None) -> Operation:
    grid = grid or (IMAGE if window[0] == 1 else VIDEO)
    return Operation(op, "gate", "", grid, window, HEADS, head_dim)


def cases() -> Iterator[Case]:
    for dtype, head_dims in HEAD_DIMS.items():
        for head_dim in head_dims:
            for window in WINDOWS:
                yield Case(_operation("shifted", head_dim, window), dtype)
            for op, grid, window, masked in KEYS:
                yield Case(_operation(op, head_dim, window, grid), dtype, masked)
        for channels, window in itertools.product(CHANNELS, WINDOWS):
            yield Case(_operation("mean", channels // HEADS, window), dtype)
            yield Case(_operation("norm-pool", channels // HEADS, window), dtype)
        for channels in NORM_CHANNELS:
            yield Case(_operation("norm", channels // HEADS, (1, 1, 1)), dtype)


@dataclass(frozen=True)
class Row:
    """A compilation, for the first launch that needs it: what it gave, or why it failed."""

    arch: str
    case: Case
    launch: Launch
    built: Compiled | str

    @property
    def kernel(self) -> str:
        return self.launch.kernel.__name__

    @property
    def label(self) -> str:
        return f"{self.arch} {self.case.width} {self.kernel} {self.case}"


def rows(arch: str, of: Sequence[Case]) -> Iterator[Row]:
    first: dict[str, tuple[Case, Launch]] = {}
    for case in of:
        for launch in case.launches(arch):
            first.setdefault(compiled.key(launch), (case, launch))
    built = compiled.build_all([launch for _, launch in first.values()], arch)
    for (case, launch), one in zip(first.values(), built, strict=True):
        yield Row(arch, case, launch, one)


def figures(row: Row) -> dict[str, Any]:
    """What the table shows, and the file has too."""
    launch, built = row.launch, row.built
    tile = (str(launch.constants.get(name, "")) for name in ("ROWS", "KEYS", "BLOCK"))
    found: dict[str, Any] = {
        "arch": row.arch,
        "width": row.case.width,
        "kernel": row.kernel,
        "case": str(row.case),
        "tile": "x".join(filter(None, tile)),
        "warps": launch.config.warps,
        "stages": launch.config.stages,
    }
    if isinstance(built, Compiled):
        known = built.resources
        found |= {"regs": known.registers, "shared": built.shared, "spill": known.spilled}
        if built.code is not None:
            start = roofline.start(launch, built)
            found |= {
                "wgmma": _wgmma(built),
                "16-byte": f"{built.hopper.wide_loads}/{built.hopper.tile_loads}",
                "per SM": start.per_sm,
                "µs": round(roofline.predict(start) * 1e6, 1),
            }
    return found | {"check": "FAILED" if failures(row) else "ok"}


def _wgmma(built: Compiled) -> str:
    if built.hopper.elsewhere or built.hopper.older:
        return "no"
    if not built.hopper.on_wgmma:
        return ""
    return "serial" if built.resources.serialized else "yes"


def as_json(row: Row) -> dict[str, Any]:
    known = row.built if isinstance(row.built, str) else asdict(row.built)
    return figures(row) | {"label": row.label, "compiled": known, "failures": failures(row)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", nargs="+", choices=compiled.TARGETS, default=[*compiled.TARGETS])
    parser.add_argument("--only", metavar="REGEX", type=pattern, default=re.compile(""),
                        help="cases, such as 'bf16 D72'")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    chosen = [case for case in cases() if args.only.search(f"{case.width} {case}")]
    if not chosen:
        parser.error(f"no case matches {args.only.pattern!r}; one is {next(cases()).width!r}")
    found = [row for arch in args.arch for row in rows(arch, chosen)]
    if args.json:
        text = json.dumps([as_json(row) for row in found], indent=1)
        args.json.write_text(text, encoding="utf-8")
    shown = [figures(row) for row in found]
    titles = [*max(shown, key=len)]
    print(table(titles, ([one.get(title, "") for title in titles] for one in shown)))
    failed = [f"{row.label}: {text}" for row in found for text in failures(row)]
    print(f"\nCompiled: {len(found)}. Failed checks: {len(failed)}.", *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
