"""Compile every default configuration for GPUs that need not be there, and check what comes out.

    python -m benchmarks.aot [--arch sm90] [--only "bf16 D72"] [--json FILE]

On all architectures a kernel must build and fit the shared memory, and a forward kernel must not
spill. On sm90 none may spill or have a stack, but for `checks.SPILLS`, every matrix product must
run on wgmma, tiles must be loaded 16 bytes at a time, and two programs of an attention or of a
backward must fit a multiprocessor, but for `checks.ALONE`. Kernels in fp32 must only build and fit.
Exit status 1 if a check fails.

In the table, spills are in bytes (registers on AMD), "16-byte" has the loads that there are and
that the tiles take, "per block" the instructions that all warps of a program issue in the main loop
for 64 x 64 scores, or for a row of channels or a part of a sum, and "useful" is the share of the
multiplied numbers that is no padding.
"serial" stands where ptxas makes each wgmma wait for the one before. That fails no check: what
avoids it, loads that are not pipelined, may cost more.

Times are predicted for an H200, by `roofline`, at one sample of 16 heads and 128 x 128 tokens, or
8 x 64 x 64 tokens where the window has frames. Windows of attention are shifted by half. How far
such predictions are from what was measured: `python -m benchmarks.against`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import compiled, roofline
from benchmarks.checks import failures
from benchmarks.compiled import Compiled
from benchmarks.roofline import Prediction, Start, Work
from benchmarks.tables import Column, table
from ptattn.geometry import Triple, WindowGrid
from ptattn.kernels import attention, host, norm, pool
from ptattn.kernels.host import Launch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS, IMAGE, VIDEO = 16, (1, 128, 128), (8, 64, 64)
WINDOWS = ((1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16), (4, 16, 16))
# Of dense attention: queries, keys, masked. The last are proxies among themselves.
DENSE = (
    *((128 * 128, keys, False) for keys in (64, 128, 256, 768)),
    *((128 * 128, keys, True) for keys in (128, 256)),
    (768, 768, False),
)
CHANNELS = (384, 1152)
NORM_CHANNELS = (64, 1152, 1440, 4096)
HEAD_DIMS = {"bf16": (48, 64, 72, 128), "fp32": (72,)}


@dataclass(frozen=True)
class Case:
    """One operation, forward and backward; `width` is the head dim, or of means and norms the
    channels. `window` is that of the means, (1, 1, 1) for a norm with a modulation instead."""

    op: str  # "window", "dense", "mean" or "norm"
    dtype: str
    width: int
    window: Triple = (1, 1, 1)
    queries: int = 0
    keys: int = 0
    masked: bool = False

    def __str__(self) -> str:
        if self.op == "dense":
            return f"{self.queries} to {self.keys}{' masked' * self.masked}"
        size = "x".join(map(str, self.window))
        return {"window": size, "mean": f"mean {size}", "norm": f"norm {size}"}[self.op]

    @property
    def label(self) -> str:
        return f"{self.dtype} {'C' if self.op in ('mean', 'norm') else 'D'}{self.width}"

    @property
    def grid(self) -> Triple:
        return IMAGE if self.window[0] == 1 else VIDEO

    def launches(self, arch: str) -> list[Launch]:
        with host.record(arch) as launches:
            getattr(self, f"_{self.op}")()
        return launches

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")

    def _window(self) -> None:
        windows = WindowGrid(self.grid, self.window).shifted()
        qkv = self._empty(1, windows.num_tokens, 3, HEADS, self.width)
        scale = self.width**-0.5
        out, lse = attention.windowed(qkv, None, None, windows, scale)
        g = torch.empty_like(out)
        attention.windowed_backward(qkv, None, None, windows, scale, out, lse, g, (True,) * 3)

    def _dense(self) -> None:
        q = self._empty(1, self.queries, HEADS, self.width)
        kv = self._empty(1, self.keys, 2, HEADS, self.width)
        mask = torch.empty(1, self.keys, dtype=torch.bool, device="meta") if self.masked else None
        scale = self.width**-0.5
        out, lse = attention.dense(q, kv, None, mask, scale)
        g = torch.empty_like(out)
        attention.dense_backward(q, kv, None, mask, scale, out, lse, g, (True,) * 3)

    def _mean(self) -> None:
        windows = WindowGrid(self.grid, self.window)
        x = self._empty(1, windows.num_tokens, self.width)
        norm.means_backward(pool.window_mean(x, windows), windows)

    def _norm(self) -> None:
        """As the blocks have it: with the residual, and window means or a modulation."""
        windows = WindowGrid(self.grid, self.window) if self.window != (1, 1, 1) else None
        x, y = self._empty(2, 1, math.prod(self.grid), self.width).unbind()
        vectors = self._empty(1, 6, self.width).unbind(1)
        gate, shift, scale = vectors[:3] if windows is None else (vectors[0], None, None)
        if windows is None:
            total, normed = norm.forward(x, y, gate, shift, scale, 1e-6, x.dtype)
            means = None
        else:
            total, normed, means = pool.forward(x, y, gate, windows, 1e-6, x.dtype)
        upstream = (total, normed, means)
        need = (True, True, windows is None)
        norm.backward(total, y, gate, scale, *upstream, windows, 1e-6, need)


def cases() -> Iterator[Case]:
    for dtype, head_dims in HEAD_DIMS.items():
        for width in head_dims:
            for window in WINDOWS:
                yield Case("window", dtype, width, window)
            for queries, keys, masked in DENSE:
                yield Case("dense", dtype, width, queries=queries, keys=keys, masked=masked)
        for width, window in itertools.product(CHANNELS, WINDOWS):
            yield Case("mean", dtype, width, window)
            yield Case("norm", dtype, width, window)
        for width in NORM_CHANNELS:
            yield Case("norm", dtype, width)


@dataclass(frozen=True)
class Use:
    """A launch by its place among those of a case, as launches cannot pass between processes."""

    case: Case
    index: int

    def launch(self, arch: str) -> Launch:
        return self.case.launches(arch)[self.index]


@dataclass(frozen=True)
class Job:
    """One compilation, for all launches that share it."""

    arch: str
    kernel: str
    uses: tuple[Use, ...]
    dialect: str = "sass"

    @property
    def label(self) -> str:
        return f"{self.arch} {self.uses[0].case.label} {self.kernel} {self.uses[0].case}"


def jobs(arch: str, of: Iterable[Case], dialect: str = "sass") -> list[Job]:
    """Distinct compilations."""
    uses: dict[tuple[Any, ...], list[Use]] = {}
    for case in of:
        for index, recorded in enumerate(case.launches(arch)):
            code, config = compiled.source(recorded), recorded.config
            constants = str(code.constants)
            key = (code.name, str(code.signature), constants, config.warps, config.stages)
            uses.setdefault(key, []).append(Use(case, index))
    return [Job(arch, key[0], tuple(own), dialect) for key, own in uses.items()]


@dataclass(frozen=True)
class Timing:
    """Of one launch; seconds on an H200."""

    case: str
    programs: int
    work: Work
    predicted: Prediction | None  # where the kernel is compiled for it


@dataclass(frozen=True)
class Row:
    """A compilation, what it gave or why it failed, and every launch of it."""

    job: Job
    tile: str
    warps: int
    stages: int
    compiled: Compiled | None
    error: str
    timings: tuple[Timing, ...] = ()

    @property
    def per_sm(self) -> int | None:
        if self.compiled is None or self.job.arch != "sm90":
            return None
        registers, shared = self.compiled.resources.registers, self.compiled.shared
        return roofline.programs_per_sm(registers, shared, self.warps)

    @property
    def per_block(self) -> float | None:
        """Instructions of all warps in the main loop for 64 x 64 scores, or for one row."""
        code = self.compiled.code if self.compiled else None
        if code is None or code.loop is None or not self.timings[0].work.iterations:
            return None
        rows, *others = map(int, self.tile.split("x"))
        size = rows * (others or [rows])[0] / 64**2 if self.timings[0].work.padded else rows
        return code.loop.instructions * self.warps / code.unrolled / size


def run(job: Job) -> Row:
    first = job.uses[0].launch(job.arch)
    built, error = None, ""
    try:
        built = compiled.build(first, job.arch, job.dialect)
    except Exception as raised:  # whatever a compiler raises is this row's failed check
        error = f"{type(raised).__name__}: {raised}"
    sizes = [first.constants[name] for name in ("ROWS", "KEYS", "BLOCK") if name in first.constants]
    tile = "x".join(map(str, sizes))
    row = Row(job, tile, first.config.warps, first.config.stages, built, error)
    return replace(row, timings=tuple(_timing(use, row) for use in job.uses))


def _timing(use: Use, row: Row) -> Timing:
    recorded = use.launch(row.job.arch)
    work, start = roofline.work(recorded), start_of(recorded, row.compiled)
    predicted = start and roofline.predict(start)
    return Timing(f"{use.case.label} {use.case}", recorded.programs, work, predicted)


def start_of(recorded: Launch, built: Compiled | None) -> Start | None:
    """What the model takes of a launch; None where no machine code was read."""
    if built is None or built.code is None:
        return None
    warps, work = recorded.config.warps, roofline.work(recorded)
    per_sm = roofline.programs_per_sm(built.resources.registers, built.shared, warps)
    return Start(recorded.programs, warps, per_sm, work.bytes, work.iterations, built.code)


COLUMNS: tuple[Column[Row], ...] = (
    Column("arch", lambda row: row.job.arch),
    Column("width", lambda row: row.job.uses[0].case.label),
    Column("kernel", lambda row: row.job.kernel),
    Column("case", lambda row: str(row.job.uses[0].case)),
    Column("tile", lambda row: row.tile, narrow=False),
    Column("warps", lambda row: str(row.warps), narrow=False),
    Column("stages", lambda row: str(row.stages), narrow=False),
    Column("regs", lambda row: _of(row, lambda built: built.resources.registers)),
    Column("shared", lambda row: _of(row, lambda built: built.shared), narrow=False),
    Column("spill", lambda row: _of(row, lambda built: built.resources.spilled)),
    Column("wgmma", lambda row: _of(row, _wgmma), narrow=False),
    Column("16-byte", lambda row: _of(row, _wide_loads), narrow=False),
    Column("per SM", lambda row: _number(row.per_sm), narrow=False),
    Column("SM warps", lambda row: _number(row.per_sm and row.per_sm * row.warps), narrow=False),
    Column("per block", lambda row: _number(row.per_block), narrow=False),
    Column("useful", lambda row: f"{row.timings[0].work.useful_share:.0%}", narrow=False),
    Column("µs", lambda row: _microseconds(row.timings[0])),
    Column("build s", lambda row: _of(row, lambda built: f"{built.seconds:.1f}"), narrow=False),
    Column("check", lambda row: "FAILED" if failures(row) else "ok"),
)


def _of(row: Row, value: Callable[[Compiled], Any]) -> str:
    return "" if row.compiled is None else str(value(row.compiled))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _wgmma(built: Compiled) -> str:
    if built.tiles is None or built.tiles.on_wgmma + len(built.tiles.elsewhere) == 0:
        return ""
    if built.tiles.elsewhere or built.instructions.other_products:
        return "no"
    return "serial" if built.resources.serialized else "yes"


def _wide_loads(built: Compiled) -> str:
    if built.tiles is None or built.tiles.wide_loads == 0:
        return ""
    return f"{built.instructions.wide_loads}/{built.tiles.wide_loads}"


def _microseconds(timing: Timing) -> str:
    return "" if timing.predicted is None else f"{timing.predicted.total * 1e6:.1f}"


def as_json(row: Row) -> dict[str, Any]:
    job = row.job
    return {
        "label": job.label,
        "arch": job.arch,
        "kernel": job.kernel,
        "tile": row.tile,
        "warps": row.warps,
        "stages": row.stages,
        "programs_per_sm": row.per_sm,
        "warps_per_sm": row.per_sm and row.per_sm * row.warps,
        "instructions_per_block": row.per_block,
        "compiled": row.compiled and asdict(row.compiled),
        "failures": failures(row),
        "launches": [asdict(timing) for timing in row.timings],
    }


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", nargs="+", choices=compiled.TARGETS, default=[*compiled.TARGETS])
    parser.add_argument(
        "--only", metavar="REGEX", type=pattern, default="", help="cases, such as 'bf16 D72'"
    )
    parser.add_argument("--ptx", action="store_true", help="read PTX, not SASS: sooner done")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def select(args: argparse.Namespace) -> list[Job]:
    of = [case for case in cases() if args.only.search(f"{case.label} {case}")]
    if not of:
        raise SystemExit(f"no case matches {args.only.pattern!r}; one is {next(cases()).label!r}")
    dialect = "ptx" if args.ptx else "sass"
    return [job for arch in args.arch for job in jobs(arch, of, dialect)]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if host.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    selected = select(args)
    with ProcessPoolExecutor(args.processes) as pool:
        rows = []
        for row in pool.map(run, selected):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r{len(rows)} of {len(selected)} compiled", end="\r", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps([as_json(row) for row in rows], indent=1), encoding="utf-8")
    print(table(rows, COLUMNS, shutil.get_terminal_size().columns))
    failed = [f"{row.job.label}: {text}" for row in rows for text in failures(row)]
    print(f"\nCompiled: {len(rows)}. Failed checks: {len(failed)}.", *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
