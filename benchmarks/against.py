"""What the gate's model predicts for the operations that a GPU has measured.

    python -m benchmarks.against RESULT.json [--only REGEX]

Of every operation of `ptattn bench ops` or `gpu` in that file: its measured time, and what the
model of `roofline` predicts for the kernels of this checkout, compiled now for sm_90; then how
often that is right. No GPU is needed. A file says which commit's kernels it measured.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from benchmarks import aot, compiled, roofline
from benchmarks.compiled import Compiled
from benchmarks.roofline import Start
from ptattn.bench import op_workloads, results
from ptattn.bench.results import OK, Row
from ptattn.kernels import host
from ptattn.kernels.host import Launch

ARCH = "sm90"
CLOSE = 1.5
Key = tuple[str, str]  # workload and task


@dataclass(frozen=True)
class Use:
    """One launch of a workload and task, by its place: launches cannot pass between processes."""

    key: Key
    index: int

    def launch(self) -> Launch:
        return launches(*self.key)[self.index]


def launches(name: str, task: str) -> list[Launch]:
    """What a task of an operation would start."""
    (operation,) = (o for o in op_workloads.operations() if str(o) == name)
    inputs = operation.inputs("meta")
    # What has no data is sent to the fake kernels, unless nothing seems to look.
    with mock.patch("ptattn.backends.operator.observed", return_value=False):
        with host.record(ARCH) as forward, torch.set_grad_enabled(task != "forward"):
            outputs = operation.call("triton", inputs.tensors, inputs.key_mask)
        if task == "forward":
            return forward
        with host.record(ARCH) as backward:
            torch.autograd.grad(outputs, inputs.tensors, inputs.upstream)
        return backward


def starts_now(keys: Iterable[Key], processes: int) -> dict[Key, list[Start]]:
    """Of this checkout's kernels; each is compiled once."""
    recorded = {key: launches(*key) for key in keys}
    first: dict[str, Use] = {}
    for key, found in recorded.items():
        for index, launch in enumerate(found):
            first.setdefault(_compilation(launch), Use(key, index))
    # A forked process cannot run autograd if its parent has.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        built = dict(zip(first, pool.map(_build, first.values()), strict=True))
    return {
        key: [aot.start_of(launch, built[_compilation(launch)]) for launch in found]
        for key, found in recorded.items()
    }


def _build(use: Use) -> Compiled:
    return compiled.build(use.launch(), ARCH)


def _compilation(launch: Launch) -> str:
    code, config = compiled.source(launch), launch.config
    return f"{code.name} {code.signature} {code.constants} {config.warps} {config.stages}"


def report(rows: Sequence[Row], starts: dict[Key, list[Start]], copy_rate: float) -> Iterator[str]:
    """In Markdown."""
    yield "| operation | task | measured, µs | predicted, µs | ÷ measured |"
    yield "| --- | --- | ---: | ---: | ---: |"
    ratios = []
    for row in rows:
        seconds = row.seconds or math.nan
        found = starts[row.workload, row.task]
        predicted = sum(roofline.predict(start, copy_rate).total for start in found)
        ratios.append(predicted / seconds)
        cells = (row.workload, row.task, *(f"{t * 1e6:,.1f}" for t in (seconds, predicted)))
        yield f"| {' | '.join(cells)} | {ratios[-1]:.2f} |"
    yield ""
    yield summary(ratios)


def summary(ratios: Sequence[float]) -> str:
    near = [sum(1 / limit <= r <= limit for r in ratios) for limit in (CLOSE, 1.25)]
    mean = math.exp(sum(math.log(r) for r in ratios) / len(ratios))
    return (
        f"Predicted over measured, in {len(ratios)} rows: within {CLOSE}× in {near[0]} "
        f"({near[0] / len(ratios):.0%}), within 1.25× in {near[1]} "
        f"({near[1] / len(ratios):.0%}), from {min(ratios):.2f} to {max(ratios):.2f}, "
        f"geometric mean {mean:.2f}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="a result of `ptattn bench ops` or `gpu`")
    parser.add_argument("--only", metavar="REGEX", type=aot.pattern, default="")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    result = results.load(args.file)
    rows = [
        row
        for row in result.rows
        if "op" in row.facts and not row.baseline and row.status == OK
        if args.only.search(f"{row.workload} {row.task}")
    ]
    if not rows:
        sys.exit(f"no operation of ours in {args.file} matches {args.only.pattern!r}")
    if host.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    starts = starts_now([(row.workload, row.task) for row in rows], args.processes)
    print(*report(rows, starts, result.rates["copy"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
