"""What a call of an operation, ProxyAttention or a block costs the host, without a GPU.

    python -m benchmarks.host [--only REGEX] [--against CHECKOUT] [--json FILE]

Tensors are tiny (8 x 8 tokens, 2 heads of 16, fp32, one thread) and the launches of kernels are
recorded as on sm90, not run: what is left is the way from a public function to a kernel. Each case
runs with gradients off ("no grad"), forward with gradients on ("forward") and with its backward
("training"). In the table:

  calls    Python frames of ptattn and its kernels that a call enters, resumed generators among
           them, after a few calls have filled every cache
  limit    the most calls there may be; exit status 1 if a case has more
  kernels  launches of ours, and torch operations that are neither view nor allocation, as a
           dispatch mode sees them: under one, gradients of packed projections are stacked;
           "ours" are the launches alone
  µs       of one call: the median of the repeats, and their 20-80 % quantiles
  torch    µs over that of torch's own, in turns: one scaled_dot_product_attention (dense) for each
           attention, one layer_norm for each norm or mean, and nothing for a module's other parts
  before   µs over that of the checkout given by --against, in turns; "its" figures beside it
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.host_worker import CASES, FORWARD, NO_GRAD, TASKS, TRAINING, Sample
from benchmarks.tables import Column, table
from ptattn import environment
from ptattn.bench import units
from ptattn.bench.clocks import Timing, summarize

ROOT = Path(__file__).resolve().parent.parent
# The most calls of our own, of a case and task. tests/test_host_path.py holds them.
LIMITS = {
    (case, task): limit
    for case, limits in {
        "window_mean": (30, 30, 50),
        "layer_norm": (30, 30, 60),
        "residual_layer_norm": (30, 30, 60),
        "layer_norm_window_mean": (35, 35, 60),
        "residual_layer_norm_window_mean": (35, 35, 70),
        "attention": (30, 30, 60),
        "window_attention": (30, 30, 60),
        "window_attention, large windows": (35, 35, 70),
        "ProxyAttention": (290, 300, 545),
        "PT-DiT block, text": (345, 375, 740),
        "PT-DiT block, classes": (310, 345, 695),
        "DiT block": (95, 120, 265),
    }.items()
    for task, limit in zip((NO_GRAD, FORWARD, TRAINING), limits, strict=True)
}


Measure = Callable[[str, str, float], Sample]  # of case, task and seconds


@contextmanager
def worker(checkout: Path) -> Iterator[Measure]:
    """A process that measures one checkout.

    With Triton's interpreter: else the kernels refuse CPU tensors before a launch is recorded.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / "host_worker.py")]
    known = os.environ | {"PYTHONPATH": str(checkout), "TRITON_INTERPRET": "1"}
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=known, **pipes) as process:
        questions: Any = process.stdin
        answers: Any = process.stdout

        def measure(case: str, task: str, seconds: float) -> Sample:
            print(json.dumps([case, task, seconds]), file=questions, flush=True)
            if answer := answers.readline():
                return Sample(**json.loads(answer))
            raise SystemExit(f"{checkout}: {case}, {task} failed; the error is above")

        yield measure


@dataclass(frozen=True)
class Row:
    """The repeats of a case and task, each beside one of the other checkout's."""

    case: str
    task: str
    samples: tuple[Sample, ...]
    before: tuple[Sample, ...] = ()

    @property
    def limit(self) -> int | None:
        return LIMITS.get((self.case, self.task))

    @property
    def too_many(self) -> bool:
        return self.limit is not None and self.samples[0].calls > self.limit

    @property
    def timing(self) -> Timing:
        return summarize([sample.seconds for sample in self.samples])

    @property
    def over_torch(self) -> float:
        return statistics.median(s.seconds / s.torch_seconds for s in self.samples)

    @property
    def over_before(self) -> float | None:
        if not self.before:
            return None
        pairs = zip(self.samples, self.before, strict=True)
        return statistics.median(now.seconds / then.seconds for now, then in pairs)


def _kernels(sample: Sample) -> str:
    return str(sample.launches + sample.operations)


def _microseconds(seconds: float) -> str:
    return units.digits(seconds * 1e6)


def _spread(timing: Timing) -> str:
    return f"{_microseconds(timing.low)}-{_microseconds(timing.high)}"


def _median(samples: Sequence[Sample]) -> str:
    return _microseconds(statistics.median(sample.seconds for sample in samples))


COLUMNS: tuple[Column[Row], ...] = (
    Column("case", lambda row: row.case),
    Column("task", lambda row: row.task),
    Column("calls", lambda row: f"{row.samples[0].calls:,}"),
    Column("limit", lambda row: "" if row.limit is None else str(row.limit), narrow=False),
    Column("kernels", lambda row: _kernels(row.samples[0])),
    Column("ours", lambda row: str(row.samples[0].launches), narrow=False),
    Column("µs", lambda row: _median(row.samples)),
    Column("20-80 %", lambda row: _spread(row.timing), narrow=False),
    Column("torch", lambda row: units.ratio(row.over_torch)),
)
AGAINST: tuple[Column[Row], ...] = (
    Column("before", lambda row: units.ratio(row.over_before or 0.0)),
    Column("its calls", lambda row: f"{row.before[0].calls:,}", narrow=False),
    Column("its kernels", lambda row: _kernels(row.before[0]), narrow=False),
    Column("its µs", lambda row: _median(row.before), narrow=False),
)


def as_json(row: Row) -> dict[str, Any]:
    computed = dict(limit=row.limit, over_torch=row.over_torch, over_before=row.over_before)
    return {**asdict(row), **computed, "seconds": asdict(row.timing)}


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _checkout(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "ptattn" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no checkout: it has no ptattn/__init__.py")
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--only", metavar="REGEX", type=_pattern, default="", help="cases, such as '^attention$'"
    )
    parser.add_argument(
        "--against", metavar="CHECKOUT", type=_checkout, help="a folder with another ptattn/"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a repeat of a case and task")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"argument --repeats: at least 1 is needed; got {args.repeats}")
    return args


def run(case: str, task: str, workers: Sequence[Measure], args: argparse.Namespace) -> Row:
    """The workers take turns, in an order that changes from repeat to repeat."""
    samples: list[list[Sample]] = [[] for _ in workers]
    turns = list(zip(workers, samples, strict=True))
    for _ in range(args.repeats):
        for measure, own in turns:
            own.append(measure(case, task, args.seconds))
        turns.reverse()
    return Row(case, task, *map(tuple, samples))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    chosen = [(case, task) for case in CASES if re.search(args.only, case) for task in TASKS]
    if not chosen:
        raise SystemExit(f"no case matches {args.only.pattern!r}; they are {', '.join(CASES)}")
    rows = []
    with ExitStack() as stack:
        checkouts = [ROOT, *([args.against] if args.against else [])]
        workers = [stack.enter_context(worker(checkout)) for checkout in checkouts]
        for case, task in chosen:
            rows.append(run(case, task, workers, args))
            if sys.stderr.isatty():
                print(f"\r{len(rows)} of {len(chosen)} measured", end="\r", file=sys.stderr)
    if args.json:
        machine = environment.describe() | dict(threads=1)
        found = dict(machine=machine, rows=[as_json(row) for row in rows])
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    columns = (*COLUMNS, *(AGAINST if args.against else ()))
    print(table(rows, columns, shutil.get_terminal_size().columns))
    failed = [
        f"{row.case}, {row.task}: {row.samples[0].calls} calls, of at most {row.limit}"
        for row in rows
        if row.too_many
    ]
    print(f"\nMeasured: {len(rows)}. Over their limit: {len(failed)}.", *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
