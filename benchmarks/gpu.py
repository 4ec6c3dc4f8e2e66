"""The one command for a CUDA GPU: every kernel, then blocks and models, checked and timed.

    python -m benchmarks.gpu [--out DIR] [--quick] [--only PATTERN] [--budget SECONDS]
    python -m benchmarks.gpu --tune

Writes DIR/gpu.json, gpu.md and gpu.png. The kernels, the most important first, get half of the
budget; the models of the paper's figures 2, 8 and 9, as latency and memory, get the rest. What is
not reached is listed. Exit status 1 if a result is wrong or a kernel fails, 2 without a GPU.
`--tune` times tile sizes instead and writes the best ones into kernels/configs.json.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ptattn.bench import command, harness, op_cases, session, timing
from ptattn.bench.command import FIGURE_SIZES, FIGURES
from ptattn.bench.floor import FORWARD, TASKS
from ptattn.bench.harness import Bench, Measurable
from ptattn.bench.op_run import Measured
from ptattn.bench.result import Result, Row
from ptattn.command_line import UsageError, now, open_folder
from ptattn.compare.cases import Size
from ptattn.compare.worker import Settings

BUDGET = 500.0  # seconds
KERNELS = 0.5  # their share of it
SETTINGS = Settings("cuda", "bf16", "triton")


def kernels(quick: bool) -> list[Measurable]:
    return [Measured(case) for case in op_cases.cases(quick)]


def blocks(quick: bool) -> list[Measurable]:
    """At equal width."""
    if quick:
        return [*command.model_cases("block", ["pt-dit-b", "dit-b"], [Size(512)], TASKS, SETTINGS)]
    return [*command.model_cases("block", FIGURES[3:6], FIGURE_SIZES[2:5], TASKS, SETTINGS)]


def models(quick: bool) -> list[Measurable]:
    """Of the figures."""
    if quick:
        return []
    whole = command.model_cases("model", FIGURES, FIGURE_SIZES, [FORWARD], SETTINGS)
    training = command.model_cases("model", FIGURES, FIGURE_SIZES[:3], TASKS[1:], SETTINGS)
    return [*whole, *training]


def select(cases: Sequence[Measurable], only: re.Pattern[str] | None) -> list[Measurable]:
    """The cases whose name the pattern matches."""
    return [case for case in cases if only is None or only.search(str(case))]


def found(quick: bool, only: re.Pattern[str] | None, bench: Bench) -> Iterator[list[Row]]:
    now = time.monotonic()
    first = replace(bench, deadline=now + KERNELS * (bench.deadline - now))
    eager = replace(bench, compiled=False)  # to compile dozens of blocks takes minutes
    return itertools.chain(
        harness.measure(select(kernels(quick), only), first),
        harness.measure(select(blocks(quick), only), bench),
        harness.measure(select(models(quick), only), eager),
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--quick", action="store_true", help="few cases, short times")
    parser.add_argument("--only", metavar="PATTERN", type=command.pattern,
                        help="cases whose name matches")  # fmt: skip
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
    every = [*kernels(args.quick), *blocks(args.quick), *models(args.quick)]
    if not select(every, args.only):
        print(f"no case matches {args.only.pattern!r}", file=sys.stderr)
        return 2
    try:
        open_folder(args.out)
    except UsageError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    clock = timing.GpuClock()
    rates = timing.rates(clock, "cuda")
    torch.cuda.empty_cache()
    typed = shlex.join(["python", "-m", "benchmarks.gpu", *argv])
    done = Result("gpu", asdict(SETTINGS), asdict(rates), typed, now())
    seconds = 0.05 if args.quick else 0.3
    bench = Bench(clock, rates, "cuda", "triton", deadline, seconds=seconds,
                  compiled=not args.quick)  # fmt: skip
    return session.carry_out(done, found(args.quick, args.only, bench), args.out)


if __name__ == "__main__":
    sys.exit(main())
