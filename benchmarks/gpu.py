"""Every kernel at the paper's shapes on a CUDA GPU: checked, then timed against floor and peers.

    python -m benchmarks.gpu [--out DIR] [--quick] [--only PATTERN] [--budget SECONDS]
    python -m benchmarks.gpu --tune

Writes DIR/gpu.json and DIR/gpu.md. Cases run in the order of their importance until the budget is
spent; the rest are listed. Exit status 1 if a result is wrong or a kernel fails, 2 without a GPU.
`--tune` times tile sizes instead and writes the best ones into kernels/configs.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_cases, gpu_report, gpu_run, timing
from benchmarks.gpu_cases import Case
from benchmarks.gpu_run import ERROR, FAILED, NOT_REACHED, Bench, Row
from ptattn import environment

BUDGET = 500.0  # seconds
COMPILE_RESERVE = 100.0  # left of the budget, for an opponent that torch.compile makes
COMPILED = tuple(
    f"{op} XL {size} w{window} b1"
    for size, window in (("1024 px", "1x8x8"), ("2048 px", "1x16x16"))
    for op in ("window", "shifted", "pool")
)


def select(quick: bool, only: str | None) -> list[Case]:
    """The cases whose name the pattern matches."""
    pattern = re.compile(only or "")
    return [case for case in gpu_cases.cases(quick) if pattern.search(str(case))]


def measure(
    cases: Sequence[Case], bench: Bench, deadline: float, *, compiled: bool = True
) -> Iterator[list[Row]]:
    """The rows of every case in turn; those that come after the deadline are not measured."""
    for case in cases:
        left = deadline - time.monotonic()
        if left <= 0:
            yield gpu_run.rows(case, NOT_REACHED)
            continue
        patient = compiled and left > COMPILE_RESERVE and str(case) in COMPILED
        yield gpu_run.run(case, bench, compiled=patient)


def facts(argv: Sequence[str]) -> dict[str, Any]:
    """What the times depend on: machine, versions, date, command."""
    command = shlex.join(["python", "-m", "benchmarks.gpu", *argv])
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**environment.describe(), "cuda": torch.version.cuda, "date": date, "command": command}


def write(out: Path, known: dict[str, Any], rates: timing.Rates, rows: Sequence[Row]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "environment": known,
        "rates": vars(rates),
        "rows": [gpu_run.as_dict(row) for row in rows],
        "targets": gpu_report.verdicts(rows),
        "omissions": gpu_report.omissions(rows),
    }
    (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = gpu_report.markdown(known, rates, rows)
    (out / "gpu.md").write_text(text, encoding="utf-8")


def status(rows: Sequence[Row]) -> int:
    return int(any(row.status in (FAILED, ERROR) for row in rows))


def report(
    found: Iterator[list[Row]], out: Path, known: dict[str, Any], rates: timing.Rates
) -> int:
    """Print rows as they come, write all files whatever ends the run, and say what was met."""
    rows: list[Row] = []
    written = time.monotonic()
    try:
        for new in found:
            rows += new
            for row in new:
                if row.status != NOT_REACHED:
                    print("  ".join(filter(None, gpu_report.cells(row))), flush=True)
            if time.monotonic() - written > 30:  # what a killed run leaves behind
                write(out, known, rates, rows)
                written = time.monotonic()
    finally:
        write(out, known, rates, rows)
    print("\n".join(["", *gpu_report.verdicts(rows), *gpu_report.omissions(rows)]))
    print(f"\n{gpu_report.summary(rows)}; written to {out}/gpu.json and gpu.md")
    return status(rows)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--quick", action="store_true", help="few cases, short times")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name matches")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds (%(default)s)")
    parser.add_argument("--tune", action="store_true", help="find tile sizes instead")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    deadline = time.monotonic() + args.budget
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU, and torch finds none", file=sys.stderr)
        return 2
    if args.tune:
        from benchmarks import tune

        return tune.main(deadline, only=args.only)
    cases = select(args.quick, args.only)
    if not cases:
        print(f"no case matches {args.only!r}", file=sys.stderr)
        return 2
    known, clock = facts(argv), timing.GpuClock()
    rates = timing.rates(clock, "cuda")
    torch.cuda.empty_cache()
    print(f"copy {rates.copy / 1e12:.2f} TB/s, product {rates.products / 1e12:.0f} TFLOP/s")
    bench = Bench(clock, rates, "cuda", seconds=0.05 if args.quick else 0.3)
    found = measure(cases, bench, deadline, compiled=not args.quick)
    return report(found, args.out, known, rates)


if __name__ == "__main__":
    sys.exit(main())
