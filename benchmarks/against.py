"""What the gate's model predicts for the operations that a GPU has measured.

    python -m benchmarks.against benchmarks/results/h200-2026-11-26/ops.json [--only REGEX]

Of every case of `ptattn bench ops` in that file: its measured time; what the model of `roofline`
predicts for the kernels that ran then, from `launches.json` beside the file, which keeps what they
were compiled to; and what it predicts for the kernels of this checkout, compiled now for sm_90.
Then how often the prediction is right, and what the checkout's would mean for the `goals`. No GPU
is needed.

A measured time is the median, or, with a "~", the 20 % quantile where the 80 % one is more than
half above it: there the clock caught the host. A checkout's time is predicted twice: by the model,
and "scaled", as the measured time times the model's now over the model's then, in which what the
model gets wrong of a kernel cancels.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import aot, compiled, goals, roofline
from benchmarks.compiled import Compiled
from benchmarks.roofline import Start
from benchmarks.sass import Code, Part
from ptattn.bench import op_cases
from ptattn.bench.result import OK
from ptattn.kernels import host
from ptattn.kernels.host import Launch

ARCH = "sm90"
NOISY, CLOSE = 1.5, 1.5
Key = tuple[str, str]  # case and task


@dataclass(frozen=True)
class Measured:
    """An operation's row; seconds."""

    case: str
    task: str
    seconds: float
    noisy: bool
    floor: float

    @property
    def key(self) -> Key:
        return self.case, self.task


@dataclass(frozen=True)
class Compared:
    """A measured row, and predictions of its kernels then and now; None where they are unknown."""

    measured: Measured
    then: float | None
    now: float | None

    @property
    def ratio(self) -> float | None:
        """Predicted over measured, of the kernels that were."""
        return None if self.then is None else self.then / self.measured.seconds

    @property
    def scaled(self) -> float | None:
        """What the kernels of now would have been measured at."""
        if self.then is None or self.now is None:
            return None
        return self.measured.seconds * self.now / self.then


def measured(result: dict[str, Any]) -> list[Measured]:
    """Of ours, by `ptattn bench ops`."""
    return [_measured(row) for row in result["rows"] if row["ours"] and row["status"] == OK]


def _measured(row: dict[str, Any]) -> Measured:
    timing = row["timing"]
    noisy = timing["high"] > NOISY * timing["low"]
    seconds = timing["low" if noisy else "median"]
    return Measured(row["case"], row["task"], seconds, noisy, row["floor"])


# The kernels of then.


def starts_of(facts: dict[str, Any]) -> dict[Key, list[Start]]:
    """Of a launches.json, the launches of each case and task."""
    return {
        (row["case"], row["task"]): [
            _start(facts["kernels"][launch["kernel"]], launch) for launch in row["launches"]
        ]
        for row in facts["rows"]
    }


def _start(kernel: dict[str, Any], launch: dict[str, Any]) -> Start:
    once, loop, unrolled = (kernel["code"][name] for name in ("once", "loop", "unrolled"))
    code = Code(Part(**once), loop and Part(**loop), unrolled)
    warps = kernel["warps"]
    per_sm = roofline.programs_per_sm(kernel["registers"], kernel["shared"], warps)
    programs, size, iterations = (launch[name] for name in ("programs", "bytes", "iterations"))
    return Start(programs, warps, per_sm, size, iterations, code)


# The kernels of now.


@dataclass(frozen=True)
class Use:
    """One launch of a case and task, by its place: launches cannot pass between processes."""

    key: Key
    index: int

    def launch(self) -> Launch:
        return launches(*self.key)[self.index]


def launches(name: str, task: str) -> list[Launch]:
    """What a task of a case would start."""
    (case,) = (case for case in op_cases.cases() if str(case) == name)
    inputs = case.inputs("meta")
    # What has no data is sent to the fake kernels, unless nothing seems to look.
    with mock.patch("ptattn.backends.operator.observed", return_value=False):
        with host.record(ARCH) as forward, torch.set_grad_enabled(task != "forward"):
            outputs = case.call("triton", inputs.tensors, inputs.key_mask)
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


# What comes of it.


def compare(
    rows: Sequence[Measured], then: dict[Key, list[Start]], now: dict[Key, list[Start]],
    copy_rate: float,
) -> list[Compared]:  # fmt: skip
    def predicted(starts: list[Start] | None) -> float | None:
        if starts is None:
            return None
        return sum(roofline.predict(start, copy_rate).total for start in starts)

    return [
        Compared(row, predicted(then.get(row.key)), predicted(now.get(row.key))) for row in rows
    ]


def report(rows: Sequence[Compared]) -> Iterator[str]:
    """In Markdown."""
    yield "| case | task | measured | predicted then | ÷ measured | predicted now | scaled |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for row in rows:
        noise = "~" if row.measured.noisy else ""
        cells = (
            row.measured.case,
            row.measured.task,
            noise + microseconds(row.measured.seconds),
            microseconds(row.then),
            "–" if row.ratio is None else f"{row.ratio:.2f}",
            microseconds(row.now),
            microseconds(row.scaled),
        )
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield summary([row.ratio for row in rows if row.ratio is not None])


def summary(ratios: Sequence[float]) -> str:
    if not ratios:
        return "None of these kernels' machine code is known."
    near = [sum(1 / limit <= r <= limit for r in ratios) for limit in (CLOSE, 1.25)]
    logs = [math.log(r) for r in ratios]
    mean = math.exp(sum(logs) / len(logs))
    return (
        f"Predicted over measured, in {len(ratios)} rows: within {CLOSE}× in {near[0]} "
        f"({near[0] / len(ratios):.0%}), within 1.25× in {near[1]} "
        f"({near[1] / len(ratios):.0%}), from {min(ratios):.2f} to {max(ratios):.2f}, "
        f"geometric mean {mean:.2f}."
    )


def microseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    value = seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="a result of `ptattn bench ops`")
    parser.add_argument("--only", metavar="REGEX", type=aot.pattern, default="")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    result = json.loads(args.file.read_text(encoding="utf-8"))
    rows = [row for row in measured(result) if args.only.search(" ".join(row.key))]
    if not rows:
        sys.exit(f"no case of ours in {args.file} matches {args.only.pattern!r}")
    if host.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    facts = args.file.with_name("launches.json")
    then = starts_of(json.loads(facts.read_text(encoding="utf-8"))) if facts.exists() else {}
    now = starts_now([row.key for row in rows], args.processes)
    found = compare(rows, then, now, result["rates"]["copy"])
    print(*report(found), sep="\n")
    block = args.file.with_name("block.json")
    blocks = json.loads(block.read_text(encoding="utf-8"))["rows"] if block.exists() else []
    print("", *goals.report(found, blocks), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
